"""Captioned scenes (`scenes-text`): drawn pictures of one to three objects whose captions can be read back out of the pixels.

    batch = scene_batch(seed=0, indices=range(64))            # pictures, captions, prompts
    prompt = parse_caption("two small red discs")             # any caption of the grammar
    followed = follow_prompts(pictures, prompts)              # bool: exactly what was asked for, and nothing else
    adherence(followed, prompts)                              # by GenEval's six categories, with 95 % intervals

Scene i of a seed is a function of (seed, i), on every machine. Some pairs of colour and shape and some relations between shapes
never occur in the split `train`; `unseen pair` and `unseen relation` consist of them. `SceneSetting` says how hard scenes are.
"""

from pyard.data.captioned_scenes.batches import SceneBatch, scene_batch, scene_batches
from pyard.data.captioned_scenes.checker import Reading, follow_prompts, follows, read_pictures
from pyard.data.captioned_scenes.contact_sheet import save_contact_sheet
from pyard.data.captioned_scenes.draw import draw_scene
from pyard.data.captioned_scenes.prompt import Prompt, Thing
from pyard.data.captioned_scenes.proportions import Proportion, adherence
from pyard.data.captioned_scenes.render import render_objects, render_scenes
from pyard.data.captioned_scenes.scene import Scene, SceneObject, SceneSetting
from pyard.data.captioned_scenes.tokenizer import build_tokenizer, tokenizer_tokens
from pyard.data.captioned_scenes.vocabulary import CATEGORIES, HELD_OUT_PAIRS, HELD_OUT_RELATIONS, SPLITS, words
from pyard.data.captioned_scenes.wording import caption, captions, parse_caption

__all__ = [
    "CATEGORIES",
    "HELD_OUT_PAIRS",
    "HELD_OUT_RELATIONS",
    "SPLITS",
    "Prompt",
    "Proportion",
    "Reading",
    "Scene",
    "SceneBatch",
    "SceneObject",
    "SceneSetting",
    "Thing",
    "adherence",
    "build_tokenizer",
    "caption",
    "captions",
    "draw_scene",
    "follow_prompts",
    "follows",
    "parse_caption",
    "read_pictures",
    "render_objects",
    "render_scenes",
    "save_contact_sheet",
    "scene_batch",
    "scene_batches",
    "tokenizer_tokens",
    "words",
]
