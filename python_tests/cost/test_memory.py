"""What an update is said to keep, against what it does keep and against formulas of DiT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from dit_formulas import activation_bytes, block_bytes, block_parameters, frozen_block_bytes
from own_backbone import own_module, own_teacher

from pyard import ops
from pyard.conditions import Condition
from pyard.cost.activations import count_kept, fake_copy
from pyard.cost.memory import adversarial_memory, head_bytes, head_parameters, student_activations, update_memory
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.discriminator import Discriminator
from pyard.models.dit.network import dit_trunk
from pyard.models.student import Student
from pyard.models.student_config import StudentConfig
from pyard.teachers.published import network_of

NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(ops.backend.library is None, reason="the operators are not built"))
# On a GPU, `auto` takes plain operators; a CPU has the compiled ones.
DEVICES = [NATIVE, "cuda"]
LABEL = Condition({"label": torch.zeros(1, dtype=torch.int64)})


def student_of(name: str, history_layers: int = 2, **settings: Any) -> Student:
    """A student without weights of a published network."""
    network, schedule = network_of(name)
    trunk, head = network.trunk.for_student(network.head)
    settings = {"history_layers": history_layers, "history_bias": None, **settings}
    config = StudentConfig(trunk.config, TimeGrid.build(schedule, 4), schedule, family=trunk.family(), **settings)
    return Student(config, trunk, head).to("meta")


def saved_bytes(run: Callable[[], object], module: torch.nn.Module) -> int:
    """Bytes of the storages that autograd saves while something really runs, those of the module's own tensors excluded."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


