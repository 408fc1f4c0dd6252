"""The writer: what is written is the teacher's ODE, and nothing that happens to the process changes a byte of it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from factories import tiny_teacher
from trajectories.gaussian import SPREAD, GaussianTeacher, contents, write

from pyard import TimeGrid
from pyard.conditions import Condition
from pyard.diffusion.noise import standard_normal, uniform_labels
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.storage.units import format_bytes, format_seconds
from pyard.trajectories import TrajectoryStore
from pyard.trajectories.generate import MAX_SHARD_BYTES, default_shard_size
from pyard.trajectories.store import write_shard


def load(store: TrajectoryStore) -> dict[str, np.ndarray]:
    """The whole store, read by safetensors' own library."""
    shards = [safetensors.numpy.load_file(store.path / "shards" / f"{shard.name}.safetensors") for shard in store.shards]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def ddim_by_hand(noise: np.ndarray, mean: np.ndarray, num_steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """States and denoised predictions of DDIM on Gaussian data, in float64 from the posterior mean."""
    schedule = NoiseSchedule()
    levels = [round(level) for level in np.linspace(999, 0, num_steps)]
    alphas = [*np.sqrt(schedule.alphas_cumprod[levels]), 1.0]
    x, states, predictions = noise.astype(np.float64), [], []
    for alpha, next_alpha in itertools.pairwise(alphas):
        sigma, next_sigma = np.sqrt(1 - alpha**2), np.sqrt(1 - next_alpha**2)
        denoised = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * mean)
        x = next_alpha * denoised + next_sigma * (x - alpha * denoised) / sigma
        states.append(x)
        predictions.append(denoised)
    return states, predictions


