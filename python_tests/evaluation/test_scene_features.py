"""Features of scenes and of mixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyard.data.captioned_scenes import SceneSetting, scene_batch
from pyard.data.mixture import mixture_2d, mixture_16
from pyard.data.scenes import scenes_data
from pyard.errors import InputError
from pyard.evaluation.features import Classifier, FeatureNetwork
from pyard.evaluation.scene_features import (
    MixtureFeatures,
    ObjectCounter,
    ScenesClassifier,
    object_counter,
    scenes_classifier,
)


def untrained(seed: int = 0) -> ScenesClassifier:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 64))
    return ScenesClassifier(nn.Sequential(body, nn.Linear(64, 16)), scenes_data(0, range(1200)))


def test_features_have_the_unit_that_is_said() -> None:
    network = untrained()
    assert isinstance(network, Classifier)
    images, labels = scenes_data(0, range(1200))
    features = network.features(images)
    assert (features.shape, features.dtype) == ((1200, 64), np.float64)
    assert features.var(axis=0, ddof=1).mean() == pytest.approx(1)
    found = network.classify(images)
    assert (found.shape, found.dtype) == ((1200,), np.int64)
    assert network.held_out_accuracy == (found == labels).mean()
    assert untrained().fingerprint == network.fingerprint != untrained(1).fingerprint


@pytest.mark.slow
def test_the_classifier_names_scenes_it_has_not_seen() -> None:
    network = scenes_classifier()
    assert network.held_out_accuracy > 0.97
    images, labels = scenes_data(1, range(1000))
    assert (network.classify(images) == labels).mean() > 0.97


def test_a_counter_that_was_saved_sees_the_same(tmp_path: Path) -> None:
    counter: FeatureNetwork = object_counter(steps=3)
    assert isinstance(counter, ObjectCounter)
    pictures = scene_batch(0, range(5)).pictures
    file = tmp_path / "features.safetensors"
    counter.save(file)
    again = ObjectCounter.load(file)
    assert again.fingerprint == counter.fingerprint != object_counter(steps=4).fingerprint
    found = again.features(pictures)
    assert (found.shape, found.dtype) == ((5, 64), np.float64)
    assert found.std() > 0
    np.testing.assert_array_equal(found, counter.features(pictures))
    with pytest.raises(InputError, match=r"features .* cannot be read: .* to train them again"):
        ObjectCounter.load(file, SceneSetting(size=32))
    file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        ObjectCounter.load(file)


@pytest.mark.parametrize("make", [mixture_2d, mixture_16])
def test_a_mixtures_features_are_its_values(make) -> None:
    mixture = make()
    features = MixtureFeatures(mixture)
    assert isinstance(features, Classifier)
    images, labels = mixture.sample(0, range(500))
    found = features.features(images)
    np.testing.assert_array_equal(found, images.reshape(500, -1))
    assert found.dtype == np.float64
    assert (features.classify(images) == labels).mean() > 0.99
    assert features.fingerprint != MixtureFeatures(make(seed=1)).fingerprint
