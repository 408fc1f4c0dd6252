"""Which scenes there are, what they look like, and what training never shows."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pyard.data.captioned_scenes import (
    CATEGORIES,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    SceneObject,
    SceneSetting,
    draw_scene,
    parse_caption,
    render_objects,
    render_scenes,
    save_contact_sheet,
    scene_batch,
    scene_batches,
)
from pyard.data.captioned_scenes.render import coverage
from pyard.data.captioned_scenes.scene import Scene, shows_relation
from pyard.errors import InputError


def relations_shown(scene):
    return {
        (a.shape, relation, b.shape)
        for a, b in itertools.permutations(scene.objects, 2)
        for relation in ("left of", "above")
        if shows_relation(a, relation, b, scene.setting)
    }


def pairs_shown(scene):
    return {(found.shape, found.colour) for found in scene.objects}


@pytest.mark.parametrize("setting", [SceneSetting(), SceneSetting(32, 4, 1.0)])
def test_training_never_shows_held_out_combinations_and_the_other_splits_always_do(setting):
    train = [draw_scene(0, index, setting) for index in range(1500)]
    assert not any(pairs_shown(scene) & HELD_OUT_PAIRS or relations_shown(scene) & HELD_OUT_RELATIONS for scene in train)
    assert {scene.prompt.split for scene in train} == {"train"}
    # What is left is all there, so that a network could combine it.
    assert len(set().union(*map(pairs_shown, train))) == 24 - len(HELD_OUT_PAIRS)
    different = {r for r in set().union(*map(relations_shown, train)) if r[0] != r[2]}
    assert len(different) == 24 - len(HELD_OUT_RELATIONS)
    for split in ("unseen pair", "unseen relation"):
        for scene in (draw_scene(0, index, setting, split=split) for index in range(300)):
            assert scene.prompt.split == split
            assert bool(pairs_shown(scene) & HELD_OUT_PAIRS) == (split == "unseen pair")
            assert bool(relations_shown(scene) & HELD_OUT_RELATIONS) == (split == "unseen relation")


def test_scenes_are_the_same_everywhere():
    # Values of this generator; they must never change, since trained teachers and their scores rest on them.
    texts = "\n".join(draw_scene(0, index).caption for index in range(200))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "c06fd7915c08efdc"
    first = draw_scene(0, 2**64 - 1).objects[0]
    assert first == SceneObject(shape="triangle", colour="green", size="large", x=0.7696225735773082, y=0.2315051379008662)


def test_a_scene_depends_on_seed_and_index_alone():
    batch = scene_batch(3, [7, 2, 7])
    np.testing.assert_array_equal(batch.pictures[0], batch.pictures[2])
    np.testing.assert_array_equal(batch.pictures[1], scene_batch(3, [2]).pictures[0])
    assert batch.captions[0] != scene_batch(4, [7]).captions[0]
    small, large = draw_scene(3, 5), draw_scene(3, 5, SceneSetting(32))
    assert (small.objects, small.caption) == (large.objects, large.caption)


def test_batches_go_on_where_they_stopped():
    stream = scene_batches(0, 4)
    next(stream)
    second, resumed = next(stream), next(scene_batches(0, 4, start=1))
    np.testing.assert_array_equal(second.pictures, resumed.pictures)
    assert second.captions == resumed.captions == scene_batch(0, range(4, 8)).captions
    assert [parse_caption(text) for text in second.captions] == list(second.prompts)
    assert second.pictures.dtype == np.float32
    assert second.pictures.shape == (4, 3, 16, 16)
    assert np.abs(second.pictures).max() <= 1


@pytest.mark.parametrize(
    ("shape", "area"), [("disc", np.pi / 4), ("square", 1), ("triangle", 1 / 2), ("cross", 2 * 0.36 - 0.36**2)]
)
def test_shapes_have_their_area_wherever_they_are(shape, area):
    x, y = np.random.default_rng(0).uniform(12, 20, (2, 100))
    covered = coverage(shape, x, y, np.full(100, 14.0), 32).sum(axis=(1, 2))
    np.testing.assert_allclose(covered, area * 14.0**2, rtol=0.03)


def test_an_object_is_drawn_in_its_colour_at_its_place():
    picture = render_objects([[SceneObject("square", "red", "large", 0.25, 0.75)]], SceneSetting())[0]
    np.testing.assert_allclose(picture[:, 12, 4], [0.8, -0.76, -0.76], atol=1e-6)
    np.testing.assert_allclose(picture[:, 4, 12], -0.5, atol=1e-6)
    # Rows 8.5 to 15.5, columns 0.5 to 7.5.
    np.testing.assert_allclose(picture[0, 8, 4], 0.5 * 0.8 - 0.25, atol=1e-6)


@pytest.mark.parametrize("options", [(15,), (33,), (16, 3), (16, 1), (16, 2, 1.1), (16, 2, float("nan"))])
def test_settings_check_themselves(options):
    with pytest.raises(InputError, match="scenes:"):
        SceneSetting(*options)


def test_scenes_check_themselves():
    scene = draw_scene(0, 0, category="attribute binding")
    left = replace(scene.objects[0], x=0.25, y=0.25)
    right = replace(scene.objects[1], x=0.75, y=0.25)
    assert Scene(scene.setting, (left, right), scene.prompt, scene.caption)
    for objects, message in [
        ((), "0 objects"),
        ((left,), "not true"),
        ((left, replace(right, x=0.4)), "apart"),
        ((replace(left, x=0.1), right), "outside"),
        ((replace(left, colour=right.colour), right), "not true"),
    ]:
        with pytest.raises(InputError, match=message):
            Scene(scene.setting, objects, scene.prompt, scene.caption)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_scene(-1, 0), "seed is -1"),
        (lambda: draw_scene(0, 2**64), "index"),
        (lambda: draw_scene(0, 0, split="test"), "split is 'test'"),
        (lambda: draw_scene(0, 0, split="unseen relation", category="counting"), "category of the split 'unseen relation'"),
        (lambda: render_scenes([]), "0 scenes"),
        (lambda: render_scenes([draw_scene(0, 0), draw_scene(0, 0, SceneSetting(24))]), "2 settings"),
        (lambda: next(scene_batches(0, 0)), "batches of 0"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_categories_can_be_chosen():
    for category in CATEGORIES:
        assert {draw_scene(0, index, category=category).prompt.category for index in range(20)} == {category}


def test_the_contact_sheet_shows_pictures(tmp_path):
    batch = scene_batch(0, range(5))
    save_contact_sheet(batch.pictures, batch.captions, tmp_path / "sheet.png", columns=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 4 * 198 + 6
    np.testing.assert_array_equal(sheet[6 + 6, 6 + 6], np.round((batch.pictures[0, :, 0, 0] + 1) * 127.5))
    with pytest.raises(InputError, match="captions"):
        save_contact_sheet(batch.pictures, ["one"], tmp_path / "other.png")