def test_shards_hold_the_teachers_ode_at_the_places_of_the_grid(tmp_path: Path) -> None:
    grid = TimeGrid.build(NoiseSchedule(), 3, 7, state_index=(0, 2, 3, 7), denoised_index=(4, 6))
    store = write(tmp_path, 21, grid=grid, cfg_scale=1.0)
    tensors = load(store)
    indices = np.arange(21)
    assert np.array_equal(tensors["noise"], standard_normal(7, indices, (1, 4, 4)))
    assert np.array_equal(tensors["label"], uniform_labels(7, indices, 3))
    mean = (tensors["label"] + 1.0).reshape(-1, 1, 1, 1) / 3
    states, predictions = ddim_by_hand(tensors["noise"], mean, 7)
    expected_states = np.stack([states[1], states[2], states[6]], axis=1)
    expected_denoised = np.stack([predictions[3], predictions[5], states[6]], axis=1)
    np.testing.assert_allclose(tensors["state"], expected_states, atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(tensors["denoised"], expected_denoised, atol=2e-5, rtol=1e-4)
    assert store.manifest.grid == grid
    assert store.count == 21
    assert store.missing() == []
    store.verify()


def test_guidance_moves_the_mean_away_from_no_class(tmp_path: Path) -> None:
    plain = load(write(tmp_path / "plain", cfg_scale=1.0))["state"][:, -1]
    guided = load(write(tmp_path / "guided", cfg_scale=3.0))["state"][:, -1]
    assert (guided - plain).min() > 0.1  # every class mean is positive, the one of no class is 0


def test_cfg_channels_guides_only_the_first(tmp_path: Path) -> None:
    two = {"teacher": GaussianTeacher(shape=(2, 3, 3))}
    plain = load(write(tmp_path / "plain", cfg_scale=1.0, **two))["state"]
    first = load(write(tmp_path / "first", cfg_scale=3.0, cfg_channels=1, **two))["state"]
    assert np.allclose(first[:, :, 1], plain[:, :, 1])
    assert not np.allclose(first[:, :, 0], plain[:, :, 0], atol=0.05)


@pytest.mark.parametrize("keep", ["state", "denoised", "both"])
def test_keep_chooses_the_tensors(tmp_path: Path, keep: str) -> None:
    tensors = load(write(tmp_path, keep=keep))
    kept = {"state", "denoised"} if keep == "both" else {keep}
    assert set(tensors) == {"noise", "label"} | kept


def test_labels_uniform_balanced_or_given(tmp_path: Path) -> None:
    assert load(write(tmp_path / "b", labels="balanced"))["label"].tolist() == [i % 3 for i in range(20)]
    store = write(tmp_path / "g", labels=[2, 0, 0, 1, 2])
    assert load(store)["label"].tolist() == [2, 0, 0, 1, 2] * 4
    assert TrajectoryStore.open(tmp_path / "g").manifest.labels == (2, 0, 0, 1, 2)
    with pytest.raises(InputError, match=r"label 3 \(2 of 3 are wrong\); the teacher's classes are 0 to 2"):
        write(tmp_path / "wrong", labels=[0, 3, -1])
    with pytest.raises(InputError, match="expected one of uniform, balanced, or a list of whole numbers"):
        write(tmp_path / "wrong", labels="evenly")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_narrow_dtypes_round_all_but_the_noise_and_say_by_how_much(tmp_path: Path, dtype: str, bits: int) -> None:
    exact = load(write(tmp_path / "float32"))
    store = write(tmp_path / dtype, dtype=dtype)
    for shard in store.shards:
        stored = safetensors.torch.load_file(store.path / "shards" / f"{shard.name}.safetensors")
        assert np.array_equal(stored["noise"].numpy(), exact["noise"][shard.first : shard.end])
        for name in ("state", "denoised"):
            assert stored[name].dtype == getattr(torch, dtype)
            wanted = exact[name][shard.first : shard.end].astype(np.float64)
            error = np.abs(stored[name].double().numpy() - wanted)
            assert np.all(error <= np.abs(wanted) * 2.0**-bits + 1e-7)
            assert error.max() > 0
            assert shard.rounding[name]["max"] == pytest.approx(error.max())
            assert shard.rounding[name]["rms"] == pytest.approx(np.sqrt(np.mean(error**2)))
    store.verify()


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reaches \S+e\+0\d, more than float16 holds; use dtype=bfloat16"):
        write(tmp_path, dtype="float16", cfg_scale=1e6)


def test_a_teacher_that_explodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"state of sample 0 \(condition \d\) is not finite"):
        write(tmp_path, teacher=GaussianTeacher(explode_from=500.0))


def test_resume_computes_nothing_twice_and_extension_appends(tmp_path: Path) -> None:
    teacher = GaussianTeacher()
    write(tmp_path / "store", 20, teacher, cfg_scale=1.0)
    before = contents(tmp_path / "store")
    done = teacher.samples_computed
    write(tmp_path / "store", 20, teacher, cfg_scale=1.0)
    write(tmp_path / "store", 5, teacher, cfg_scale=1.0)
    assert teacher.samples_computed == done
    assert contents(tmp_path / "store") == before

    store = write(tmp_path / "store", 41, teacher, cfg_scale=1.0)
    # Only the partial shard 16 ... 19 is computed again; a last batch of one sample is computed whole.
    assert teacher.samples_computed - done == 6 * (44 - 16)
    assert (store.count, store.requested_count) == (41, 41)
    write(tmp_path / "at once", 41, cfg_scale=1.0)
    assert contents(tmp_path / "store") == contents(tmp_path / "at once")


def test_a_networks_last_bits_do_not_depend_on_when_a_sample_was_asked_for(tmp_path: Path) -> None:
    # Matrix products round differently for other batch sizes, unlike the Gaussian teacher's elementwise formulas.
    settings: dict = dict(teacher=tiny_teacher(), batch_size=8, shard_size=8)
    at_once = load(write(tmp_path / "at once", 21, **settings))
    for count in (1, 9, 21):
        appended = load(write(tmp_path / "store", count, **settings))
        assert all(np.array_equal(appended[name], at_once[name][:count]) for name in at_once)
    assert contents(tmp_path / "store") == contents(tmp_path / "at once")


