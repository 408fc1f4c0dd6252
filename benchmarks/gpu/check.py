"""Whether the library that was carried here is the one to measure: it loads, has kernels for this GPU, and they answer."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def main() -> int:
    """Prints one line about the library, or the one reason why it is not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--machine", type=Path, help="file to write a description of the machine to")
    arguments = parser.parse_args()
    if arguments.machine is not None:
        arguments.machine.write_text(json.dumps(machine()), encoding="utf-8")
    try:
        print(examine(arguments.device))
    except (
        ValueError,
        RuntimeError,
    ) as error:  # pyard's InputError is a ValueError; it cannot be imported if the library is not fit
        print(f"not usable: {str(error).splitlines()[0]}")
        return 1
    return 0


def examine(device: str) -> str:
    """One line about the library.

    Raises:
        ValueError: If it cannot be used on this device.
    """
    from pyard import ops
    from pyard.ops.backend import library, missing_reason
    from pyard.ops.prebuilt import runs_on

    if library is None:
        raise ValueError(f"the operators are not built: {missing_reason}")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device")
        capability = torch.cuda.get_device_capability()
        if not runs_on(library.cuda_architectures, capability):
            built = " ".join(library.cuda_architectures) or "no GPU"
            raise ValueError(f"{library.path} was compiled for {built}; this GPU has compute capability {capability}")
    x, per_step = torch.randn(2, 2, 5, 64, device=device), torch.randn(2, 2, 64, device=device)
    with ops.use_backend("native"):
        answer = ops.modulated_layer_norm(x, per_step, per_step)
    with ops.use_backend("reference"):
        expected = ops.modulated_layer_norm(x, per_step, per_step)
    if not torch.allclose(answer, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(f"{library.path}: modulated_layer_norm differs from its definition on {device}")
    kernels = " ".join(library.cuda_architectures) or "none"
    return f"{library.path}: headers of torch {library.built_with_torch}, CUDA kernels for {kernels}; torch {torch.__version__}"


def machine() -> dict[str, Any]:
    """Device, driver and torch; on a machine without a GPU its processor."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {"device": f"cpu {platform.machine()}", **found}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = f"unknown ({error})"
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "driver, highest clock, power limit": answer,
        **found,
    }


if __name__ == "__main__":
    raise SystemExit(main())
