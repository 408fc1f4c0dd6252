"""The CUDA kernels, compiled as plain C++ for the emulated machine (machine.cuh here) and called on CPU tensors.

This is the kernels' real source: tiling, masks, index arithmetic, fragment layouts, barriers and asynchronous copies all
run. The structures mirror csrc/cuda/launchers.h.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
SCALARS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASKS = {"diagonal": 0, "window": 1, "anchor": 2, "causal": 3}


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def compile_kernels(folder: Path) -> ctypes.CDLL:
    """Compiles every kernel file of csrc/cuda and the emulator into one library in `folder`."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{SOURCES}"]
    units = [*sorted(SOURCES.glob("*.cu")), HERE / "emulator.cpp"]
    objects = [folder / f"{unit.stem}.o" for unit in units]

    def build(unit: Path, to: Path) -> subprocess.CompletedProcess[str]:
        command = [str(compiler()), *flags, "-x", "c++", "-c", str(unit), "-o", str(to)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        for finished in pool.map(build, units, objects):
            assert finished.returncode == 0, finished.stderr[-4000:]
    library = folder / "libemulated.so"
    subprocess.run([str(compiler()), "-shared", "-o", str(library), *map(str, objects)], check=True)
    return ctypes.CDLL(str(library))


def _fields(*names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Tokens(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *_fields("batch", "step", "token", kind=ctypes.c_int64)]


class _PerStep(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *_fields("batch", "step", kind=ctypes.c_int64)]


class _Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *_fields("batch", "head", "row", kind=ctypes.c_int64)]


class BlockMask(ctypes.Structure):
    _fields_ = _fields("query_steps", "key_steps", "tokens", "mask", "window", kind=ctypes.c_int)


class _Attention(ctypes.Structure):
    _fields_ = [
        *_fields("scalar", "batch", "heads", "head_dim", kind=ctypes.c_int),
        ("mask", BlockMask),
        ("scale", ctypes.c_float),
        ("bias", ctypes.c_void_p),
        *_fields("q", "k", "v", kind=_Heads),
    ]


class _AttentionForward(ctypes.Structure):
    _fields_ = [("attention", _Attention), ("out", _Heads), ("lse", ctypes.c_void_p)]


class _AttentionBackward(ctypes.Structure):
    _fields_ = [
        ("attention", _Attention),
        *_fields("out", "grad", kind=_Heads),
        *_fields("lse", "delta", kind=ctypes.c_void_p),
        ("deterministic", ctypes.c_int),
        ("dq_sums", ctypes.c_void_p),
        *_fields("dq", "dk", "dv", kind=_Heads),
        ("dbias", ctypes.c_void_p),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *_fields("scalar", "batch", "steps", "tokens", "dim", kind=ctypes.c_int),
        ("eps", ctypes.c_float),
        *_fields("has_gate", "has_norm", "narrow", kind=ctypes.c_int),
    ]


class _ResidualNormForward(ctypes.Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *_fields("x", "branch", kind=_Tokens),
        *_fields("gate", "shift", "scale", kind=_PerStep),
        *_fields("residual", "normal", kind=_Tokens),
    ]


class _ResidualNormBackward(ctypes.Structure):
    _fields_ = [
        ("sizes", _Sizes),
        *_fields("grad_residual", "grad_normal", "residual", "branch", kind=_Tokens),
        *_fields("gate", "scale", kind=_PerStep),
        *_fields("dx", "dbranch", kind=_Tokens),
        *_fields("partial", "dgate", "dshift", "dscale", kind=ctypes.c_void_p),
    ]


class _Gelu(ctypes.Structure):
    _fields_ = [
        *_fields("scalar", "dim", kind=ctypes.c_int),
        ("rows", ctypes.c_int64),
        *_fields("grad", "x", "bias", "out", kind=ctypes.c_void_p),
        ("parts", ctypes.c_int),
        *_fields("partial", "dbias", kind=ctypes.c_void_p),
    ]


class _TimestepEmbedding(ctypes.Structure):
    _fields_ = [
        *_fields("times", "out", kind=ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("dim", ctypes.c_int),
        *_fields("rate", "frequencies", kind=ctypes.c_float),
    ]


class _GatherRows(ctypes.Structure):
    _fields_ = [
        *_fields("from_scalar", "to_scalar", kind=ctypes.c_int),
        *_fields("store", "index", "target", "history", kind=ctypes.c_void_p),
        *_fields("count", "rows", "steps", "row", "history_steps", "history_offset", kind=ctypes.c_int64),
    ]


def _strided(kind: Any, tensor: Tensor | None, strides: int) -> Any:
    return kind() if tensor is None else kind(tensor.data_ptr(), *tensor.stride()[:strides])


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output and the memory around it: NaN everywhere, so that what is not written and what is written beside it shows."""
    size, guard = math.prod(shape), 64
    memory = torch.full((size + 2 * guard,), math.nan, dtype=dtype)
    return memory[guard : guard + size].view(shape), memory


def _narrow(stream: torch.dtype, others: torch.dtype) -> int:
    return 0 if stream == others else SCALARS[others]


class Kernels:
    """The emulated launchers on CPU tensors. Every output lies between NaNs that must survive."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def _call(self, name: str, arguments: ctypes.Structure, outputs: list[tuple[Tensor, Tensor]]) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(ctypes.byref(arguments), None)
        assert error is None, error.decode()
        for _, memory in outputs:
            assert bool(memory[:64].isnan().all()), f"{name} wrote before its output"
            assert bool(memory[-64:].isnan().all()), f"{name} wrote behind its output"

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, T: int, mask: str, window: int | None, bias: Tensor | None
    ) -> _Attention:
        B, H, queries, head_dim = q.shape
        block_mask = BlockMask(queries // T, k.shape[2] // T, T, MASKS[mask], window or 1)
        scale = 1 / math.sqrt(head_dim)
        pointer = None if bias is None else bias.data_ptr()
        heads = [_strided(_Heads, tensor, 3) for tensor in (q, k, v)]
        return _Attention(SCALARS[q.dtype], B, H, head_dim, block_mask, scale, pointer, *heads)

    def attention_forward(
        self,
        q: Tensor,  # [B, H, Sq * T, Dh]
        k: Tensor,  # [B, H, Sk * T, Dh]
        v: Tensor,  # [B, H, Sk * T, Dh]
        T: int,
        mask: str,
        window: int | None = None,
        bias: Tensor | None = None,  # [H]
    ) -> tuple[Tensor, Tensor]:
        B, H, queries, head_dim = q.shape
        out = guarded((B, queries, H, head_dim), q.dtype)
        lse = guarded((B, H, queries), torch.float32)
        result = out[0].transpose(1, 2)
        attention = self._attention(q, k, v, T, mask, window, bias)
        arguments = _AttentionForward(attention, _strided(_Heads, result, 3), lse[0].data_ptr())
        self._call("pyard_cuda_attention_forward", arguments, [out, lse])
        return result, lse[0]

    def attention_backward(
        self,
        grad: Tensor,  # [B, H, Sq * T, Dh]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        T: int,
        mask: str,
        window: int | None = None,
        bias: Tensor | None = None,
        deterministic: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        B, H, queries, head_dim = q.shape
        outputs = [guarded((B, x.shape[2], H, head_dim), q.dtype) for x in (q, k, v)]
        dq, dk, dv = (output[0].transpose(1, 2) for output in outputs)
        delta = guarded((B, H, queries), torch.float32)
        sums = torch.zeros(B, H, queries, head_dim)
        dbias = guarded((B, H, self.library.pyard_cuda_attention_key_tiles(k.shape[2] // T, T)), torch.float32)
        arguments = _AttentionBackward(
            self._attention(q, k, v, T, mask, window, bias),
            *[_strided(_Heads, tensor, 3) for tensor in (out, grad)],
            lse.data_ptr(),
            delta[0].data_ptr(),
            int(deterministic),
            None if deterministic else sums.data_ptr(),
            *[_strided(_Heads, tensor, 3) for tensor in (dq, dk, dv)],
            None if bias is None else dbias[0].data_ptr(),
        )
        self._call("pyard_cuda_attention_backward", arguments, [*outputs, delta, dbias])
        return (dq if deterministic else sums.to(q.dtype)), dk, dv, None if bias is None else dbias[0].sum((0, 2))

    def residual_norm_forward(
        self,
        x: Tensor,  # [B, S, T, D]
        gate: Tensor | None,  # [B, S, D]; with `branch` [B, S, T, D]
        branch: Tensor | None,
        shift: Tensor | None,  # [B, S, D]; with `scale` [B, S, D]
        scale: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """(residual, normal); what was not asked for stays NaN."""
        narrow = gate.dtype if gate is not None else scale.dtype if scale is not None else x.dtype
        outputs = [guarded(tuple(x.shape), dtype) for dtype in (x.dtype, narrow)]
        sizes = _Sizes(SCALARS[x.dtype], *x.shape, eps, gate is not None, scale is not None, _narrow(x.dtype, narrow))
        arguments = _ResidualNormForward(
            sizes,
            *[_strided(_Tokens, tensor, 3) for tensor in (x, branch)],
            *[_strided(_PerStep, tensor, 2) for tensor in (gate, shift, scale)],
            *[_strided(_Tokens, output, 3) for output, _ in outputs],
        )
        self._call("pyard_cuda_residual_norm_forward", arguments, outputs)
        return outputs[0][0], outputs[1][0]

    def residual_norm_backward(
        self,
        grad_residual: Tensor | None,  # [B, S, T, D]
        grad_normal: Tensor | None,
        residual: Tensor,
        gate: Tensor | None,  # [B, S, D]
        branch: Tensor | None,
        scale: Tensor | None,  # [B, S, D]
        eps: float,
    ) -> dict[str, Tensor]:
        """Gradients by name; what was not asked for stays NaN."""
        B, S, T, D = residual.shape
        dtype = residual.dtype
        shapes = {"dx": (B, S, T, D), "dbranch": (B, S, T, D), "dgate": (B, S, D), "dshift": (B, S, D), "dscale": (B, S, D)}
        narrow = gate.dtype if gate is not None else scale.dtype if scale is not None else dtype
        outputs = {name: guarded(shape, dtype if name == "dx" else narrow) for name, shape in shapes.items()}
        sums = (gate is not None) + 2 * (scale is not None)
        parts = self.library.pyard_cuda_residual_norm_parts(T)
        partial = guarded((B * S, parts, sums, D), torch.float32)
        arguments = _ResidualNormBackward(
            _Sizes(SCALARS[dtype], B, S, T, D, eps, gate is not None, scale is not None, _narrow(dtype, narrow)),
            *[_strided(_Tokens, tensor, 3) for tensor in (grad_residual, grad_normal, residual, branch)],
            *[_strided(_PerStep, tensor, 2) for tensor in (gate, scale)],
            *[_strided(_Tokens, outputs[name][0], 3) for name in ("dx", "dbranch")],
            partial[0].data_ptr(),
            *[outputs[name][0].data_ptr() for name in ("dgate", "dshift", "dscale")],
        )
        self._call("pyard_cuda_residual_norm_backward", arguments, [*outputs.values(), partial])
        return {name: output for name, (output, _) in outputs.items()}

    def gelu_forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [rows, D], [D] -> [rows, D]
        out = guarded(tuple(x.shape), x.dtype)
        pointers = x.data_ptr(), bias.data_ptr(), out[0].data_ptr()
        arguments = _Gelu(SCALARS[x.dtype], x.shape[1], x.shape[0], None, *pointers, 0, None, None)
        self._call("pyard_cuda_gelu_forward", arguments, [out])
        return out[0]

    def gelu_backward(self, grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and bias."""
        rows, dim = x.shape
        self.library.pyard_cuda_gelu_parts.argtypes = [ctypes.c_int64]
        parts = self.library.pyard_cuda_gelu_parts(rows)
        dx, dbias = guarded((rows, dim), x.dtype), guarded((dim,), x.dtype)
        partial = guarded((parts, dim), torch.float32)
        pointers = grad.data_ptr(), x.data_ptr(), bias.data_ptr(), dx[0].data_ptr()
        arguments = _Gelu(SCALARS[x.dtype], dim, rows, *pointers, parts, partial[0].data_ptr(), dbias[0].data_ptr())
        self._call("pyard_cuda_gelu_backward", arguments, [dx, dbias, partial])
        return dx[0], dbias[0]

    def timestep_embedding(self, times: Tensor, dim: int, max_period: float, freq_shift: float) -> Tensor:
        out = guarded((len(times), dim), torch.float32)
        arguments = _TimestepEmbedding(
            times.data_ptr(), out[0].data_ptr(), len(times), dim, -math.log(max_period), dim // 2 - freq_shift
        )
        self._call("pyard_cuda_timestep_embedding", arguments, [out])
        return out[0]

    def gather_trajectories(
        self,
        noise: Tensor,  # [n, row]
        steps: Tensor,  # [n, S, row]
        index: Tensor,  # [B]
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        n, S, row = steps.shape
        history, target = (guarded((len(index), S, row), dtype) for _ in range(2))
        for store, count, offset, to in ((noise, 1, 0, None), (steps, S, 1, target[0].data_ptr())):
            types = SCALARS[store.dtype], SCALARS[dtype]
            pointers = store.data_ptr(), index.data_ptr(), to, history[0].data_ptr()
            arguments = _GatherRows(*types, *pointers, len(index), n, count, row, S, offset)
            self._call("pyard_cuda_gather_rows", arguments, [history, target])
        return history[0], target[0]
