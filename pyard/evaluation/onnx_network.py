"""The outputs of an ONNX file, by number or name, inner tensors included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyard.errors import InputError
from pyard.storage.reading import require_regular

_NUMPY_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


def open_onnx(path: Path, wanted: Mapping[str, str | None]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The functions that compute a file's outputs.

    Args:
        path: the file; its first input takes the images, [n, 3, H, W].
        wanted: which tensor is `features`, `spatial` and `logits`, by number of the output, or by name; None: the first output
            for `features`, else not computed.

    Returns:
        A function for each.
    """
    import onnx
    import onnxruntime

    require_regular(path)
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own
        raise InputError(f"features {path}: not an ONNX file: {error}") from None
    outputs = [output.name for output in model.graph.output]
    inner = {name for node in model.graph.node for name in node.output} - set(outputs) - {""}
    names = {}
    for kind, choice in {**wanted, "features": wanted.get("features") or "0"}.items():
        if choice is None:
            continue
        names[kind] = outputs[int(choice)] if choice.isdigit() and int(choice) < len(outputs) else choice
        if names[kind] not in inner and names[kind] not in outputs:
            raise InputError(
                f"features {path}: no output {choice!r}; there are {', '.join(outputs)} and {len(inner)} inner tensors"
            )
    added = sorted({name for name in names.values() if name in inner})
    if added:
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
    available = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        # Weights beside the file are found only from its path.
        source = model.SerializeToString() if added else str(path)
        session = onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise InputError(f"features {path}: onnxruntime cannot open it: {str(error).strip().splitlines()[0]}") from None
    entry = session.get_inputs()[0]
    if entry.type not in _NUMPY_TYPES:
        raise InputError(
            f"features {path}: its input {entry.name!r} is {entry.type}; expected one of {', '.join(_NUMPY_TYPES)}"
        )
    fixed = entry.shape[0] if isinstance(entry.shape[0], int) else None

    def run(name: str, x: torch.Tensor) -> torch.Tensor:
        pixels = x.cpu().numpy().astype(_NUMPY_TYPES[entry.type])
        size = fixed or len(pixels)
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            # A graph of fixed batch size gets its last batch filled up.
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append(session.run([name], {entry.name: filled})[0][: len(part)])
        return torch.from_numpy(np.concatenate(parts))

    return {kind: lambda x, name=name: run(name, x) for kind, name in names.items()}  # type: ignore[misc]
