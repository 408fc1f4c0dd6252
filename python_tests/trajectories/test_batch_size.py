"""How many samples are computed together by default: as many as fit, by the sizes of the network alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_pipelines import tiny_pipeline

import pyard
from pyard.errors import InputError
from pyard.teachers.text_to_image.outline import pipeline_outline
from pyard.trajectories.batch_size import default_batch_size


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pixart-sigma", 16), ("sd3.5-medium", 16), ("flux.1-dev", 8), ("qwen-image", 8), ("z-image", 8)],
)
def test_published_pipelines_at_1024_pixels(name: str, expected: int) -> None:
    outline = pipeline_outline(name)
    assert outline is not None
    assert default_batch_size(outline.network.trunk, outline.shape_of(1024, 1024)) == expected
    assert default_batch_size(outline.network.trunk, outline.shape_of(512, 512)) == 4 * expected


def test_it_can_be_given(tmp_path: Path) -> None:
    folder = tiny_pipeline("sd3", tmp_path / "pipeline")
    settings = dict(prompts=["a dog"], num_trajectories=4, num_steps=2, teacher_steps=2, batch_size=2, max_steps=1,
                    trackers="none", progress=False)  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a dog\n", encoding="utf-8")
    settings["prompts"] = str(tmp_path / "prompts.txt")
    for given, found in ((None, 64), (2, 2)):
        run = tmp_path / f"run-{found}"
        pyard.train(folder, out=run, trajectory_batch_size=given, **settings)
        assert pyard.TrajectoryStore.open(run / "trajectories").manifest.batch_size == found
    with pytest.raises(InputError, match="trajectory_batch_size is 0; expected at least 1"):
        pyard.train(folder, out=tmp_path / "wrong", trajectory_batch_size=0, **settings)
    with pytest.raises(InputError, match="trajectory_batch_size is 4, but 2 in the trajectories"):
        pyard.train(folder, tmp_path / "run-2" / "trajectories", out=tmp_path / "other", trajectory_batch_size=4, max_steps=1)