def test_defaults_of_batch_and_shard_size_are_taken_from_the_store(tmp_path: Path) -> None:
    write(tmp_path, 20)
    store = write(tmp_path, 30, batch_size=None, shard_size=None)
    assert (store.manifest.batch_size, store.manifest.shard_size, store.count) == (4, 8, 30)


def test_default_shard_is_whole_batches_within_bounds(tmp_path: Path) -> None:
    store = write(tmp_path / "small", 3, batch_size=100, shard_size=None)
    assert store.manifest.shard_size == 1000
    large = GaussianTeacher(shape=(16, 128, 128))  # 1 MiB of noise, 7 MiB in all with S = 3
    manifest = write(tmp_path / "large", 1, large, batch_size=1, shard_size=1, cfg_scale=1.0).manifest
    assert manifest.sample_bytes == 7 * 2**20 + 8
    assert default_shard_size(manifest) == MAX_SHARD_BYTES // manifest.sample_bytes == 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg_scale": 2.0}, r"cfg_scale is 1\.5, requested 2\.0"),
        ({"cfg_channels": 1}, "cfg_channels is None, requested 1"),
        ({"num_steps": 2}, r"grid\.state_index is \[0, 2, 4, 6\], requested \[0, 3, 6\]"),
        ({"teacher_steps": 9}, r"grid\.state_index is \[0, 2, 4, 6\], requested \[0, 3, 6, 9\]"),
        ({"seed": 8}, "seed is 7, requested 8"),
        ({"keep": "state"}, "keep is 'both', requested 'state'"),
        ({"cfg_interval": (0, 500)}, r"cfg_interval is None, requested \(0\.0, 500\.0\)"),
        ({"precision": "bfloat16"}, "precision is 'float32', requested 'bfloat16'"),
        ({"dtype": "bfloat16"}, "dtype is 'float32', requested 'bfloat16'"),
        ({"labels": "balanced"}, "labels is 'uniform', requested 'balanced'"),
        ({"batch_size": 2}, "batch_size is 4, requested 2"),
        ({"shard_size": 16}, "shard_size is 8, requested 16"),
        ({"teacher": GaussianTeacher(fingerprint="other")}, "teacher_fingerprint is 'gaussian', requested 'other'"),
        ({"teacher": GaussianTeacher(shape=(2, 4, 4))}, r"sample_shape is \(1, 4, 4\), requested \(2, 4, 4\)"),
    ],
)
def test_another_stores_folder_is_refused_naming_both_sides(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=message):
        write(tmp_path, **{"count": 40, **change})
    assert contents(tmp_path) == before


def test_another_embed_times_is_no_other_store(tmp_path: Path) -> None:
    grid = TimeGrid.build(NoiseSchedule(), 3, 6)
    write(tmp_path, grid=grid)
    assert write(tmp_path, 24, grid=grid.for_target("state")).manifest.grid == grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0; expected at least 1"),
        ({"keep": "all"}, "keep is 'all'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": -4}, "batch_size is -4"),
        ({"shard_size": 9}, "shard_size is 9; expected a multiple of batch_size, 4"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"cfg_interval": (500, 100)}, r"cfg_interval is \(500\.0, 100\.0\); expected \(lowest, highest\)"),
        ({"precision": "float16"}, "precision is 'float16'"),
        ({"solver": "heun"}, "solver 'heun' does not go with a 'ddpm' schedule"),
        ({"compile": True}, "compile=True needs a teacher with a network, found a GaussianTeacher"),
        ({"cfg_channels": 2}, "cfg_channels is 2; expected 1 to 1"),
        ({"num_steps": 7}, "7 jumps out of 6 teacher steps"),
    ],
)
def test_settings_that_make_no_sense_leave_nothing_behind(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path / "store", **change)
    assert not (tmp_path / "store").exists()


