"""From sample numbers to the bytes of a shard: noise, the teacher's ODE, rounding."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors.torch
import torch

from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.teachers import Teacher
from pyard.teachers.guidance import solve
from pyard.trajectories.manifest import IMPORTED, TrajectoryManifest
from pyard.trajectories.shard import ShardRecord
from pyard.version import __version__

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def draw(manifest: TrajectoryManifest, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [B, C, ...] and condition numbers [B] of the samples first ... first + batch_size - 1."""
    indices = np.arange(first, first + manifest.batch_size)
    noise = torch.from_numpy(standard_normal(manifest.seed, indices, manifest.sample_shape))
    return noise, torch.from_numpy(manifest.number_of(indices))


def drawn_ahead(manifest: TrajectoryManifest, begins: list[int]) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """`draw` of each number in turn; the next one is drawn by a thread while the caller works on this one."""
    with ThreadPoolExecutor(1, "noise") as drawer:
        following = drawer.submit(draw, manifest, begins[0]) if begins else None
        for begin in [*begins[1:], None]:
            if following is None:
                return
            drawn = following.result()
            following = None if begin is None else drawer.submit(draw, manifest, begin)
            yield drawn


def compute_batch(
    teacher: Teacher,
    manifest: TrajectoryManifest,
    first: int,
    noise: torch.Tensor,  # [B, C, ...]
    numbers: torch.Tensor,  # [B], of the conditions
) -> dict[str, torch.Tensor]:
    """Solve the teacher's ODE for the samples first ... first + B - 1.

    Returns:
        On the CPU: `label` int64 [B]; float32 `noise` [B, C, ...] and, if kept, `state`, `denoised` [B, S, C, ...].
    """
    grid = manifest.grid
    states: list[torch.Tensor] = []  # S times [B, C, ...], x_0 last
    denoised: list[torch.Tensor] = []
    with autocast(teacher, manifest):
        for step, (state, prediction) in enumerate(trajectory(teacher, manifest, noise, numbers), start=1):
            if step in grid.state_index:
                states.append(state)
            if step in grid.denoised_index:
                denoised.append(prediction)
    denoised.append(states[-1])
    batch = {"label": numbers, "noise": noise}
    for name, steps in (("state", states), ("denoised", denoised)):
        if manifest.keep not in (name, "both"):
            continue
        stacked = torch.stack(steps, dim=1).cpu()
        if not bool(torch.isfinite(stacked).all()):
            sample = int(torch.nonzero(~torch.isfinite(stacked))[0, 0])
            raise InputError(
                f"trajectories: the teacher's {name} of sample {first + sample} (condition {int(numbers[sample])}) is not "
                "finite; the teacher is broken, or computes in a dtype too narrow for it"
            )
        batch[name] = stacked
    return batch


def warm_up(teacher: Teacher, manifest: TrajectoryManifest, noise: torch.Tensor, numbers: torch.Tensor) -> None:
    """One step of the ODE, so that what is timed next is not a GPU's or a compiler's first call."""
    with autocast(teacher, manifest):
        next(trajectory(teacher, manifest, noise, numbers))


def trajectory(
    teacher: Teacher, manifest: TrajectoryManifest, noise: torch.Tensor, numbers: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`solve` with the manifest's settings, on the teacher's device."""
    return solve(
        teacher,
        noise.to(teacher.device),
        numbers.to(teacher.device),
        manifest.grid.visits(manifest.schedule),
        cfg_scale=manifest.cfg_scale,
        cfg_channels=manifest.cfg_channels,
        cfg_interval=manifest.cfg_interval,
        solver=None if manifest.solver == IMPORTED else manifest.solver,
    )


def autocast(teacher: Teacher, manifest: TrajectoryManifest) -> contextlib.AbstractContextManager[None]:
    """What `precision` asks for; the solver itself stays in float32."""
    # Weights that are in bfloat16 already compute in it as their pipeline does.
    enabled = manifest.precision == "bfloat16" and getattr(teacher, "precision", "float32") == "float32"
    return torch.autocast(teacher.device.type, torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def compiled(teacher: Teacher, wanted: bool) -> Iterator[None]:
    """Compile the teacher's network for the duration, with CUDA graphs where it runs on a GPU."""
    network = getattr(teacher, "network", None)
    if wanted and not isinstance(network, torch.nn.Module):
        raise InputError(f"trajectories: compile=True needs a teacher with a network, found a {type(teacher).__name__}")
    if not wanted or network is None:
        yield
        return
    plain = network._compiled_call_impl
    network.compile(mode="reduce-overhead" if teacher.device.type == "cuda" else "default")
    try:
        yield
    finally:
        network._compiled_call_impl = plain


def pack_shard(
    tensors: dict[str, torch.Tensor], manifest: TrajectoryManifest, first: int, device: str
) -> tuple[bytes, ShardRecord]:
    """Round the tensors of a shard to the manifest's dtype and serialize them.

    Returns:
        The bytes of the safetensors file and its sidecar.
    """
    dtype = _TORCH_DTYPES[manifest.dtype]
    stored = dict(tensors)
    rounding = {}
    for name in stored.keys() & {"state", "denoised"}:
        exact = tensors[name]
        stored[name] = exact.to(dtype)
        if not bool(torch.isfinite(stored[name]).all()):
            raise InputError(
                f"trajectories: {name} reaches {float(exact.abs().max()):.3g}, more than {manifest.dtype} holds; "
                "use dtype=bfloat16"
            )
        if dtype != torch.float32:
            error = stored[name].double() - exact.double()
            rounding[name] = {"rms": float(error.square().mean().sqrt()), "max": float(error.abs().max())}
    # One key only: safetensors writes several in an order that changes from run to run.
    about = json.dumps({"first": first, "manifest": manifest.digest}, sort_keys=True)
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in stored.items()}, {"pyard": about})
    record = ShardRecord(
        first=first,
        count=len(tensors["label"]),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        manifest=manifest.digest,
        rounding=dict(sorted(rounding.items())),
        written_by={"pyard": __version__, "torch": torch.__version__, "device": device},
    )
    return content, record


def device_name(device: torch.device) -> str:
    """What computed the states, as far as their last bits may depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {platform.machine()} {capability}, {torch.get_num_threads()} threads"
