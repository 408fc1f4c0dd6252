"""The outputs of a TorchScript file, by number, by name, or by a layer's path."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyard.errors import InputError
from pyard.evaluation.pixels import resized

Output = Callable[[torch.Tensor], torch.Tensor]

# Names in inception-2015-12-05.pt, and what its forward does before its layers run: TensorFlow 1's resizing, (x - 128) / 128.
_LAYERS, _SPATIAL, _SIZE = "layers", "layers.mixed_6.conv", 299


def open_torchscript(
    path: Path, wanted: Mapping[str, str | None], device: torch.device, *, with_all: bool = True
) -> dict[str, Output]:
    """The functions that compute a file's outputs.

    Args:
        path: written by `torch.jit.save`.
        wanted: which output is `features`, `spatial` and `logits`, each by number, name or layer; None: the usual one.
        device: where it runs.
        with_all: find spatial features and class probabilities of the Inception of FID, too.

    Returns:
        `features`, and, where there are any, `spatial`, `logits` or `probabilities`.
    """
    try:
        network: Any = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"features {path}: not a TorchScript file ({str(error).strip().splitlines()[0]}). Expected one that torch.jit.save "
            "wrote, or an ONNX file that ends in .onnx; a file of weights (a state_dict) is not enough"
        ) from None
    arguments = [argument.name for argument in network.forward.schema.arguments]
    found: dict[str, Output] = {}
    if "return_features" in arguments:
        found["features"] = lambda x: network(x, return_features=True)
        if with_all and "no_output_bias" in arguments:
            # ADM leaves the bias out, as the first implementation of the Inception Score did.
            found["probabilities"] = lambda x: network(x, no_output_bias=True)
        spatial = _inception_spatial(network, device) if with_all else None
        if spatial is not None:
            found["spatial"] = spatial
    for name, choice in wanted.items():
        if choice is not None:
            found[name] = _chosen(network, choice, path)
            if name == "logits":
                found.pop("probabilities", None)
    found.setdefault("features", _chosen(network, "0", path))
    return found


def _chosen(network: Any, choice: str, path: Path) -> Output:
    if not choice.isdigit() and hasattr(network, choice.split(".")[0]):
        return _up_to(network, choice, path)

    def output(x: torch.Tensor) -> torch.Tensor:
        found = network(x)
        outputs = {"0": found} if isinstance(found, torch.Tensor) else found
        if not isinstance(outputs, dict):
            outputs = {str(i): tensor for i, tensor in enumerate(outputs)}
        key = next(iter(outputs)) if choice == "0" and choice not in outputs else choice
        if not isinstance(outputs.get(key), torch.Tensor):
            raise InputError(
                f"features {path.name}: no output {choice!r}; there are {', '.join(outputs)}, and the layers "
                f"{', '.join(name for name, _ in network.named_children())}"
            )
        return outputs[key]

    return output


def _up_to(network: Any, layer: str, path: Path | str) -> Output:
    """Run the layers on the way to one, and it: TorchScript calls no hooks, so the way is walked from outside.

    Every container on the way runs its children in order; the file's own module does so if it is a `Sequential`, for else its
    children stand in the order of their definition.
    """
    steps: list[Any] = []
    module = network
    for depth, name in enumerate(layer.split(".")):
        children = dict(module.named_children())
        if name not in children:
            raise InputError(f"features {path}: no layer {name!r} of {layer!r}; there are {', '.join(children) or 'none'}")
        if depth or module.original_name == "Sequential":
            steps += [children[earlier] for earlier in itertools.takewhile(lambda other: other != name, children)]  # noqa: B023
        module = children[name]
    steps.append(module)

    def output(x: torch.Tensor) -> torch.Tensor:
        for step in steps:
            x = step(x)
        return x

    return output


def _inception_spatial(network: Any, device: torch.device) -> Output | None:
    """ADM's spatial features out of the Inception of FID: the first branch of `mixed_6`, before pooling.

    What the file does before its layers is done here once more; whether it is the same is seen by its own features.
    """
    try:
        layers, branch = getattr(network, _LAYERS), _up_to(network, _SPATIAL, _LAYERS)
        probe = 255 * torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.inference_mode():
            expected = network(probe, return_features=True).flatten(1)
            agrees = torch.allclose(layers(_inception_input(probe)).flatten(1), expected, rtol=1e-3, atol=1e-3)
            branch(_inception_input(probe))
    except (AttributeError, InputError, RuntimeError):
        agrees = False
    if not agrees:
        warnings.warn("features: the network has no layers like those of inception-2015-12-05.pt; no sFID", stacklevel=2)
        return None
    return lambda x: branch(_inception_input(x))


def _inception_input(x: torch.Tensor) -> torch.Tensor:
    return (resized(x, _SIZE, "tf1") - 128) / 128
