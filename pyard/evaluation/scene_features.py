"""What scenes and mixtures are compared in: small networks trained on the scenes, and a mixture's own values."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pyard.data.captioned_scenes import SceneSetting, read_pictures, scene_batch
from pyard.data.captioned_scenes.vocabulary import COLOURS, SHAPES
from pyard.data.mixture import GaussianMixture
from pyard.data.scenes import NUM_CLASSES, scenes_data
from pyard.errors import InputError
from pyard.storage.files import new_file
from pyard.storage.tensor_files import read_safetensors

FEATURE_SIZE = 64
_CLASSIFIER_STEPS, _COUNTER_STEPS = 1600, 500
_BATCH_SIZE = 128
_HELD_OUT = 2000
_AT_ONCE = 1000  # images that the network sees together
# Seeds of the scenes, apart from the small ones that teachers and students are measured with.
_TRAINING_SEED, _HELD_OUT_SEED = 2**63, 2**63 + 1
_CAPTIONED_SEED = 2**62


class _SceneNetwork:
    """Features of a small convolutional network (implements `FeatureNetwork`).

    Args:
        name: for tables.
        network: images [n, 3, P, P] to features [n, 64] and those to what it was trained to say, as two stages.
    """

    def __init__(self, name: str, network: nn.Sequential):
        self.name = name
        self.network = network.eval().requires_grad_(False)
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, 3, P, P], -1 to 1, to features float64 [n, 64]."""
        return self._run(self.network[0], images)

    def _run(self, network: nn.Module, images: np.ndarray) -> np.ndarray:
        device = next(network.parameters()).device
        parts = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).split(_AT_ONCE)
        return torch.cat([network(part.to(device)).cpu() for part in parts]).double().numpy()


class ScenesClassifier(_SceneNetwork):
    """A small convolutional network trained on scenes (implements `Classifier`).

    Its features are the 64 values before the last layer, in a unit in which a feature's variance over scenes is 1 on average.

    Args:
        network: images [n, 3, 32, 32] to features [n, 64] and those to scores [n, 16], as two stages.
        scenes: images float32 [m, 3, 32, 32] and labels int64 [m] that it was not trained on; they give the unit and
            `held_out_accuracy`, the share that it names correctly.
    """

    def __init__(self, network: nn.Sequential, scenes: tuple[np.ndarray, np.ndarray]):
        super().__init__(f"scenes classifier ({FEATURE_SIZE} features)", network)
        images, labels = scenes
        self._unit = float(np.sqrt(self._run(network[0], images).var(axis=0, ddof=1).mean()))
        self.held_out_accuracy = float((self.classify(images) == labels).mean())

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, 3, 32, 32], -1 to 1, to features float64 [n, 64]."""
        return super().features(images) / self._unit

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, 3, 32, 32], -1 to 1, to labels int64 [n]."""
        return self._run(self.network, images).argmax(axis=1)


