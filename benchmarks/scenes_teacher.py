"""How often the text-to-image teacher of captioned scenes draws what its prompts ask for.

    python -m benchmarks.scenes_teacher [--folder FOLDER]

diffusers' own `PixArtSigmaPipeline` draws scenes that no training saw, as many of each category and split; the checker of
`pyard.data.captioned_scenes` reads them back. Writes scenes-teacher.json, with Wilson's 95 % intervals, and a contact sheet.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PixArtSigmaPipeline
from tqdm import tqdm

from pyard.data.captioned_scenes import (
    CATEGORIES,
    SPLITS,
    Prompt,
    Proportion,
    Scene,
    SceneSetting,
    adherence,
    draw_scene,
    follow_prompts,
    save_contact_sheet,
)
from pyard.data.captioned_scenes.tokenizer import MAX_TOKENS
from pyard.errors import InputError
from pyard.teachers.scenes_text import scenes_text_folder

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 250
SEED = 2**63 + 1  # the training draws below


def load_pipeline(folder: Path) -> PixArtSigmaPipeline:
    """The stock pipeline of a teacher's folder, silent."""
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, vae=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def balanced_scenes(per_category: int, setting: SceneSetting) -> dict[str, list[Scene]]:
    """As many scenes of every category that a split has, by split."""
    scenes: dict[str, list[Scene]] = {}
    for split in SPLITS:
        for category in CATEGORIES:
            try:
                drawn = [draw_scene(SEED, i, setting, split=split, category=category) for i in range(per_category)]
            except InputError:  # the split does not have it
                continue
            scenes.setdefault(split, []).extend(drawn)
    return scenes


def draw(pipeline: PixArtSigmaPipeline, captions: list[str], num_steps: int, cfg_scale: float) -> np.ndarray:
    """Pictures [n, 3, P, P] of n captions; picture i starts from noise of seed i."""
    parts = []
    for start in tqdm(range(0, len(captions), BATCH_SIZE), desc=f"{num_steps} steps, guidance {cfg_scale}", leave=False):
        texts = captions[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(texts))]
        latents = pipeline(
            texts,
            num_inference_steps=num_steps,
            guidance_scale=cfg_scale,
            generator=generators,
            output_type="latent",
            use_resolution_binning=False,
            clean_caption=False,
            max_sequence_length=MAX_TOKENS,  # the padding is masked; 300 tokens of it would only take longer
        ).images
        parts.append(latents.numpy())
    return np.concatenate(parts)


def shares(pictures: np.ndarray, prompts: list[Prompt], setting: SceneSetting) -> dict[str, Any]:
    """Adherence by category as JSON."""
    found = adherence(follow_prompts(pictures, prompts, setting), prompts)
    return {name: entry(share) for name, share in found.items()}


def entry(share: Proportion) -> dict[str, Any]:
    """A proportion as JSON."""
    low, high = share.interval
    return {
        "followed": share.yes,
        "prompts": share.total,
        "share": round(share.value, 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=None, help="the teacher's folder; default: the one pyard ships")
    parser.add_argument("--per-category", type=int, default=200, help="prompts of each category and split")
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args()
    folder = flags.folder or scenes_text_folder()
    taught = json.loads((folder / "teach.json").read_text(encoding="utf-8"))
    setting = SceneSetting(size=taught["size"], cells=taught["cells"], jitter=taught["jitter"])
    pipeline = load_pipeline(folder)
    start = time.perf_counter()
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "scheduler": type(pipeline.scheduler).__name__,
        "num_steps": flags.num_steps,
        "cfg_scale": flags.cfg_scale,
        "splits": {},
    }
    for split, scenes in balanced_scenes(flags.per_category, setting).items():
        pictures = draw(pipeline, [scene.caption for scene in scenes], flags.num_steps, flags.cfg_scale)
        report["splits"][split] = shares(pictures, [scene.prompt for scene in scenes], setting)
        for name, found in report["splits"][split].items():
            low, high = found["interval"]
            print(f"{split:<16} {name:<18} {found['share']:6.1%} ({low:.1%} to {high:.1%}) of {found['prompts']}", flush=True)
        if split == "train":
            chosen = np.arange(0, len(scenes), max(1, len(scenes) // 48))[:48]
            save_contact_sheet(pictures[chosen], [scenes[i].caption for i in chosen], flags.out / "scenes-teacher.png")
    report["seconds"] = round(time.perf_counter() - start, 1)
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "scenes-teacher.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
