"""What a recipe is said to cost, against hand-worked numbers, published ones, and what runs."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import shutil
from pathlib import Path

import factories
import pytest
import torch
from own_backbone import own_module, own_teacher
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyard import ops
from pyard.cli.command_line import main
from pyard.conditions import Condition
from pyard.cost.flops import head_flops, teacher_flops
from pyard.cost.memory import head_parameters, student_activations
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.errors import InputError
from pyard.estimate.disk import store_bytes
from pyard.estimate.recipe_cost import estimate, student_of
from pyard.estimate.update_cost import MemoryOfUpdates, stage_flops
from pyard.models.backbone import Denoiser
from pyard.models.discriminator import Discriminator
from pyard.models.dit.network import DiT, Trunk
from pyard.models.student import Student
from pyard.teachers.digits import digits_network
from pyard.teachers.network_teacher import NetworkTeacher
from pyard.teachers.published import SIZES, TeacherOutline, network_of
from pyard.training import AdversarialConfig, TrainConfig
from pyard.trajectories import TrajectoryBatch, generate_trajectories

RECIPES = Path(__file__).parents[2] / "recipes"
GB = 1e9


def digits() -> Denoiser:
    """The network of the digits' teacher, without training."""
    return Denoiser(Trunk(digits_network()))


def digits_outline() -> TeacherOutline:
    return TeacherOutline(digits(), NoiseSchedule())


def one_class() -> Condition:
    return Condition({"label": torch.zeros(1, dtype=torch.int64)})


def test_numbers_by_hand(tmp_path, capsys):
    """T = 16, D = 64, L = 4, P*P*C = 4: each block multiplies tokens by 12 D^2 numbers and one vector by 6 D^2."""
    recipe = tmp_path / "recipe.yaml"
    settings = dict(num_trajectories=100, history_layers=0, max_steps=10, batch_size=8, trajectory_keep="state", target="state")
    recipe.write_text(json.dumps({"teacher": "digits", **settings}))
    found = estimate(recipe, tflops=2.0, gpus=4)
    T, D, L = 16, 64, 4
    block = 2 * T * 12 * D * D + 2 * 6 * D * D + 2 * 2 * T * T * D
    one_pass = 2 * T * 4 * D + 2 * D * (256 + D) + L * block + 2 * T * D * 4 + 2 * 2 * D * D
    trajectories, regression = found.stages
    assert trajectories.flops == 100 * 25 * 2 * one_pass
    assert regression.flops == 10 * 8 * 3 * 4 * one_pass
    assert regression.gpu_hours == pytest.approx(regression.flops / 2e12 / 3600)
    assert found.sample_bytes == 8 + 64 * 4 + 4 * 64 * 4
    assert found.share == 2
    parameters = found.parameters
    memory = found.memory["DDP"][2]
    assert (memory.weights, memory.averages, memory.optimizer, memory.gradients) == tuple(
        4 * parameters * n for n in (1, 1, 2, 2)
    )
    assert memory.activations > 2 * 4 * T * L * 72 * D
    shards = found.memory["FSDP"][2]
    assert shards.optimizer == 2 * parameters
    assert shards.activations == memory.activations
    assert found.memory["DDP, checkpointing"][64].activations < 0.5 * found.memory["DDP"][64].activations
    assert "regression" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "giga"), [("DiT-S/2", 6.06), ("DiT-B/2", 23.01), ("DiT-L/2", 80.71), ("DiT-XL/2", 118.64)])
def test_published_networks_cost_what_their_paper_says(name, giga):
    """Peebles & Xie 2023, table 1, counts a multiplication with its addition once."""
    assert teacher_flops(network_of(name)[0], one_class()) == pytest.approx(2e9 * giga, rel=0.005)


def test_sizes_of_names():
    network, schedule = network_of("SiT-XL-2-512.pt")
    assert (network.trunk.tokens_per_step(), schedule.kind) == (1024, "flow")
    with torch.device("meta"):
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(675e6, rel=0.01)
    assert len(SIZES) == 4
    with pytest.raises(InputError, match="nor a published name"):
        network_of("DiT-XXL/2")