def test_a_full_disk_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    teacher = GaussianTeacher()
    free = shutil.disk_usage(tmp_path).free
    sample = 8 + 4 * 16 * (1 + 3 + 3)
    with pytest.raises(InputError, match="free some, or choose another folder"):
        write(tmp_path, 2 * free // sample, teacher, batch_size=2**20, shard_size=2**30)
    assert teacher.samples_computed == 0
    for count, message in ((10**10 - 1, "free some"), (10**12, "expected at most 9999999999")):
        with pytest.raises(InputError, match=message):
            write(tmp_path / "store", count, teacher)
    assert not (tmp_path / "store").exists()


def test_two_writers_of_one_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    with (
        filelock.FileLock(tmp_path / ".locks" / "1-of-1.lock"),
        pytest.raises(InputError, match="another process is writing this store"),
    ):
        write(tmp_path)
    assert write(tmp_path).count == 20


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(InputError, match="is a file; expected a folder"):
        write(tmp_path / "store")


def test_ctrl_c_keeps_finished_shards(tmp_path: Path) -> None:
    class Interrupted(GaussianTeacher):
        def predict(self, x: torch.Tensor, time: float, condition: Condition) -> torch.Tensor:
            if self.samples_computed >= 6 * 12:
                raise KeyboardInterrupt
            return super().predict(x, time, condition)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "store", 20, Interrupted(), cfg_scale=1.0)
    store = TrajectoryStore.open(tmp_path / "store")
    assert (store.count, store.requested_count, store.missing()) == (8, 20, [(8, 16), (16, 20)])
    write(tmp_path / "store", 20, cfg_scale=1.0)
    write(tmp_path / "at once", 20, cfg_scale=1.0)
    assert contents(tmp_path / "store") == contents(tmp_path / "at once")


@pytest.mark.parametrize("moment", ["shard.tmp", "shard", "sidecar.tmp", "longer"])
def test_what_a_kill_can_leave_behind_is_cleaned_up(tmp_path: Path, moment: str) -> None:
    write(tmp_path / "whole", 16)
    write(tmp_path / "store", 12)  # 8 and a partial shard of 4
    shards = tmp_path / "store" / "shards"
    full, sidecar = (tmp_path / "whole" / "shards" / f"0000000008-0000000016.{e}" for e in ("safetensors", "json"))
    if moment == "shard.tmp":
        (shards / f"{full.name}.tmp").write_bytes(full.read_bytes()[:100])
    else:
        shutil.copy(full, shards)
    if moment == "sidecar.tmp":
        (shards / f"{sidecar.name}.tmp").write_bytes(sidecar.read_bytes()[:10])
    if moment == "longer":  # killed before the shorter one was removed
        shutil.copy(sidecar, shards)
    assert TrajectoryStore.open(tmp_path / "store").count == (16 if moment == "longer" else 12)
    write(tmp_path / "store", 16)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_flows_are_solved_by_heun_and_guided_in_an_interval(tmp_path: Path) -> None:
    flow = GaussianTeacher(schedule=NoiseSchedule(kind="flow", prediction="velocity"))
    settings: dict = dict(teacher=flow, solver="heun", teacher_steps=40, cfg_scale=2.0, labels=[1], keep="state")
    store = write(tmp_path / "guided", cfg_interval=(0.4, 0.6), **settings)
    assert TrajectoryStore.open(tmp_path / "guided").manifest == store.manifest
    assert (store.manifest.solver, store.manifest.cfg_interval) == ("heun", (0.4, 0.6))
    with pytest.raises(InputError, match="solver is 'heun', requested 'euler'"):
        write(tmp_path / "guided", 40, cfg_interval=(0.4, 0.6), **{**settings, "solver": "euler"})
    # (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) is constant along the exact ODE.
    plain = load(write(tmp_path / "plain", cfg_interval=(2.0, 3.0), **settings))
    exact = 2 / 3 + SPREAD * plain["noise"]
    np.testing.assert_allclose(plain["state"][:, -1], exact, atol=5e-3)
    assert (load(store)["state"][:, -1] - exact).min() > 0.02


