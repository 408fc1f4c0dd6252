"""What scenes and mixtures are compared in: a classifier of the scenes, and a mixture's own values."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pyard.data.mixture import GaussianMixture
from pyard.data.scenes import NUM_CLASSES, scenes_data

FEATURE_SIZE = 64
_TRAINING_STEPS = 800
_BATCH_SIZE = 128
_HELD_OUT = 2000
_AT_ONCE = 1000  # images that the network sees together
# Seeds of the scenes, apart from the small ones that teachers and students are measured with.
_TRAINING_SEED, _HELD_OUT_SEED = 2**63, 2**63 + 1


class ScenesClassifier:
    """A small convolutional network trained on scenes (implements `Classifier`).

    Its features are the 64 values before the last layer, in a unit in which a feature's variance over scenes is 1 on average.

    Args:
        network: images [n, 3, 32, 32] to features [n, 64] and those to scores [n, 16], as two stages.
        scenes: images float32 [m, 3, 32, 32] and labels int64 [m] that it was not trained on; they give the unit and
            `held_out_accuracy`, the share that it names correctly.
    """

    def __init__(self, network: nn.Sequential, scenes: tuple[np.ndarray, np.ndarray]):
        self.name = f"scenes classifier ({FEATURE_SIZE} features)"
        self._body, self._head = network.eval().requires_grad_(False)
        self._device = next(network.parameters()).device
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        images, labels = scenes
        self._unit = float(np.sqrt(self._run(self._body, images).var(axis=0, ddof=1).mean()))
        self.held_out_accuracy = float((self.classify(images) == labels).mean())

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, 3, 32, 32], -1 to 1, to features float64 [n, 64]."""
        return self._run(self._body, images) / self._unit

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, 3, 32, 32], -1 to 1, to labels int64 [n]."""
        return self._run(nn.Sequential(self._body, self._head), images).argmax(axis=1)

    def _run(self, network: nn.Module, images: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(images).split(_AT_ONCE)
        return torch.cat([network(part.to(self._device)).cpu() for part in parts]).double().numpy()


@functools.cache
def scenes_classifier() -> ScenesClassifier:
    """The classifier of the scenes, trained from a fixed seed, once a process: about a minute on a CPU."""
    # On the CPU: a GPU does not promise the same weights, hence the same features, in every process.
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.GroupNorm(8, 128),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, FEATURE_SIZE),
            nn.SiLU(),
        )
        network = nn.Sequential(body, nn.Linear(FEATURE_SIZE, NUM_CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=_TRAINING_STEPS)
    for step in range(_TRAINING_STEPS):
        images, labels = scenes_data(_TRAINING_SEED, range(step * _BATCH_SIZE, (step + 1) * _BATCH_SIZE))
        # A little noise, so that features do not hang on edges that are sharper than any sample's.
        noisy = torch.from_numpy(images) + 0.1 * torch.randn(images.shape, generator=random)
        loss = F.cross_entropy(network(noisy), torch.from_numpy(labels), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ScenesClassifier(network.to(device), scenes_data(_HELD_OUT_SEED, range(_HELD_OUT)))


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