@contextmanager
def on(device_type: str, mixed: bool) -> Iterator[None]:
    """The operators that run on a device, in a precision, on a CPU."""
    with (
        ops.use_backend("auto" if device_type == "cpu" else "reference"),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        yield


@pytest.mark.parametrize("device_type", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["digits", "DiT-S/2"])
def test_counted_memory_is_that_of_the_formulas(name, mixed, checkpointing, device_type):
    student = student_of(name)
    kept = student_activations(student, LABEL, mixed=mixed, device_type=device_type)
    found = update_memory(student, kept, 16, mixed=mixed, checkpointing=checkpointing)
    expected = activation_bytes(student.config, 16, mixed, checkpointing, plain=device_type != "cpu")
    assert found.activations == pytest.approx(expected, rel=0.15)
    everything, parameters = found.total, sum(p.numel() for p in student.parameters())
    assert everything == pytest.approx(expected + parameters * (4 * 5 + (2 if mixed else 0)), rel=0.15)
    sharded = update_memory(student, kept, 16, world=2, mixed=mixed, checkpointing=checkpointing, sharded=True)
    block = block_parameters(student.trunk.config)
    outside = parameters - len(student.trunk.blocks) * block
    assert sharded.gathered == (6 if mixed else 4) * (2 * block + outside)


@pytest.mark.parametrize("device_type", DEVICES)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("settings", [dict(), dict(history_bias=-1.0), dict(mask="anchor", heads="shared")], ids=str)
def test_counted_memory_is_what_a_run_keeps(settings, mixed, device_type):
    """Of samples 3 to 8, so that the casts of weights drop out here, too."""
    student = Student(student_of("digits", **settings).config)
    factories.randomise(student)

    def kept(batch: int) -> int:
        data, label = torch.randn(batch, 4, 1, 8, 8), torch.zeros(batch, dtype=torch.int64)
        with on(device_type, mixed):
            return saved_bytes(lambda: student(data, label), student)

    counted = student_activations(student, LABEL, mixed=mixed, device_type=device_type)
    assert counted.everything == pytest.approx((kept(8) - kept(2)) / 6, rel=0.005)


@pytest.mark.parametrize("mixed", [False, True])
def test_memory_grows_linearly_with_the_batch(mixed):
    student = fake_copy(student_of("digits")).train()

    def run(batch: int) -> object:
        return student(torch.empty(batch, 4, 1, 8, 8), Condition({"label": torch.empty(batch, dtype=torch.int64)}))

    once = count_kept(run, student, student.trunk.blocks, mixed=mixed, device_type="cuda")
    many = count_kept(lambda batch: run(16 * batch), student, student.trunk.blocks, mixed=mixed, device_type="cuda")
    assert dataclasses.astuple(many) == tuple(16 * value for value in dataclasses.astuple(once))


def resident(field: str) -> int:
    """Bytes of this process, by a field of Linux's /proc."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_nothing_of_a_large_network_is_allocated():
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    student = student_of("DiT-XL/2", history_layers=6)
    kept = student_activations(student, LABEL, mixed=True)
    # Its weights alone are 2.7 GB.
    assert resident("VmHWM") - before < 0.4e9
    block = 4 * 256 * block_bytes(dit_trunk(network_of("DiT-XL/2")[0], "test").config, True, True)
    assert kept.everything == pytest.approx(28 * block, rel=0.05)
    assert kept.block == pytest.approx(block, rel=0.15)


@pytest.mark.parametrize("device_type", DEVICES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_frozen_teacher_keeps_less_than_one_that_is_trained(mixed, device_type):
    network, _ = network_of("digits")
    sizes = dict(width=16, depth=1, kernel_size=3)
    trunk = dit_trunk(network, "test").config
    added = adversarial_memory(network, LABEL, (0, 2), mixed=mixed, device_type=device_type, **sizes)
    heads = 2 * head_bytes(16, 64, width=16, depth=1)
    # The three lowest of four blocks run.
    expected = 3 * 16 * frozen_block_bytes(trunk, mixed, plain=device_type != "cpu")
    assert added.per_sample - heads == pytest.approx(expected, rel=0.15)
    assert added.per_sample - heads < 3 * 16 * block_bytes(trunk, mixed, plain=device_type != "cpu")
    assert added.frozen == (6 if mixed else 4) * sum(p.numel() for p in network.parameters())
    assert added.discriminators == 16 * 2 * head_parameters(64, 64, **sizes)

    real = factories.tiny_teacher(**{**dataclasses.asdict(trunk), "mlp_norm_eps": None}).network

    def kept(batch: int) -> int:
        x, times = torch.randn(batch, 1, 8, 8, requires_grad=True), torch.zeros(batch)
        condition = Condition({"label": torch.zeros(batch, dtype=torch.int64)})
        with on(device_type, mixed):
            return saved_bytes(lambda: real.trunk.features(x, times, condition, real.head, (0, 2)), real)

    assert added.per_sample - heads == pytest.approx((kept(8) - kept(2)) / 6, rel=0.01)


@pytest.mark.parametrize("sizes", [(64, 64), (48, 9)])
def test_parameters_of_discriminators_are_those_of_the_module(sizes):
    hidden, condition = sizes
    settings = dict(width=24, depth=2, kernel_size=5)
    made = Discriminator(3, hidden, condition_size=condition, group=1, **settings)
    assert 3 * head_parameters(hidden, condition, **settings) == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("history_bias", [None, -1.0])
def test_a_backbone_of_ones_own_is_counted(history_bias, mixed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    teacher = own_teacher(own_module(tmp_path))
    student = Student.from_teacher(
        teacher, TimeGrid.build(teacher.schedule, 3, 3), history_layers=2, history_bias=history_bias, output="direct"
    )
    factories.randomise(student)
    one = teacher.conditions.take([1])

    def kept(batch: int) -> int:
        condition, data = teacher.conditions.take([1] * batch), torch.randn(batch, 3, 1, 8, 4)
        with on("cpu", mixed):
            return saved_bytes(lambda: student(data, condition), student)

    counted = student_activations(student, one, mixed=mixed, device_type="cpu")
    assert counted.everything == pytest.approx((kept(8) - kept(2)) / 6, rel=0.01)
    assert counted.block < counted.outside + counted.block < counted.everything
    # Of 8 x 4 tokens, a block's input is 4 (32 D) bytes a step.
    assert counted.outside >= 3 * 3 * 4 * 32 * 16
    on_gpu = student_activations(student, one, mixed=mixed)
    assert (on_gpu.everything < 0.9 * counted.everything) == (history_bias is not None)
    added = adversarial_memory(teacher.network, one, (0, 1), width=4, depth=1, kernel_size=3, mixed=mixed, device_type="cpu")

    def features(batch: int) -> int:
        x, condition = torch.randn(batch, 1, 8, 4, requires_grad=True), teacher.conditions.take([1] * batch)
        with on("cpu", mixed):
            network, times = teacher.network, torch.zeros(batch)
            return saved_bytes(lambda: network.trunk.features(x, times, condition, network.head, (0, 1)), network)

    heads = 2 * head_bytes(32, 16, width=4, depth=1)
    assert added.per_sample - heads == pytest.approx((features(8) - features(2)) / 6, rel=0.01)
    assert added.discriminators == 16 * 2 * head_parameters(16, 1 + 8, width=4, depth=1, kernel_size=3)