def test_bfloat16_changes_the_last_bits_alone_and_is_recorded(tmp_path: Path) -> None:
    settings: dict = dict(teacher=tiny_teacher(), teacher_steps=6, batch_size=8, shard_size=8)
    exact, narrow = (load(write(tmp_path / p, 16, precision=p, **settings)) for p in ("float32", "bfloat16"))
    error = np.abs(exact["denoised"] - narrow["denoised"]).max()
    scale = np.abs(exact["denoised"]).max()
    assert 1e-5 * scale < error < 0.05 * scale
    assert np.array_equal(exact["noise"], narrow["noise"])
    again = load(write(tmp_path / "again", 16, precision="bfloat16", **settings))
    assert np.array_equal(again["denoised"], narrow["denoised"])


@pytest.mark.slow
def test_a_compiled_teacher_computes_the_same_and_is_given_back_as_it_was(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    settings: dict = dict(teacher=teacher, teacher_steps=6, batch_size=8, shard_size=8)
    compiled = load(write(tmp_path / "compiled", 16, compile=True, **settings))
    assert teacher.network._compiled_call_impl is None
    plain = load(write(tmp_path / "plain", 16, **settings))
    np.testing.assert_allclose(compiled["state"], plain["state"], atol=1e-3, rtol=1e-3)
    assert TrajectoryStore.open(tmp_path / "compiled").manifest.compiled


def test_bytes_and_time_are_estimated_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = GaussianTeacher(delay=0.02)
    write(tmp_path, 40, teacher, cfg_scale=1.0, progress=True)
    error = capsys.readouterr().err
    found = re.search(r"40 trajectories of 456 B: 18\.2 KB, .* free in .*; about (\S+) s \((\S+) trajectories/s\)", error)
    assert found
    # Ten batches of six predictions.
    assert float(found[1]) * 1.05 >= 10 * 6 * 0.02
    assert float(found[1]) * float(found[2]) == pytest.approx(40, rel=0.1)
    sizes = [shard.num_bytes for shard in TrajectoryStore.open(tmp_path).shards]
    assert format_bytes(sum(sizes)) + " on disk" in error
    write(tmp_path, 40, teacher, cfg_scale=1.0, progress=True)
    assert "about" not in capsys.readouterr().err


def test_a_shard_is_written_while_the_next_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computing_next, overlapped = threading.Event(), []

    class Teacher(GaussianTeacher):
        def predict(self, x: torch.Tensor, time: float, condition: Condition) -> torch.Tensor:
            if self.samples_computed >= 8 * 6:
                computing_next.set()
            return super().predict(x, time, condition)

    def write_slowly(*args: Any) -> None:
        overlapped.append(computing_next.wait(30))
        write_shard(*args)

    monkeypatch.setattr("pyard.trajectories.generate.write_shard", write_slowly)
    write(tmp_path, 16, Teacher(), cfg_scale=1.0).verify()
    assert overlapped == [True, True]


def test_sidecars_say_who_wrote_them(tmp_path: Path) -> None:
    store = write(tmp_path)
    sidecar = json.loads((tmp_path / "shards" / "0000000016-0000000020.json").read_text())
    assert (sidecar["first"], sidecar["count"], sidecar["manifest"]) == (16, 4, store.manifest.digest)
    assert set(sidecar["written_by"]) == {"pyard", "torch", "device"}
    with safetensors.safe_open(tmp_path / "shards" / "0000000016-0000000020.safetensors", "np") as shard:
        assert json.loads(shard.metadata()["pyard"]) == {"first": 16, "manifest": store.manifest.digest}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.123, "0.12 s"), (89, "89 s"), (600, "10 min"), (4000, "1 h 7 min"), (400_000, "5 days")]
)
def test_times_are_said_briefly(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
