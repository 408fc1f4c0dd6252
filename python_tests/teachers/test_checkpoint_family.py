"""SiT's, REPA's and REPA-E's checkpoints against an independent network and their papers' own paths, and what is refused."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from factories import dit_tensors
from golden import relative_error
from torch.nn import functional as F

import pyard
from pyard.errors import InputError
from pyard.teachers.guidance import solve
from pyard.teachers.latent_statistics import LatentStatistics

T = dit_tensors()
LABELS = torch.tensor([1, 4])


def independent(tensors, x, t, labels):  # [B, 2, 8, 8], float, [B] -> [B, 2, 8, 8]
    """SiT's network in plain float64 formulas, from its tensors: width 32, 2 heads, patch 2 (Ma et al. 2024)."""
    w = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(name, value):
        return F.linear(value, w[name + ".weight"], w[name + ".bias"])

    def norm(value, shift, scale):
        value = (value - value.mean(-1, keepdim=True)) / (value.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return value * (1 + scale) + shift

    batch = len(x)
    h = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    h = h + w["pos_embed"]
    angle = t * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    vector = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()]))))
    vector = F.silu(vector + w["y_embedder.embedding_table.weight"][labels])
    for i in range(3):
        s1, c1, g1, s2, c2, g2 = linear(f"blocks.{i}.adaLN_modulation.1", vector)[:, None].chunk(6, dim=-1)
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(h, s1, c1)).view(batch, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        seen = ((q @ k.transpose(-1, -2)) / 4).softmax(-1) @ v
        h = h + g1 * linear(f"blocks.{i}.attn.proj", seen.transpose(1, 2).reshape(batch, 16, 32))
        h = h + g2 * linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h, s2, c2)), approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", vector)[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", norm(h, shift, scale)).view(batch, 4, 4, 2, 2, -1)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(batch, -1, 8, 8)[:, :2]


def path(kind, t):
    """SiT's (alpha, sigma, alpha', sigma') at its time t, 0 noise, 1 data, the derivatives by a central difference."""

    def at(t):
        if kind == "Linear":
            return t, 1 - t
        if kind == "GVP":
            return math.sin(t * math.pi / 2), math.cos(t * math.pi / 2)
        alpha = math.exp(-0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t))
        return alpha, math.sqrt(1 - alpha**2)

    ahead, behind, step = at(t + 1e-6), at(t - 1e-6), 2e-6
    return (*at(t), (ahead[0] - behind[0]) / step, (ahead[1] - behind[1]) / step)


def denoised(kind, prediction, output, x, t):
    """x_0 by solving x = alpha x_0 + sigma eps for what the network says."""
    alpha, sigma, alpha_slope, sigma_slope = path(kind, t)
    if prediction == "noise":
        return (x - sigma * output) / alpha
    if prediction == "score":
        return (x + sigma**2 * output) / alpha
    matrix = torch.tensor([[alpha, sigma], [alpha_slope, sigma_slope]], dtype=torch.float64)
    both = torch.stack([x, output]).flatten(1)
    return torch.linalg.solve(matrix, both)[0].view_as(x)


def saved(tmp_path: Path, tensors=T, **args: object) -> Path:
    file = tmp_path / "0100000.pt"
    torch.save({"model": tensors, "ema": tensors, "args": argparse.Namespace(**args)}, file)
    return file


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("kind", ["Linear", "GVP", "VP"])
@torch.inference_mode()
def test_sit_is_read_with_the_path_and_prediction_of_its_settings(kind, prediction, tmp_path: Path):
    file = saved(tmp_path, model="SiT-S/2", num_classes=5, path_type=kind, prediction=prediction, sample_eps=None)
    teacher = pyard.load_teacher(file, num_heads=2)
    schedule = teacher.schedule
    for t in (0.1, 0.5, 0.9):
        x = torch.randn(2, 2, 8, 8)
        output = teacher.predict(x, 1 - t, LABELS).double()
        p, q, r, s = schedule.output_map(1 - t)
        right = denoised(kind, prediction, independent(T, x, t, LABELS), x.double(), t)
        assert relative_error(p * x + q * output, right) < 1e-4, t
        alpha, sigma, *_ = path(kind, t)
        assert relative_error(r * x + s * output, (x - alpha * right) / sigma) < 1e-4, t
    assert schedule.start == (0.999 if prediction != "velocity" and kind != "VP" else 1)
    assert schedule.timesteps(4)[0] == pytest.approx(schedule.start)


@torch.inference_mode()
def test_the_trajectory_of_a_curved_path_approaches_sits_ode(tmp_path: Path):
    teacher = pyard.load_teacher(saved(tmp_path, model="SiT-S/2", path_type="GVP", prediction="velocity"), num_heads=2)
    noise = torch.randn(2, 2, 8, 8)
    x, steps = noise.double(), 400
    for k in range(steps):  # SiT's own midpoint steps from noise at 0
        half = x + independent(T, x, k / steps, LABELS) / (2 * steps)
        x = x + independent(T, half, (k + 0.5) / steps, LABELS) / steps
    errors = [relative_error([*solve(teacher, noise, LABELS, n)][-1][0], x) for n in (10, 20, 80)]
    assert errors[2] < 0.2 * errors[0]  # first order
    assert errors[2] < 0.02


REPA_TENSORS = {**T, "projectors.0.0.weight": torch.randn(8, 32), "projectors.0.0.bias": torch.randn(8)}