def test_teachers_on_disk_are_read_without_their_weights(tmp_path):
    teacher = factories.tiny_teacher()
    teacher.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    network, schedule = network_of(tmp_path)
    assert (network.config, schedule) == (teacher.network.config, teacher.schedule)


@pytest.mark.parametrize("settings", [
    dict(), pytest.param(
        dict(trajectory_dtype="bfloat16", trajectory_keep="denoised", target="denoised"), marks=pytest.mark.slow
    ), dict(num_trajectories=1500, trajectory_dtype="float16"),
], ids=str)  # fmt: skip
def test_bytes_are_those_of_the_store(settings, tmp_path):
    network = DiT(digits_network())
    factories.randomise(network, std=0.02)
    config = {"num_trajectories": 200, **settings}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"teacher": "digits", "teacher_steps": 4, **config}))
    store = generate_trajectories(
        NetworkTeacher(network, NoiseSchedule()), tmp_path / "store", config["num_trajectories"], teacher_steps=4,
        keep=config.get("trajectory_keep", "both"), dtype=config.get("trajectory_dtype", "float32"), progress=False,
    )  # fmt: skip
    real = sum(file.stat().st_size for file in (tmp_path / "store").rglob("*.safetensors"))
    found = estimate(recipe)
    assert (found.store_bytes, found.sample_bytes) == (real, store.manifest.sample_bytes)
    assert store_bytes(store.manifest, store.count) == real
    # A store that is there already is measured, and costs nothing.
    recipe.write_text(json.dumps({"teacher": "digits", "trajectories": str(tmp_path / "store")}))
    there = estimate(recipe)
    assert (there.store_bytes, there.generated, [stage.name for stage in there.stages]) == (real, False, ["regression"])


@pytest.mark.parametrize("rollout", [0.0, 1.0])
def test_flops_of_an_update_are_those_that_run(rollout):
    from pyard.training.processes import Processes
    from pyard.training.regression import Regression

    config = TrainConfig(teacher="digits", out=Path(), batch_size=4, max_steps=1, rollout_probability=rollout)
    config, student = student_of(config, digits_outline())
    model = Student(student.config)
    factories.randomise(model)
    stage = Regression(config, model, Processes())
    batch = TrajectoryBatch(torch.randn(4, 4, 1, 8, 8), torch.randn(4, 4, 1, 8, 8), torch.arange(4))
    with ops.use_backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.compute(1, batch)
    assert stage_flops(config, digits(), student) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_of_a_discriminator_are_those_of_the_module():
    heads = Discriminator(3, 64, width=24, depth=2, kernel_size=5, group=1)
    with FlopCounterMode(display=False) as counter:
        heads.heads[0].eval()(torch.randn(1, 16, 64), torch.randn(1, 64))
    assert sum(head_flops(16, 64, 64, width=24, depth=2, kernel_size=5)) == pytest.approx(counter.get_total_flops(), rel=0.01)


