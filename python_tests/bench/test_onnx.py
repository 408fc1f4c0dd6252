"""The table of `pyard bench onnx` says what was measured, and a second run adds to the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyard.bench import onnx
from pyard.errors import InputError
from pyard.teachers import published


@pytest.mark.slow
def test_a_run_adds_to_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, sizes in (("S", (4, 32, 2)), ("B", (4, 16, 2))):
        monkeypatch.setitem(published.SIZES, name, sizes)
    ways = [onnx.PLAIN, onnx.NATIVE, "ONNX fp32"]
    settings = dict(batch_sizes=[2], rounds=2, threads=1, out=tmp_path, progress=False)
    onnx.bench_onnx(["DiT-B/2"], ways=ways, **settings)  # type: ignore[arg-type]
    onnx.bench_onnx(["DiT-S/2"], ways=ways[::2], **settings)  # type: ignore[arg-type]
    results = json.loads((tmp_path / "onnx.json").read_text())
    assert list(results) == ["DiT-S/2", "DiT-B/2"]
    assert [row["way"] for row in results["DiT-B/2"]["rows"]] == ways
    for row in results["DiT-B/2"]["rows"]:
        assert len(row["calls_seconds"]) == 2
        assert row["seconds_per_image"] == pytest.approx(sum(row["calls_seconds"]) / 4)
        assert row["max_error"] < 1e-4
        assert row["fraction_of_sgemm"] > 0
    assert results["DiT-B/2"]["rows"][0]["speed_over"][onnx.PLAIN] == 1
    assert results["DiT-B/2"]["rows"][2]["max_error"] > 0
    table = (tmp_path / "onnx.md").read_text()
    assert table.count("| 2 | ONNX fp32 |") == 2
    assert table in capsys.readouterr().out


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="unknown 'DiT-S'; expected some of DiT-S/2"):
        onnx.bench_onnx(["DiT-S"])
    with pytest.raises(InputError, match="unknown 'onnx'; expected some of PyTorch eager, plain"):
        onnx.bench_onnx(ways=["onnx"])
