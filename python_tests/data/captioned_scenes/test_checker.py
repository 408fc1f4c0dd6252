"""The checker on pictures whose objects are known, on wrong captions and on garbage."""

import subprocess
import sys

import numpy as np
import pytest

from pyard.data.captioned_scenes import (
    Proportion,
    SceneObject,
    SceneSetting,
    adherence,
    draw_scene,
    follow_prompts,
    parse_caption,
    read_pictures,
    render_objects,
    render_scenes,
    scene_batch,
)
from pyard.data.captioned_scenes.__main__ import main
from pyard.data.captioned_scenes.regions import label_regions
from pyard.data.captioned_scenes.validate import validate_checker
from pyard.errors import InputError

RED_DISC = SceneObject("disc", "red", "small", 0.25, 0.25)
BLUE_CROSS = SceneObject("cross", "blue", "large", 0.75, 0.25)
WHITE_SQUARE = SceneObject("square", "white", "small", 0.25, 0.75)


@pytest.mark.parametrize(
    ("setting", "count"),
    [(SceneSetting(), 199), (SceneSetting(16, 2, 1.0), 50), (SceneSetting(24, 3, 1.0), 25), (SceneSetting(32), 25)],
)
def test_the_checker_is_as_good_as_it_must_be(setting, count):
    # Below 200 of each category, a single wrong answer is below 99.5 %: all must be right.
    findings = validate_checker(setting, count)
    assert len(findings) == 28
    assert [str(finding) for finding in findings if not finding.reached] == []


def test_objects_are_read_back_exactly():
    scenes = [draw_scene(5, index, SceneSetting(16, 2, 1.0)) for index in range(500)]
    for scene, reading in zip(scenes, read_pictures(render_scenes(scenes), scenes[0].setting), strict=True):
        assert reading.fault is None
        drawn, found = (sorted(objects, key=lambda one: (one.x > 0.5, one.y)) for objects in (scene.objects, reading.objects))
        assert [(one.shape, one.colour, one.size) for one in drawn] == [(one.shape, one.colour, one.size) for one in found]
        for one, other in zip(drawn, found, strict=True):
            assert abs(one.x - other.x) < 0.02
            assert abs(one.y - other.y) < 0.02


@pytest.mark.parametrize(
    ("objects", "text", "answer"),
    [
        ([RED_DISC], "a disc", True),
        ([RED_DISC], "a red disc at the top left", True),
        ([RED_DISC], "a red disc at the top right", False),
        ([RED_DISC, BLUE_CROSS], "a disc", False),
        ([RED_DISC, BLUE_CROSS], "a blue cross right of a red disc", True),
        ([RED_DISC, BLUE_CROSS], "a blue cross left of a red disc", False),
        ([RED_DISC, BLUE_CROSS], "a blue cross above a red disc", False),
        ([RED_DISC, BLUE_CROSS], "a red cross and a blue disc", False),
        ([RED_DISC, BLUE_CROSS, WHITE_SQUARE], "a blue cross right of a red disc", False),
        # On a diagonal both relations are true, as in GenEval.
        ([BLUE_CROSS, WHITE_SQUARE], "a cross above a square", True),
        ([BLUE_CROSS, WHITE_SQUARE], "a square left of a cross", True),
        ([RED_DISC, SceneObject("disc", "red", "large", 0.75, 0.75)], "two red discs", True),
        ([RED_DISC, SceneObject("disc", "red", "large", 0.75, 0.75)], "two small red discs", False),
        ([RED_DISC, SceneObject("disc", "blue", "small", 0.75, 0.75)], "two red discs", False),
        ([RED_DISC, SceneObject("disc", "blue", "small", 0.75, 0.25)], "a red disc left of a blue disc", True),
    ],
)
def test_answers_to_single_pictures(objects, text, answer):
    picture = render_objects([objects], SceneSetting())
    assert follow_prompts(picture, [parse_caption(text)]).tolist() == [answer]


def fault_of(picture):
    return read_pictures(picture[None])[0].fault