def _resident(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _peak_of_updates(recipe: str, checkpointing: bool, batch: int, queue: multiprocessing.Queue) -> None:
    """In a process of its own: how far two updates raise the resident memory above that before the student was there."""
    from pyard.training.processes import Processes
    from pyard.training.regression import Regression

    torch.set_num_threads(1)
    config = dataclasses.replace(TrainConfig.read(recipe), batch_size=batch, activation_checkpointing=checkpointing)
    config, sizes = student_of(config, digits_outline())
    small = TrajectoryBatch(torch.randn(1, 4, 1, 8, 8), torch.randn(1, 4, 1, 8, 8), torch.zeros(1, dtype=torch.long))
    warm = Regression(config, Student(sizes.config), Processes())
    warm.compute(1, small)
    warm.apply()
    del warm
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    stage = Regression(config, Student(sizes.config), Processes())
    factories.randomise(stage.student)
    data = TrajectoryBatch(*torch.randn(2, batch, 4, 1, 8, 8), torch.arange(batch) % 10)
    for step in (1, 2):
        stage.compute(step, data)
        stage.apply()
    queue.put(_resident("VmHWM") - before)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_that_of_a_run_on_the_digits(checkpointing, monkeypatch):
    """Within the stated quarter, with a batch so large that the interpreter's own memory does not count."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # glibc gives back what is freed, as torch's allocators reuse it
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    batch = 512
    process = context.Process(target=_peak_of_updates, args=(str(RECIPES / "digits.yaml"), checkpointing, batch, queue))
    process.start()
    measured = queue.get(timeout=300)
    process.join()
    config, sizes = student_of(TrainConfig.read(RECIPES / "digits.yaml"), digits_outline())
    found = MemoryOfUpdates.count(config, digits_outline(), sizes, one_class(), device_type="cpu").of(
        batch, 1, False, checkpointing
    )
    print(f"measured {measured / 1e6:.0f} MB, estimated {found.total / 1e6:.0f} MB")
    assert 0.8 * measured < found.total < 1.25 * measured


def test_adversarial_stage_and_students_that_are_there(tmp_path, capsys):
    teacher = factories.tiny_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 3, 6), history_layers=2, heads="shared")
    student.save_pretrained(tmp_path / "run" / "student")
    recipe = tmp_path / "recipe.yaml"
    settings = {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "run"), "stage": "adversarial", "max_steps": 5}
    recipe.write_text(json.dumps({**settings, "adversarial": {"width": 8}}))
    assert main(["estimate", str(recipe), "--device", "A100", "--out", str(tmp_path / "estimate.json")]) == 0
    assert "adversarial" in capsys.readouterr().out
    written = json.loads((tmp_path / "estimate.json").read_text())
    assert written["student"]["heads"] == "shared"
    assert written["parameters"] == sum(p.numel() for p in student.parameters())
    costs, kernel_size = written["memory"]["one GPU"]["4"], AdversarialConfig().kernel_size
    assert costs["frozen"] == 4 * sum(p.numel() for p in teacher.network.parameters())
    assert costs["discriminators"] == 16 * 3 * head_parameters(32, 32, width=8, depth=1, kernel_size=kernel_size)
    assert costs["total"] == pytest.approx(sum(value for name, value in costs.items() if name != "total"))


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder with the module of a user's backbone, and a teacher's folder made of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own_teacher(own_module(tmp_path)).save_pretrained(tmp_path / "teacher")
    return tmp_path


NETWORK = "a_users_backbone:MyBackbone"


@pytest.mark.parametrize("where", ["flag", "recipe"])
def test_a_backbone_of_ones_own_has_a_cost(where, own_folder, capsys):
    settings = {"teacher": "teacher", "num_steps": 3, "max_steps": 5, "batch_size": 8, "num_trajectories": 16}
    (own_folder / "recipe.yaml").write_text(json.dumps({**settings, **({"network": NETWORK} if where == "recipe" else {})}))
    flags = ["--network", NETWORK] if where == "flag" else []
    assert main(["estimate", "recipe.yaml", *flags, "--device", "H100", "--gpus", "2", "--out", "estimate.json"]) == 0
    assert "T = 32 tokens" in capsys.readouterr().out
    written = json.loads(Path("estimate.json").read_text())
    teacher = NetworkTeacher.from_pretrained("teacher", network=NETWORK)
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 3, 25), history_layers=1, history_bias=-4.0)
    assert written["parameters"] == sum(p.numel() for p in student.parameters())
    assert [stage["name"] for stage in written["stages"]] == ["trajectories", "regression"]
    # Both guided passes of 25 steps, for prompts that a batch pads to 5 tokens.
    one = Condition({"tokens": torch.zeros(1, 5, 8), "mask": torch.ones(1, 5, dtype=torch.bool)})
    assert written["stages"][0]["flops"] == 16 * 50 * teacher_flops(teacher.network, one)
    kept = student_activations(student, one)
    memory = written["memory"]
    assert memory["DDP"]["4"]["activations"] == 4 * kept.peak(False)
    assert memory["FSDP, checkpointing"]["4"]["activations"] == 4 * kept.peak(True)
    block = sum(p.numel() for p in student.trunk.blocks[0].parameters())
    assert memory["FSDP"]["4"]["gathered"] == 4 * (written["parameters"] - block)  # of 3 blocks, 2 are gathered at a time
    store = generate_trajectories(teacher, own_folder / "store", 16, num_steps=3, progress=False)
    assert written["store_bytes"] == store_bytes(store.manifest, 16)


def test_the_adversarial_stage_of_a_backbone_of_ones_own_has_a_cost(own_folder):
    teacher = NetworkTeacher.from_pretrained("teacher", network=NETWORK)
    student = Student.from_teacher(teacher, TimeGrid.build(teacher.schedule, 3, 25), history_layers=2)
    student.save_pretrained("run/student")
    settings = {"teacher": "teacher", "student": "run", "network": NETWORK, "stage": "adversarial", "num_steps": 3}
    Path("recipe.yaml").write_text(json.dumps({**settings, "adversarial": {"width": 8, "depth": 0, "blocks": [0, 2]}}))
    found = estimate(Path("recipe.yaml"))
    memory = found.memory["one GPU"][4]
    assert memory.discriminators == 16 * 2 * head_parameters(16, 1 + 8, width=8, depth=0, kernel_size=9)
    assert memory.frozen == 4 * found.teacher_parameters
    plain = student_activations(student, teacher.conditions.take([1]))
    assert memory.activations > 4 * plain.peak(False)
    Path("recipe.yaml").write_text(json.dumps({**settings, "adversarial": {"blocks": [3]}}))
    with pytest.raises(InputError, match="the teacher has 3, numbered from 0"):
        estimate(Path("recipe.yaml"))


def test_what_is_missing_of_a_backbone_of_ones_own_is_named(own_folder, capsys):
    Path("recipe.yaml").write_text(json.dumps({"teacher": "teacher", "num_steps": 3}))
    assert main(["estimate", "recipe.yaml"]) == 2
    assert f"--network {NETWORK}" in capsys.readouterr().err
    shutil.rmtree("teacher/conditions")
    assert main(["estimate", "recipe.yaml", "--network", NETWORK]) == 2
    assert "no table of conditions was found; expected one in conditions/" in capsys.readouterr().err
    assert main(["estimate", "recipe.yaml", "--network", "pyard.models.dit.network:Trunk"]) == 2
    assert "it does not fit Trunk" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe",
    [
        path if path.stem in ("digits", "imagenet256-dit-xl2") else pytest.param(path, marks=pytest.mark.slow)
        for path in sorted(RECIPES.glob("*.yaml"))
        if "1024" not in path.stem
    ],
    ids=lambda path: path.stem,
)
def test_recipes_have_a_cost(recipe, capsys):
    found = estimate(recipe, device="NVIDIA H100", gpus=8)
    assert all(stage.gpu_hours is not None and stage.gpu_hours > 0 for stage in found.stages)
    if "xl2" in recipe.stem:
        assert found.parameters == pytest.approx(680e6, rel=0.02)
        assert 5 * GB < found.memory["DDP"][1].total < 40 * GB


def test_wrong_questions(tmp_path, capsys):
    recipe = str(RECIPES / "digits.yaml")
    for flags, message in (
        (["--device", "Z9"], "expected one of A100"), (["--mfu", "0"], "mfu is 0"), (["--gpus", "0"], "gpus is 0"),
    ):  # fmt: skip
        assert main(["estimate", recipe, *flags]) == 2
        assert message in capsys.readouterr().err
    for name, what in ((str(tmp_path), "that is a folder"), (str(tmp_path / "recipe.yaml"), "no such file")):
        assert main(["estimate", name]) == 2
        found = capsys.readouterr().err
        assert f"recipe {name}: {what}; expected a YAML file, or one of digits" in found
        assert "`pyard train ... --print_config > FILE` writes the settings of any other run to a file" in found
    for content, message in (("teacher: [", "not valid YAML"), ("- 1", "found a list"), ("techer: digits", "techer")):
        (tmp_path / "recipe.yaml").write_text(content)
        assert main(["estimate", str(tmp_path / "recipe.yaml")]) == 2
        assert message in capsys.readouterr().err