@pytest.mark.parametrize(("tensors", "args"), [
    (T, dict(model="SiT-XL/2", path_type="linear", prediction="v", proj_coeff=0.5, enc_type="dinov2-vit-b")),
    (REPA_TENSORS, {}),
])  # fmt: skip
@torch.inference_mode()
def test_repa_counts_from_data_to_noise(tensors, args, tmp_path: Path):
    teacher = pyard.load_teacher(saved(tmp_path, tensors, **args), num_heads=2)
    noise = torch.randn(2, 2, 8, 8)
    x = noise.double()
    for k in range(8):  # REPA's Euler sampler: from t = 1, noise, against v = noise - data
        x = x - independent(T, x, 1 - k / 8, LABELS) / 8
    assert relative_error([*solve(teacher, noise, LABELS, 8)][-1][0], x) < 1e-5
    with pytest.raises(InputError, match="is of the family 'repa'; found family='sit'"):
        pyard.load_teacher(tmp_path / "0100000.pt", num_heads=2, family="sit")


@torch.inference_mode()
def test_repa_with_a_cosine_path_is_gvp_the_other_way(tmp_path: Path):
    teacher = pyard.load_teacher(saved(tmp_path, REPA_TENSORS, path_type="cosine", prediction="v"), num_heads=2)
    x, t = torch.randn(2, 2, 8, 8), 0.3
    p, q, _, _ = teacher.schedule.output_map(t)
    # x = cos x_0 + sin eps, v = pi/2 (-sin x_0 + cos eps); its time is ours.
    v = independent(T, x, t, LABELS)
    right = math.cos(math.pi / 2 * t) * x - math.sin(math.pi / 2 * t) * v * 2 / math.pi
    assert relative_error(p * x + q * teacher.predict(x, t, LABELS), right) < 1e-5


class _Vae(dict):
    def register_to_config(self, **settings):
        self.update(settings)


def test_repa_e_brings_the_statistics_of_its_latents(tmp_path: Path):
    mean, variance = torch.tensor([0.5, -1.0]), torch.tensor([4.0, 0.25])
    statistics = {"bn.running_mean": mean, "bn.running_var": variance, "bn.num_batches_tracked": torch.tensor(3)}
    torch.save({"ema": {**REPA_TENSORS, **statistics}, "vae": {"encoder.weight": mean}}, tmp_path / "0400000.pt")
    teacher = pyard.load_teacher(tmp_path / "0400000.pt", num_heads=2)
    assert teacher.latent_statistics == LatentStatistics((0.5, -1.0), (2.0, 0.5))
    teacher.save_pretrained(tmp_path / "teacher")
    again = pyard.load_teacher(tmp_path / "teacher")
    assert again.latent_statistics == teacher.latent_statistics
    assert again.fingerprint == teacher.fingerprint
    vae = again.latent_statistics.on(_Vae(scaling_factor=0.18215, shift_factor=0.1))
    assert vae == dict(latents_mean=[0.5, -1.0], latents_std=[2.0, 0.5], scaling_factor=1.0, shift_factor=None)
    broken = {**REPA_TENSORS, **statistics, "bn.running_var": torch.tensor([1.0, -1.0])}
    torch.save({"ema": broken}, tmp_path / "broken.pt")
    with pytest.raises(InputError, match=r"bn\.running_var is not a variance of 2 channels"):
        pyard.load_teacher(tmp_path / "broken.pt", num_heads=2)


@pytest.mark.parametrize(("args", "message"), [
    (dict(model="SiT-S/2", path_type="Cosine"), "path_type='Cosine'; expected one of 'Linear', 'GVP', 'VP'"),
    (dict(model="SiT-S/2", prediction="x"), r"prediction='x'; expected one of .*, or in Python load_teacher\(…, schedule="),
    (dict(model="SiT-S/2", enc_type="x", prediction="velocity"), "prediction='velocity'; expected one of 'v'"),
    (dict(model="DiT-S/2", noise_schedule="cosine"), "noise_schedule='cosine'"),
])  # fmt: skip
def test_settings_that_pyard_does_not_know_are_refused(args, message, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        pyard.load_teacher(saved(tmp_path, **args), num_heads=2)


@pytest.mark.parametrize(("extra", "message"), [
    ("s_embedder.proj.weight", "DDT or a DiT-DH of RAE"),
    ("sideblocks.0.norm1.weight", "MDT or MDTv2"),
    ("en_inblocks.0.attn.qkv.weight", "MDT or MDTv2"),
])  # fmt: skip
def test_other_networks_are_refused_by_name(extra, message, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        pyard.load_teacher(saved(tmp_path, {**T, extra: torch.zeros(2)}, model="SiT-S/2"), num_heads=2)


@pytest.mark.parametrize("kind", ["GVP", "VP"])
def test_a_student_learns_from_a_curved_path(kind, tmp_path: Path):
    teacher = pyard.load_teacher(saved(tmp_path, model="SiT-S/2", path_type=kind, prediction="noise"), num_heads=2)
    settings = dict(num_steps=2, teacher_steps=4, num_trajectories=8, max_steps=1, batch_size=4, history_layers=1)
    student = pyard.train(
        teacher, out=tmp_path / "run", target="state", output="jump", progress=False, trackers="none", **settings
    )
    assert student.config.schedule == teacher.schedule
    assert pyard.Student.from_pretrained(tmp_path / "run").config.schedule.path == kind.lower()
    assert torch.isfinite(pyard.sample(student, [1, 2], seed=0)).all()