def test_what_is_no_scene_has_a_fault_that_says_why():
    disc = render_objects([[RED_DISC]], SceneSetting())[0]
    background = render_objects([[]], SceneSetting())[0]
    assert fault_of(disc) is None
    assert read_pictures(background[None])[0].objects == ()

    spoilt = disc.copy()
    spoilt[0, 0, 0] = np.inf
    assert "finite" in fault_of(spoilt)
    assert "background" in fault_of(disc + 0.4)
    assert "faint" in fault_of(disc + 0.4 * (render_objects([[BLUE_CROSS]], SceneSetting())[0] - background))
    bar = background.copy()
    bar[:, 8:10, 1:13] = np.array([0.8, -0.76, -0.76])[:, None, None]
    assert "shapes" in fault_of(bar)
    orange = background.copy()
    orange[:, 8:13, 8:13] = np.array([0.95, 0.0, -0.85])[:, None, None]
    assert "colours" in fault_of(orange)
    many = [SceneObject("disc", "red", "small", x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)]
    assert "more than 3" in fault_of(render_objects([many], SceneSetting())[0])


def test_a_single_pixel_is_overlooked_and_values_are_clipped():
    disc = render_objects([[RED_DISC]], SceneSetting())
    speck = disc.copy()
    speck[0, :, 14, 14] = 0.5
    assert follow_prompts(speck, [parse_caption("a small red disc")]).all()
    assert follow_prompts(disc * 1.2 + 0.1, [parse_caption("a small red disc")]).all()


def test_regions_are_those_of_a_flood_fill():
    mask = np.random.default_rng(0).random((20, 9, 9)) < 0.45
    labels = label_regions(mask)
    expected, count = np.zeros(mask.shape, dtype=int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if expected[start]:
            continue
        count += 1
        stack = [start]
        while stack:
            n, y, x = stack.pop()
            if 0 <= y < 9 and 0 <= x < 9 and mask[n, y, x] and not expected[n, y, x]:
                expected[n, y, x] = count
                stack += [(n, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert labels.max() == count
    assert len(set(zip(labels[mask], expected[mask], strict=True))) == count
    assert not labels[~mask].any()
    assert (label_regions(np.ones((2, 3, 3), dtype=bool)) == np.array([1, 2])[:, None, None]).all()


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match=r"pictures of shape \(1, 3, 24, 24\); expected \[n, 3, 16, 16\]"):
        read_pictures(np.zeros((1, 3, 24, 24)))
    with pytest.raises(InputError, match="1 pictures and 0 prompts"):
        follow_prompts(np.zeros((1, 3, 16, 16)), [])
    assert read_pictures(np.zeros((0, 3, 16, 16))) == []


# R: binom::binom.confint(c(0, 81, 10), c(10, 263, 10), methods = "wilson"); the middle one is Newcombe's (1998) example.
@pytest.mark.parametrize(("yes", "total", "low", "high"), [(0, 10, 0, 0.2775), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1)])
def test_wilson_intervals(yes, total, low, high):
    np.testing.assert_allclose(Proportion(yes, total).interval, (low, high), atol=5e-5)


def test_adherence_by_category():
    batch = scene_batch(0, range(300))
    followed = np.arange(300) % 3 > 0
    found = adherence(followed, batch.prompts)
    assert found["all"] == Proportion(200, 300)
    assert sum(one.total for name, one in found.items() if name != "all") == 300
    kinds = np.array([prompt.category for prompt in batch.prompts])
    assert found["counting"] == Proportion(int(followed[kinds == "counting"].sum()), int((kinds == "counting").sum()))
    with pytest.raises(InputError, match="at least one"):
        adherence(np.zeros(0, dtype=bool), [])
    for yes, total in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(InputError, match="trial"):
            Proportion(yes, total)


def test_the_commands(tmp_path, capsys):
    assert main(["sheet", str(tmp_path / "scenes.png"), "--count", "3", "--split", "unseen pair"]) == 0
    assert (tmp_path / "scenes.png").stat().st_size > 0
    assert main(["check", "--count", "20"]) == 0
    assert capsys.readouterr().out.count("100.0 %") >= 27
    assert main(["check", "--size", "12"]) == 2
    assert "size is 12" in capsys.readouterr().err
    help_text = subprocess.run(
        [sys.executable, "-m", "pyard.data.captioned_scenes", "--help"], capture_output=True, text=True, check=True
    )
    assert "sheet" in help_text.stdout
