"""What images are compared in: the features of a network that was trained to tell them apart."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pyard.data.digits import NUM_CLASSES, digits_data

FEATURE_SIZE = 32
_TRAINING_STEPS = 600
_BATCH_SIZE = 128
_HELD_OUT = 360


class FeatureNetwork(Protocol):
    """Images to feature vectors.

    Attributes:
        name: what it is, for tables and files.
        fingerprint: changes whenever the features do; distances compare only under equal ones.
    """

    name: str
    fingerprint: str

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, C, H, W], -1 to 1, to features float64 [n, D]."""
        ...


class Activations(NamedTuple):
    """All that a network says of n images.

    Args:
        features: [n, D].
        spatial: [n, E], features that still know places; None: it gives none.
        probabilities: [n, classes], softmax outputs; None: it gives none.
    """

    features: np.ndarray
    spatial: np.ndarray | None = None
    probabilities: np.ndarray | None = None


@runtime_checkable
class ActivationNetwork(FeatureNetwork, Protocol):
    """A feature network that may also give spatial features and class probabilities, from one call."""

    def activations(self, images: np.ndarray) -> Activations:
        """Images float32 [n, C, H, W], -1 to 1, or uint8, to what it says of them."""
        ...


@runtime_checkable
class Classifier(FeatureNetwork, Protocol):
    """A feature network that also says which class it sees."""

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, C, H, W], -1 to 1, to labels int64 [n]."""
        ...


class DigitsClassifier:
    """A small convolutional network trained on scikit-learn's digits (implements `Classifier`).

    Its features are the 32 values before the last layer, in a unit in which a feature's variance over the real digits is 1 on
    average: a Fréchet distance of 1 is then one standard deviation's worth in one of 32 directions, or a little in many.

    Args:
        network: images [n, 1, 8, 8] to features [n, 32] and those to scores [n, 10], as two stages.
        held_out_accuracy: share of digits it was not trained on that it names correctly.
    """

    def __init__(self, network: nn.Sequential, held_out_accuracy: float):
        self.name = f"digits classifier ({FEATURE_SIZE} features)"
        self.held_out_accuracy = held_out_accuracy
        self._body, self._head = network.eval().requires_grad_(False)
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        images, _ = digits_data()
        variance = self._body(torch.from_numpy(images)).double().var(dim=0).mean()
        self._unit = float(variance.sqrt())

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, 1, 8, 8], -1 to 1, to features float64 [n, 32]."""
        return self._body(torch.from_numpy(images)).double().numpy() / self._unit

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [n, 1, 8, 8], -1 to 1, to labels int64 [n]."""
        return self._head(self._body(torch.from_numpy(images))).argmax(dim=1).numpy()


def activations_of(network: FeatureNetwork, images: np.ndarray) -> Activations:
    """What any feature network says of images, float from -1 to 1 or uint8; features alone if it gives no more."""
    if isinstance(network, ActivationNetwork):
        return network.activations(images)
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 127.5 - 1
    return Activations(network.features(images))


@functools.cache
def digits_classifier() -> DigitsClassifier:
    """The classifier of the digits, trained from a fixed seed in a few seconds, once a process."""
    images, labels = (torch.from_numpy(array) for array in digits_data())
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=random)
    held_out, training = order[:_HELD_OUT], order[_HELD_OUT:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURE_SIZE),
            nn.SiLU(),
        )
        network = nn.Sequential(body, nn.Linear(FEATURE_SIZE, NUM_CLASSES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=_TRAINING_STEPS)
    for _ in range(_TRAINING_STEPS):
        index = training[torch.randint(len(training), (_BATCH_SIZE,), generator=random)]
        # A little noise, so that features do not hang on the 17 grey levels that real digits have and samples have not.
        noisy = images[index] + 0.1 * torch.randn(_BATCH_SIZE, *images.shape[1:], generator=random)
        loss = F.cross_entropy(network(noisy), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        correct = network(images[held_out]).argmax(dim=1) == labels[held_out]
    return DigitsClassifier(network, held_out_accuracy=float(correct.float().mean()))
