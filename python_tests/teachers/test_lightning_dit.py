"""LightningDiT, and REPA with QK norm, against an independent network in plain float64 formulas."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error
from torch.nn import functional as F

import pyard
from pyard.cli.command_line import main
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.models.lightning_dit.network import LightningDiT
from pyard.models.student import Student
from pyard.sampling.draw import sample
from pyard.teachers.guidance import solve
from pyard.trajectories import generate_trajectories

# D, H, Dh, side, C, hidden units of the MLP, L
WIDTH, HEADS, SIZE, SIDE, CHANNELS, UNITS, DEPTH = 32, 4, 8, 4, 32, 84, 3
LABELS = torch.tensor([1, 4])
EVERYTHING = dict(rms=True, qk="", swiglu=True, rope=True, shift=True)


def lightning_tensors(*, rms: bool, qk: str, swiglu: bool, rope: bool, shift: bool, patch: int = 1) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights, none of them zero, with the names of LightningDiT's code."""
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int, by: float = 0.15) -> torch.Tensor:
        return by * torch.randn(shape, generator=random)

    tensors = {
        "x_embedder.proj.weight": draw(WIDTH, CHANNELS, patch, patch),
        "x_embedder.proj.bias": draw(WIDTH),
        "pos_embed": draw(1, SIDE**2, WIDTH, by=1.0),
        "y_embedder.embedding_table.weight": draw(6, WIDTH),
        "final_layer.linear.weight": draw(CHANNELS * patch**2, WIDTH),
        "final_layer.linear.bias": draw(CHANNELS * patch**2),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = draw(rows, columns), draw(rows)

    linear("t_embedder.mlp.0", WIDTH, 256)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    if rms:
        tensors["final_layer.norm_final.weight"] = 1 + draw(WIDTH)
    for i in range(DEPTH):
        block = f"blocks.{i}."
        linear(block + "adaLN_modulation.1", (6 if shift else 4) * WIDTH, WIDTH)
        linear(block + "attn.qkv", 3 * WIDTH, WIDTH)
        linear(block + "attn.proj", WIDTH, WIDTH)
        linear(block + ("mlp.w12" if swiglu else "mlp.fc1"), UNITS * (2 if swiglu else 1), WIDTH)
        linear(block + ("mlp.w3" if swiglu else "mlp.fc2"), WIDTH, UNITS)
        for name in ("norm1", "norm2") if rms else ():
            tensors[f"{block}{name}.weight"] = 1 + draw(WIDTH)
        for name in ("q_norm", "k_norm") if qk else ():
            tensors[f"{block}attn.{name}.weight"] = 1 + draw(SIZE)
            if qk == "layer":
                tensors[f"{block}attn.{name}.bias"] = draw(SIZE)
    if rope:
        angle = torch.tensor(angles()).float()
        tensors |= {"feat_rope.freqs_cos": angle.cos(), "feat_rope.freqs_sin": angle.sin()}
    return tensors


def angles() -> list[list[float]]:
    """Of token (row, column), for each number of a head: the row in the first half of the numbers, the column in the second."""
    frequencies = [10000.0 ** (-2 * (j // 2) / (SIZE // 2)) for j in range(SIZE // 2)]
    return [[p * f for p in (row, column) for f in frequencies] for row in range(SIDE) for column in range(SIDE)]


def independent(w: dict[str, torch.Tensor], x: torch.Tensor, t: float, labels: torch.Tensor, patch: int = 1) -> torch.Tensor:
    """LightningDiT in float64, token by token where it turns, at its own time t: 0 noise, 1 data."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name: str, value: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        weight, bias = w.get(name + ".weight"), w.get(name + ".bias")
        if weight is not None and bias is None:
            return value / (value.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        centred = value - value.mean(-1, keepdim=True)
        value = centred / (centred.square().mean(-1, keepdim=True) + (1e-5 if bias is not None else eps)).sqrt()
        return value if weight is None or bias is None else value * weight + bias

    def turned(value: torch.Tensor) -> torch.Tensor:  # [B, H, T, Dh]
        if "feat_rope.freqs_cos" not in w:
            return value
        result = torch.empty_like(value)
        for token, angle in enumerate(torch.tensor(angles(), dtype=torch.float64)):
            for j in range(0, SIZE, 2):
                a, b, c, s = value[..., token, j], value[..., token, j + 1], angle[j].cos(), angle[j].sin()
                result[..., token, j], result[..., token, j + 1] = a * c - b * s, a * s + b * c
        return result

    batch = len(x)
    h = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    h = h + w["pos_embed"]
    angle = t * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    vector = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()]))))
    vector = F.silu(vector + w["y_embedder.embedding_table.weight"][labels])
    for i in range(DEPTH):
        block = f"blocks.{i}."
        parts = linear(block + "adaLN_modulation.1", vector)[:, None].split(WIDTH, dim=-1)
        zero = torch.zeros(())
        s1, c1, g1, s2, c2, g2 = parts if len(parts) == 6 else (zero, parts[0], parts[1], zero, parts[2], parts[3])
        y = norm(block + "norm1", h) * (1 + c1) + s1
        q, k, v = linear(block + "attn.qkv", y).view(batch, -1, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        if block + "attn.q_norm.weight" in w:
            q, k = norm(block + "attn.q_norm", q), norm(block + "attn.k_norm", k)
        logits = turned(q) @ turned(k).transpose(-1, -2) / SIZE**0.5
        h = h + g1 * linear(block + "attn.proj", (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, -1, WIDTH))
        y = norm(block + "norm2", h) * (1 + c2) + s2
        if block + "mlp.w12.weight" in w:
            gate, value = linear(block + "mlp.w12", y).split(UNITS, dim=-1)
            h = h + g2 * linear(block + "mlp.w3", gate * torch.sigmoid(gate) * value)
        else:
            h = h + g2 * linear(block + "mlp.fc2", F.gelu(linear(block + "mlp.fc1", y), approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", vector)[:, None].split(WIDTH, dim=-1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", h) * (1 + scale) + shift)
    out = out.view(batch, SIDE, SIDE, patch, patch, CHANNELS)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(batch, CHANNELS, SIDE * patch, SIDE * patch)


def saved(
    folder: Path, tensors: dict[str, torch.Tensor], name: str = "lightningdit-xl-imagenet256-64ep.pt", **more: Any
) -> Path:
    file = folder / name
    torch.save({"ema": {f"module.{key}": tensor for key, tensor in tensors.items()}, **more}, file)
    return file


@pytest.mark.parametrize(
    "kind",
    [
        EVERYTHING, {**EVERYTHING, "qk": "rms"}, {**EVERYTHING, "shift": False}, {**EVERYTHING, "rope": False, "patch": 2},
        dict(rms=False, qk="layer", swiglu=True, rope=True, shift=True),
        dict(rms=False, qk="", swiglu=False, rope=False, shift=False),
    ],
    ids=str,
)  # fmt: skip
@torch.inference_mode()
def test_it_predicts_what_the_independent_network_predicts(kind, tmp_path: Path):
    tensors, patch = lightning_tensors(**kind), kind.get("patch", 1)
    known = None if kind["rope"] or kind["qk"] else HEADS  # a head's size is in the tensors of both
    teacher = pyard.load_teacher(saved(tmp_path, tensors), num_heads=known)
    assert isinstance(teacher.network.trunk, LightningDiT)
    assert (teacher.sample_shape, teacher.num_classes) == ((CHANNELS, SIDE * patch, SIDE * patch), 5)
    assert teacher.network.config.num_heads == HEADS
    x = torch.randn(2, *teacher.sample_shape)
    for t in (0.0, 0.3, 0.9):
        output = -independent(tensors, x, t, LABELS, patch)  # towards noise, as pyard's velocity points
        assert relative_error(teacher.predict(x, 1 - t, LABELS), output) < 1e-5, t
    null = -independent(tensors, x, 0.5, torch.tensor([5, 5]), patch)
    assert relative_error(teacher.predict(x, 0.5, teacher.conditions.null(LABELS)), null) < 1e-5


@torch.inference_mode()
def test_it_is_walked_along_its_own_shifted_times(tmp_path: Path):
    settings = {
        "data": {"num_classes": 5}, "transport": {"path_type": "Linear", "prediction": "velocity"},
        "sample": {"timestep_shift": 0.3, "mode": "ODE"},
    }  # fmt: skip
    tensors = lightning_tensors(**EVERYTHING)
    teacher = pyard.load_teacher(saved(tmp_path, tensors, "0800000.pt", config=settings))
    noise = torch.randn(2, *teacher.sample_shape)
    times = [0.3 * k / 8 / (1 - 0.7 * k / 8) for k in range(9)]
    x = noise.double()
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * independent(tensors, x, now, LABELS)
    assert relative_error([*solve(teacher, noise, LABELS, 8)][-1][0], x) < 1e-4
    for section, wrong in (("transport", {"prediction": "v"}), ("data", {"num_classes": 9})):
        with pytest.raises(InputError, match=next(iter(wrong))):
            pyard.load_teacher(saved(tmp_path, tensors, "0800000.pt", config={**settings, section: wrong}))


@torch.inference_mode()
def test_repa_with_qk_norm_counts_as_repa_does(tmp_path: Path):
    tensors = lightning_tensors(rms=False, qk="layer", swiglu=False, rope=False, shift=True, patch=2)
    tensors |= {"projectors.0.0.weight": torch.randn(8, WIDTH), "projectors.0.0.bias": torch.randn(8)}
    teacher = pyard.load_teacher(saved(tmp_path, tensors, "0400000.pt"))
    x = torch.randn(2, *teacher.sample_shape)
    right = independent(tensors, x, 0.3, LABELS, 2)
    assert relative_error(teacher.predict(x, 0.3, LABELS), right) < 1e-5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path, lightning_tensors(**{**EVERYTHING, "qk": "rms"}))


@pytest.mark.slow
def test_a_student_of_it_is_trained_drawn_and_exported(file: Path, tmp_path: Path):
    assert main(["convert", str(file), "--out", str(tmp_path / "teacher")]) == 0
    teacher = pyard.load_teacher(tmp_path / "teacher")
    assert teacher.fingerprint == pyard.load_teacher(file).fingerprint
    store = generate_trajectories(teacher, tmp_path / "store", 8, num_steps=2, teacher_steps=4, batch_size=4, progress=False)
    settings: dict[str, Any] = dict(max_steps=2, batch_size=4, progress=False, history_layers=2, learning_rate=1e-3)
    for more in ({}, {"lora_rank": 2}):
        out = tmp_path / f"run{len(more)}"
        student = pyard.train(teacher, store, out=out, **settings, **more)
        again = Student.from_pretrained(out)
        noise, labels = torch.randn(2, *teacher.sample_shape), torch.tensor([1, 3])
        with torch.inference_mode():
            whole = student.rollout(noise, labels)
            *_, last = again.rollout(noise, labels)
        assert torch.equal(last, [*whole][-1])
    assert sample(tmp_path / "run0", [1, 2]).shape == (2, CHANNELS, SIDE, SIDE)
    assert main(["export", "--student", str(tmp_path / "run0"), "--onnx", str(tmp_path / "s.onnx")]) == 0


@torch.inference_mode()
def test_parallel_pass_and_cached_rollout_are_equal(file: Path):
    teacher = pyard.load_teacher(file)
    grid = TimeGrid.build(teacher.schedule, 3, 6)
    student = Student.from_teacher(teacher, grid, history_layers=2, history_bias=-0.5, target="state").double().eval()
    for head in student.heads.parameters():
        head.add_(0.05 * torch.randn_like(head))
    noise, labels = torch.randn(2, *teacher.sample_shape, dtype=torch.float64), LABELS
    cached = torch.stack([*student.rollout(noise, labels)], dim=1)
    history = torch.cat([noise[:, None], cached[:, :-1]], dim=1)
    torch.testing.assert_close(student(history, labels), cached, rtol=1e-9, atol=1e-9)


def test_the_latent_statistics_beside_it_are_read(file: Path):
    mean, std = torch.randn(1, CHANNELS, 1, 1), torch.rand(1, CHANNELS, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, file.with_name("latents_stats.pt"))
    statistics = pyard.load_teacher(file).latent_statistics
    assert statistics is not None
    assert statistics.mean == pytest.approx(mean.flatten().tolist())
    assert statistics.std == pytest.approx(std.flatten().tolist())
    torch.save({"mean": mean[:, :3], "std": std[:, :3]}, file.with_name("latents_stats.pt"))
    with pytest.raises(InputError, match=r"latents_stats.pt.*32 channels"):
        pyard.load_teacher(file)
    file.with_name("latents_stats.pt").write_text("<html>")
    with pytest.raises(InputError, match=r"latents_stats.pt.*mean and std"):
        pyard.load_teacher(file)


@pytest.mark.parametrize(("change", "message"), [
    ({"feat_rope.freqs_cos": torch.zeros(16, 8)}, "freqs_cos is not the rotation by row and column"),
    ({"feat_rope.freqs_sin": None}, "freqs_sin is not the rotation"),
    ({"blocks.1.mlp.w3.weight": torch.zeros(WIDTH, 3)}, "do not match"),
    ({"blocks.0.mlp.w12.weight": None}, "do not match|no tensor"),
    ({"blocks.0.adaLN_modulation.1.weight": torch.zeros(5 * WIDTH, WIDTH)}, "expected 4 or 6 times 32"),
    ({"blocks.2.norm1.weight": None}, "do not match"),
    ({"blocks.1.extra.weight": torch.zeros(3)}, "do not match"),
    ({"s_embedder.proj.weight": torch.zeros(3)}, "is DDT"),
])  # fmt: skip
def test_other_networks_are_refused_in_one_line(change, message, tmp_path: Path):
    tensors = {**lightning_tensors(**EVERYTHING), **change}
    with pytest.raises(InputError, match=message) as refused:
        pyard.load_teacher(saved(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}))
    assert "\n" not in str(refused.value)


def test_heads_that_contradict_the_tensors_are_refused(file: Path):
    with pytest.raises(InputError, match="are 4, but num_heads is 8"):
        pyard.load_teacher(file, num_heads=8)
    with pytest.raises(InputError, match="is of the family 'lightningdit'; found family='sit'"):
        pyard.load_teacher(file, family="sit")
