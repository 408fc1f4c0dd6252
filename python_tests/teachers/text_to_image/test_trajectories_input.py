"""What trajectories of a pipeline cannot be made of is refused in one line, before anything is encoded or trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import tiny_pipeline

import pyard
from pyard.errors import InputError

PROMPTS = ["a red circle", "two small blue squares above a cross"]


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("pixart_sigma", tmp_path / "pipeline")

    def refused(match: str, folder: Path = pipeline, **settings: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            pyard.generate_trajectories(folder, tmp_path / "store", 2, progress=False, **settings)
        assert "\n" not in str(caught.value)

    refused("give prompts=")
    (tmp_path / "hole.txt").write_text("a\n\nb\n", encoding="utf-8")
    refused("hole.txt, line 2", prompts=tmp_path / "hole.txt")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n', encoding="utf-8")
    refused("broken.jsonl, line 2", prompts=tmp_path / "broken.jsonl")
    refused("multiples of 8", prompts=PROMPTS, height=30)
    refused("takes none; use cfg_scale", prompts=PROMPTS, embedded_guidance=3.0)
    refused("solver 'euler' does not go with", prompts=PROMPTS, solver="euler")
    refused("label 7", prompts=PROMPTS, labels=[7])
    assert not (tmp_path / "store").exists()  # nothing was encoded for what cannot be
    pyard.generate_trajectories(
        pipeline, tmp_path / "begun", 2, prompts=PROMPTS, num_steps=2, teacher_steps=4, height=32, width=32, progress=False
    )
    encoded = sorted((tmp_path / "begun" / "conditions").rglob("*"))
    with pytest.raises(InputError, match=r"cfg_scale is 4\.5, requested 2"):
        pyard.generate_trajectories(
            pipeline, tmp_path / "begun", 2, prompts=PROMPTS, num_steps=2, teacher_steps=4, height=32, width=32, cfg_scale=2.0
        )
    assert sorted((tmp_path / "begun" / "conditions").rglob("*")) == encoded
    refused("no such file or folder", prompts=PROMPTS, transformer=str(tmp_path / "nothing"))
    bare = tmp_path / "bare"
    shutil.copytree(pipeline, bare)
    shutil.rmtree(bare / "tokenizer")
    refused("no tokenizer", bare, prompts=PROMPTS)
    index = json.loads((bare / "model_index.json").read_text())
    (bare / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaPipeline"}), encoding="utf-8")
    refused("linear", bare, prompts=PROMPTS)
    hub = "neither a built-in teacher .*; if it is a name on the Hugging Face hub, run: hf download stabilityai/sd --local-dir"
    refused(hub, "stabilityai/sd", prompts=PROMPTS)  # type: ignore[arg-type]
    refused("nor an existing file or folder$", tmp_path / "nowhere", prompts=PROMPTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prompts=PROMPTS), "prompts and embedded_guidance are for text-to-image"),
        (dict(embedded_guidance=3.0), "prompts and embedded_guidance are for text-to-image"),
        (dict(height=32), "height and width are for a text-to-image"),
        (dict(transformer="fine-tuned"), "transformer is for text-to-image"),
        (dict(count=0), "count is 0"),
    ],
    ids=str,
)
def test_the_built_in_teacher_is_not_trained_for_what_it_cannot_do(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYARD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=message):
        pyard.generate_trajectories("digits", tmp_path / "store", **{"count": 2, "progress": False, **settings})
    assert not (tmp_path / "cache").exists()
