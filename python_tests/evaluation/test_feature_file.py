"""Feature networks out of files, against the same networks in memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.feature_files import Plain, SmallInception, save_onnx, save_torchscript

from pyard.errors import InputError
from pyard.evaluation.feature_file import FeatureSettings, FileFeatures
from pyard.evaluation.features import ActivationNetwork
from pyard.evaluation.pixels import resized, to_bytes


def images(count: int = 5, channels: int = 3, size: int = 24) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1.2, 1.2, (count, channels, size, size)).astype(np.float32)


@torch.no_grad()
def test_the_inception_of_fid_gives_features_probabilities_and_spatial_features(tmp_path: Path) -> None:
    network = save_torchscript(SmallInception(), tmp_path / "inception.pt")
    loaded = FileFeatures(tmp_path / "inception.pt", batch_size=2)
    assert isinstance(loaded, ActivationNetwork)
    pixels = torch.from_numpy(to_bytes(images(), "adm"))
    found = loaded.activations(images())
    np.testing.assert_allclose(found.features, network(pixels, return_features=True).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, network(pixels, no_output_bias=True).numpy(), rtol=1e-4, atol=1e-6)
    biased = network(pixels).numpy()
    assert np.abs(found.probabilities - biased).max() > 0.05
    # ADM keeps 7 of the channels.
    spatial = network.spatial(pixels)
    assert spatial.shape[1] == 8
    np.testing.assert_allclose(found.spatial, spatial[:, :7].flatten(1).numpy(), rtol=1e-3, atol=1e-4)
    assert loaded.features(images()).dtype == np.float64
    np.testing.assert_allclose(loaded.features(images()), found.features, rtol=1e-6)
    np.testing.assert_array_equal(loaded.activations(pixels.numpy()).features, found.features)

    alone = FileFeatures(tmp_path / "inception.pt", FeatureSettings(fid_only=True)).activations(images())
    assert alone.spatial is None
    assert alone.probabilities is None


def test_spatial_features_that_cannot_be_checked_are_not_given(tmp_path: Path) -> None:
    # Another normalisation inside: what pyard does before the layers is then wrong, and its own features tell.
    save_torchscript(SmallInception(shift=100.0), tmp_path / "inception.pt")
    with pytest.warns(UserWarning, match="no sFID"):
        found = FileFeatures(tmp_path / "inception.pt").activations(images())
    assert found.spatial is None
    assert found.probabilities is not None


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pt", "onnx"])
def test_outputs_are_chosen_by_number_or_name(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plain.{suffix}"
    network = save_torchscript(Plain(), path) if suffix == "pt" else save_onnx(Plain(), path, 24)
    pixels = torch.from_numpy(to_bytes(images())).float()
    features, logits = network(pixels / 255)
    first = FileFeatures(path, FeatureSettings(pixels="unit"), batch_size=3).activations(images())
    np.testing.assert_allclose(first.features, features.numpy(), rtol=1e-4, atol=1e-5)
    assert first.probabilities is None
    choice = "1" if suffix == "pt" else "logits"
    both = FileFeatures(path, FeatureSettings(pixels="unit", features=choice, logits="1")).activations(images())
    np.testing.assert_allclose(both.features, logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.probabilities, logits.softmax(dim=1).numpy(), rtol=1e-4, atol=1e-6)
    assert both.probabilities.dtype == np.float64


@torch.no_grad()
def test_layers_are_outputs_too(tmp_path: Path) -> None:
    network = save_torchscript(Plain(), tmp_path / "plain.pt")
    settings = FeatureSettings(pixels="unit", spatial="body.1", spatial_channels=3)
    found = FileFeatures(tmp_path / "plain.pt", settings).activations(images())
    expected = network.body[:2](torch.from_numpy(to_bytes(images())).float() / 255)[:, :3].flatten(1)
    np.testing.assert_allclose(found.spatial, expected.numpy(), rtol=1e-4, atol=1e-5)
    sequential = save_torchscript(network.body, tmp_path / "sequential.pt")
    settings = FeatureSettings(pixels="unit", features="0")
    whole = FileFeatures(tmp_path / "sequential.pt", settings).features(images())
    np.testing.assert_allclose(
        whole, sequential(torch.from_numpy(to_bytes(images())).float() / 255).flatten(1).numpy(), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_inner_tensors_of_onnx_graphs_are_outputs_too(tmp_path: Path) -> None:
    import onnx

    network = save_onnx(Plain(), tmp_path / "plain.onnx", 24)
    nodes = onnx.load(tmp_path / "plain.onnx").graph.node
    first = next(node.output[0] for node in nodes if node.op_type == "Conv")
    found = FileFeatures(tmp_path / "plain.onnx", FeatureSettings(spatial=first, spatial_channels=2)).activations(images())
    expected = network.body[0](torch.from_numpy(to_bytes(images())).float())[:, :2].flatten(1)
    np.testing.assert_allclose(found.spatial, expected.numpy(), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_an_onnx_graph_of_fixed_batch_size(tmp_path: Path) -> None:
    network = save_onnx(Plain(), tmp_path / "plain.onnx", 24, batch_size=4)
    found = FileFeatures(tmp_path / "plain.onnx").features(images(6))
    expected, _ = network(torch.from_numpy(to_bytes(images(6))).float())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_preprocessing_is_what_the_settings_say(tmp_path: Path) -> None:
    network = save_torchscript(Plain(), tmp_path / "plain.pt")
    settings = FeatureSettings(
        quantise="rounded", resize=15, resize_mode="antialias", pixels="unit", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    x = resized(torch.from_numpy(to_bytes(images(), "rounded")).float(), 15, "antialias") / 255
    x = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    found = FileFeatures(tmp_path / "plain.pt", settings).features(images())
    np.testing.assert_allclose(found, network(x)[0].numpy(), rtol=1e-4, atol=1e-5)
    symmetric = FileFeatures(tmp_path / "plain.pt", FeatureSettings(pixels="symmetric")).features(images())
    expected = network((torch.from_numpy(to_bytes(images())).float() - 128) / 128)[0]
    np.testing.assert_allclose(symmetric, expected.numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_grey_images_become_three_channels(tmp_path: Path) -> None:
    network = save_torchscript(Plain(), tmp_path / "plain.pt")
    grey = images(channels=1)
    expected = network(torch.from_numpy(to_bytes(grey)).float().repeat(1, 3, 1, 1))[0]
    np.testing.assert_allclose(FileFeatures(tmp_path / "plain.pt").features(grey), expected.numpy(), rtol=1e-4, atol=1e-3)


def test_the_fingerprint_is_of_file_and_settings(tmp_path: Path) -> None:
    save_torchscript(Plain(), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    other = Plain()
    with torch.no_grad():
        other.head.bias.add_(1)
    save_torchscript(other, tmp_path / "c.pt")
    prints = [FileFeatures(tmp_path / f"{name}.pt").fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert FileFeatures(tmp_path / "a.pt", FeatureSettings(quantise="rounded")).fingerprint != prints[0]


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file.*inception-2015-12-05\.pt.*downloads nothing"):
        FileFeatures(tmp_path / "inception-2015-12-05.pt")
    torch.save(Plain().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"not a TorchScript file.*state_dict"):
        FileFeatures(tmp_path / "weights.pt")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"bad\.onnx: not an ONNX file"):
        FileFeatures(tmp_path / "bad.onnx")
    save_torchscript(Plain(), tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"no output '7'; there are 0, 1.*layers body, head"):
        FileFeatures(tmp_path / "plain.pt", FeatureSettings(features="7")).features(images())
    with pytest.raises(InputError, match=r"no layer '9' of 'body\.9'; there are 0, 1, 2"):
        FileFeatures(tmp_path / "plain.pt", FeatureSettings(spatial="body.9"))
    with pytest.raises(InputError, match=r"fails on images of shape \(5, 2, 24, 24\)"):
        FileFeatures(tmp_path / "plain.pt").features(images(channels=2))
    save_onnx(Plain(), tmp_path / "plain.onnx", 24)
    with pytest.raises(InputError, match="no output 'pool'; there are features, logits and"):
        FileFeatures(tmp_path / "plain.onnx", FeatureSettings(features="pool"))
    with pytest.raises(InputError, match=r"fails on images of shape \(5, 3, 30, 30\)"):
        FileFeatures(tmp_path / "plain.onnx").features(images(size=30))
    with pytest.raises(InputError, match="pixels is 'half'"):
        FeatureSettings(pixels="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resize is 0"):
        FeatureSettings(resize=0)


def test_no_warning_where_all_is_well(tmp_path: Path) -> None:
    save_torchscript(SmallInception(), tmp_path / "inception.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        FileFeatures(tmp_path / "inception.pt")
