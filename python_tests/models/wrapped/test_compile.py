"""torch.compile of students made of diffusers transformers: one graph, and the numbers of plain PyTorch."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from covering import with_products

from pyard.errors import InputError
from pyard.models.families import FAMILIES, import_network
from pyard.models.student import Student

sys.path.append(str(Path(__file__).parent))
from test_backbones import inputs, relative, student_of
from tiny_transformers import NAMES, tiny_condition

COMPILED = [name for name in NAMES if import_network(FAMILIES[name]).not_compiled is None]


def check_against_plain(student: Student, name: str, backend: str) -> None:
    plain, history, condition = copy.deepcopy(student), inputs(2), tiny_condition(name)
    student.compile(backend=backend, fullgraph=True)
    outputs = []
    for one in (student, plain):
        outputs.append(one(history, condition))
        outputs[-1].square().mean().backward()
    assert relative(*outputs) < 1e-4
    pairs = [
        (mine.grad, p.grad) for mine, p in zip(student.parameters(), plain.parameters(), strict=True) if p.grad is not None
    ]
    assert len(pairs) > 20
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    assert all(float((mine - theirs).abs().max()) < 1e-4 * largest for mine, theirs in pairs)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in COMPILED if n != "flux"), "flux"])
def test_a_training_pass_is_one_graph(name: str) -> None:
    check_against_plain(student_of(name, 2, history_bias=-1.0), name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", pytest.param("sd3", marks=with_products)])
def test_the_compiled_code_computes_the_same(name: str) -> None:
    check_against_plain(student_of(name, 2, history_bias=-1.0), name, "inductor")


def test_a_family_that_cannot_is_refused_before_training(tmp_path: Path) -> None:
    from tiny_pipelines import tiny_pipeline

    import pyard

    assert set(NAMES) - set(COMPILED) == {"z_image"}
    folder = tiny_pipeline("z_image", tmp_path / "pipeline")
    with pytest.raises(InputError, match="compile does not work with ZImage: its transformer depends on the length of"):
        pyard.train(folder, out=tmp_path / "run", prompts="a dog.txt", num_steps=2, compile=True, progress=False)
    assert not (tmp_path / "run" / "trajectories").exists()
