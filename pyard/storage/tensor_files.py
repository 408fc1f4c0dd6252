"""safetensors files, read in one way: regular files alone, one line for whatever is wrong, and no NaN among weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyard.errors import InputError
from pyard.storage.reading import UnreadableError, damaged, regular_file, require_readable

_MOST_HEADER_BYTES = 10**8  # as the format has it
_CHECKED_TOGETHER = 2**22  # numbers


def read_safetensors(path: Path, *, whole: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU, mapped: what is not used takes no memory.

    Args:
        path: the file.
        whole: read it once to see that the disk can; False: what is not used is not read, for tables of which a row is taken.

    Raises:
        InputError: missing, not a regular file, not readable, cut off, or no safetensors.
    """
    return read_with_metadata(path, whole=whole)[0]


def read_with_metadata(path: Path, *, whole: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file and the texts in its header; as `read_safetensors`."""
    if whole:
        require_readable(path)
    else:
        _require_header(path)
    # Here, since a machine that only computes with models may have no safetensors.
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, dict(file.metadata() or {})
    # SafetensorError, and what torch says of dtypes that it does not have.
    except Exception as error:
        raise _unreadable(path, error) from None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, of which only the header is read; errors as of `read_safetensors`."""
    _require_header(path)
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:
        raise _unreadable(path, error) from None


def owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in memory of their own, which is aligned; in a file's buffer it is not, and BLAS rounds by alignment."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def require_finite(tensors: Mapping[str, torch.Tensor], where: Path | str) -> None:
    """Raises InputError if there is NaN or infinity among weights, which would be in every sample without a word."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.numel() and not tensor.is_meta):
            continue
        # In parts, since torch copies what it sums in another dtype.
        for part in tensor.detach().flatten().split(_CHECKED_TOGETHER):
            # A sum is finite if its terms are, unless it overflows.
            if not torch.isfinite(part.sum(dtype=torch.float64)) and not torch.isfinite(part.float()).all():
                raise InputError(
                    f"{where}: {name} holds NaN or infinity, and so would every sample; its training diverged, or it is damaged"
                )


def _require_header(path: Path) -> None:
    with regular_file(path) as file:
        try:
            file.read(min(int.from_bytes(file.read(8), "little"), _MOST_HEADER_BYTES))
        except OSError as error:
            raise damaged(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    found: Any = " ".join(str(error).split())[:300]
    if isinstance(error, OSError | MemoryError) or "mmap" in found:  # no word about what is in the file
        return UnreadableError(f"{path} cannot be read ({found})")
    return InputError(f"{path} cannot be read ({found}); it is cut off or not a safetensors file")