@functools.cache
def scenes_classifier() -> ScenesClassifier:
    """The classifier of the scenes, trained from a fixed seed, once per process: about two minutes on a CPU."""

    def batch(step: int) -> tuple[np.ndarray, torch.Tensor]:
        images, labels = scenes_data(_TRAINING_SEED, range(step * _BATCH_SIZE, (step + 1) * _BATCH_SIZE))
        return images, torch.from_numpy(labels)

    def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=0.05)

    network = _train(_new_network((32, 64, 128), 32, NUM_CLASSES, batch_norm=True), batch, loss, _CLASSIFIER_STEPS, rise=0.2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ScenesClassifier(network.to(device), scenes_data(_HELD_OUT_SEED, range(_HELD_OUT)))


class ObjectCounter(_SceneNetwork):
    """A small network that learnt how many objects of each shape and colour a captioned scene has.

    Args:
        network: images [n, 3, P, P] to features [n, 64] and those to counts [n, shapes x colours], as two stages.
    """

    def __init__(self, network: nn.Sequential):
        super().__init__(f"object counter of captioned scenes ({FEATURE_SIZE} features)", network)

    def save(self, path: Path) -> None:
        """Write its weights, so that another machine takes the same features: training rounds differently there."""
        with new_file(path) as partial:
            save_file(self.network.state_dict(), partial)

    @classmethod
    def load(cls, path: Path, setting: SceneSetting | None = None) -> ObjectCounter:
        """The one that `save` wrote.

        Raises:
            InputError: a file that cannot be read, or one for scenes of another size.
        """
        network = _new_counter(setting)
        try:
            network.load_state_dict(read_safetensors(path))
        except (InputError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"features {path} cannot be read: {reason}; remove the file to train them again") from None
        return cls(network)


@functools.cache
def object_counter(setting: SceneSetting | None = None, steps: int = _COUNTER_STEPS) -> ObjectCounter:
    """The counter, trained from a fixed seed, once a process: half a minute on a CPU.

    Args:
        setting: of the scenes; None: the default one.
        steps: updates.
    """

    def batch(step: int) -> tuple[np.ndarray, torch.Tensor]:
        pictures = scene_batch(_CAPTIONED_SEED, range(step * _BATCH_SIZE, (step + 1) * _BATCH_SIZE), setting).pictures
        return pictures, _counts(pictures, setting)

    return ObjectCounter(_train(_new_counter(setting), batch, F.mse_loss, steps))


def _new_counter(setting: SceneSetting | None) -> nn.Sequential:
    return _new_network((32, 64), (setting or SceneSetting()).size, len(SHAPES) * len(COLOURS))


def _counts(pictures: np.ndarray, setting: SceneSetting | None) -> torch.Tensor:
    """How many objects of each shape and colour: float32 [n, shapes x colours]."""
    shapes, colours = list(SHAPES), list(COLOURS)
    counts = torch.zeros(len(pictures), len(shapes) * len(colours))
    for row, reading in enumerate(read_pictures(pictures, setting)):
        for found in reading.objects:
            counts[row, shapes.index(found.shape) * len(colours) + colours.index(found.colour)] += 1
    return counts


def _new_network(channels: tuple[int, ...], side: int, outputs: int, *, batch_norm: bool = False) -> nn.Sequential:
    """A fresh network for pictures of `side` pixels, which every layer of `channels` halves.

    Args:
        batch_norm: normalise every layer over the batch, not all but the first over groups of channels: with groups, a
            network that must name shapes of any turn and texture learns their colours alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise((3, *channels))):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(after))
            elif number:
                layers.append(nn.GroupNorm(8, after))
            layers.append(nn.SiLU())
        left = side >> len(channels)
        layers += [nn.Flatten(), nn.Linear(channels[-1] * left * left, FEATURE_SIZE), nn.SiLU()]
        return nn.Sequential(nn.Sequential(*layers), nn.Linear(FEATURE_SIZE, outputs))


def _train(
    network: nn.Sequential,
    batch: Callable[[int], tuple[np.ndarray, torch.Tensor]],  # of an update: images [n, 3, P, P], and what to say of them
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    steps: int,
    rise: float = 0.3,  # of the learning rate, as a share of the steps
) -> nn.Sequential:
    # On the CPU: a GPU does not promise the same weights, hence the same features, in every process.
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=rise)
    for step in range(steps):
        images, wanted = batch(step)
        # A little noise, so that features do not hang on edges that are sharper than any sample's.
        noisy = torch.from_numpy(images) + 0.1 * torch.randn(images.shape, generator=random)
        loss = loss_of(network(noisy), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


class MixtureFeatures:
    """A mixture's samples as they are (implements `Classifier`): the value of every dimension, and the likeliest class.

    `mixture.mean()` and `mixture.covariance()` are the exact statistics of these features over all data.

    Args:
        mixture: what the samples should be of.
    """

    def __init__(self, mixture: GaussianMixture):
        self.mixture = mixture
        self.name = f"values ({mixture.mean().size} dimensions)"
        self.fingerprint = mixture.fingerprint

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, C, H, W] to features float64 [n, C H W]."""
        return images.reshape(len(images), -1).astype(np.float64)

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, C, H, W] to labels int64 [n], by Bayes' rule."""
        return self.mixture.classify(images)
