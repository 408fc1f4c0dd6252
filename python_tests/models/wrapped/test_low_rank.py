"""Differences of models as additions of low rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyard.errors import InputError
from pyard.models.wrapped.low_rank import Factors, low_rank, stored_factors

LINEAR = frozenset({"a", "b"})


def pair(rank: int, size: tuple[int, int] = (40, 60), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Factors]:
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(size, generator=generator) / size[1] ** 0.5
    down, up = torch.randn(rank, size[1], generator=generator), torch.randn(size[0], rank, generator=generator)
    return base.to(dtype), Factors(0.1 * down / size[1] ** 0.5, up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(40, 60), (700, 900)])
def test_the_rank_of_merged_additions_is_found(size: tuple[int, int], dtype: torch.dtype) -> None:
    base, truth = pair(3, size, dtype)
    student = (base.float() + truth.up @ truth.down).to(dtype)
    found = low_rank({"a.weight": student}, {"a.weight": base}, linear=LINEAR)
    assert found.ranks == {"a": 3}
    factors = found.factors["a"]
    assert factors.down.dtype == factors.up.dtype == dtype
    error = (factors.up.double() @ factors.down.double() - (truth.up @ truth.down).double()).abs().max()
    assert error / (truth.up @ truth.down).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("size", [(40, 60), (700, 900)])
def test_a_given_rank_is_the_best_approximation(size: tuple[int, int]) -> None:
    base, _ = pair(1, size)
    difference = torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    s = s * torch.exp(-torch.arange(len(s)) / 4.0)
    student = (base.double() + u @ torch.diag(s) @ v).float()
    found = low_rank({"a.weight": student}, {"a.weight": base}, linear=LINEAR, rank=5)
    assert found.ranks == {"a": 5}
    assert found.error == pytest.approx(float((s[5:].square().sum() / s.square().sum()).sqrt()), rel=1e-3)
    with pytest.raises(InputError, match=r"has rank .* in a .*trained in full"):
        low_rank({"a.weight": base + difference.float()}, {"a.weight": base}, linear=LINEAR)


def test_what_no_addition_holds_counts_as_error() -> None:
    base, truth = pair(2)
    bias = torch.randn(40)
    student = {"a.weight": base + truth.up @ truth.down, "a.bias": bias + 0.1, "norm.weight": torch.ones(4)}
    before = {"a.weight": base, "a.bias": bias, "norm.weight": torch.ones(4)}
    with pytest.raises(InputError, match=r"a\.bias of the student also differs"):
        low_rank(student, before, linear=LINEAR)
    found = low_rank(student, before, linear=LINEAR, rank=2)
    assert found.left_out == ("a.bias",)
    matrix = float((truth.up @ truth.down).square().sum())
    assert found.error == pytest.approx((0.4 / (0.4 + matrix)) ** 0.5, rel=1e-3)


def test_stored_additions_are_taken_as_they_are_where_they_are_the_difference(tmp_path: Path) -> None:
    base, truth = pair(4)
    wrong = Factors(truth.down.flip(0), truth.up)
    tensors = {"trunk.transformer.a.lora_A.default.weight": truth.down, "trunk.transformer.a.lora_B.default.weight": truth.up,
               "heads.0.out.lora_A.weight": wrong.down.clone(), "heads.0.out.lora_B.weight": wrong.up.clone(),
               "heads.0.out.bias": torch.ones(2)}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_factors(tmp_path / "model.safetensors", {"heads.0.out": "b", "trunk.transformer.": ""})
    assert stored.keys() == LINEAR
    student = base + truth.up @ truth.down
    found = low_rank(
        {"a.weight": student, "b.weight": student}, {"a.weight": base, "b.weight": base}, linear=LINEAR, stored=stored
    )
    assert torch.equal(found.factors["a"].down, truth.down)
    assert torch.equal(found.factors["a"].up, truth.up)
    assert found.ranks == {"a": 4, "b": 4}
    assert not torch.equal(found.factors["b"].down, wrong.down)
    assert found.error < 1e-5


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match="has a different size: a"):
        low_rank({"a.weight": torch.ones(2, 3)}, {"a.weight": torch.ones(2, 4)}, linear=LINEAR)
    with pytest.raises(InputError, match="another model: b"):
        low_rank({"a.weight": torch.ones(2, 3)}, {"b.weight": torch.ones(2, 4), "a.weight": torch.ones(2, 3)}, linear=LINEAR)
