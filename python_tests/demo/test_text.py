"""The text-to-image demo, in small: every stage, the table, the picture, and that a stock pipeline draws the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyard.demo.digits import demo
from pyard.errors import InputError
from pyard.evaluation.captioned_scenes import PromptSet, judge


@pytest.mark.slow
def test_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = demo(tmp_path, text=True, quick=True, progress=False)
    assert isinstance(rows, list)
    folder = tmp_path / "text" / "quick"
    *_, ours, stock = rows
    assert (ours.name, stock.name) == ("jump, no history", "the same, stock diffusers")
    assert (ours.passes, stock.passes) == (4, 4)
    assert stock.by_category == ours.by_category
    assert stock.error == pytest.approx(ours.error, abs=1e-4)
    teacher = rows[0]
    assert teacher.passes == 40
    assert teacher.by_category["all"].value > 0.4
    assert teacher.error is None
    told = json.loads((folder / "adherence.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in told["rows"]] == [row.name for row in rows]
    low, high = told["rows"][0]["by_category"]["all"]["interval"]
    assert low < teacher.by_category["all"].value < high
    picture = np.asarray(Image.open(folder / "prompts.png"))
    assert picture.std() > 20
    assert "unseen relation" in capsys.readouterr().out
    with pytest.raises(InputError, match="adversarial is for the digits"):
        demo(tmp_path, text=True, adversarial=True)


@pytest.mark.slow
def test_the_scenes_themselves_are_followed_and_close_to_themselves() -> None:
    from pyard.data.captioned_scenes import scene_batch
    from pyard.evaluation.captioned_scenes import PROMPT_SEED

    prompts = PromptSet.draw(200)
    assert [prompts.splits.count(split) for split in ("train", "unseen pair", "unseen relation")] == [100, 50, 50]
    parts = [
        scene_batch(PROMPT_SEED + i, range(n), None, split).pictures
        for i, (split, n) in enumerate((("train", 100), ("unseen pair", 50), ("unseen relation", 50)))
    ]
    drawn = np.concatenate(parts)
    found = judge("scenes", drawn, prompts, passes=0, milliseconds=0.0, teacher=drawn)
    assert found.by_category["all"].value > 0.98
    assert all(share.value > 0.95 for share in found.by_split.values())
    assert found.error == 0
    blurred = judge("shifted", drawn[::-1].copy(), prompts, passes=0, milliseconds=0.0, teacher=drawn)
    assert blurred.by_category["all"].value < 0.1
    noisy = drawn + 0.5 * np.random.default_rng(0).standard_normal(drawn.shape).astype(np.float32)
    assert judge("noisy", noisy, prompts, passes=0, milliseconds=0.0, teacher=drawn).frechet > 2 * found.frechet
