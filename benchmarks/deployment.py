"""What a text-to-image student costs where it may run: milliseconds a picture, megabytes, and how often prompts are followed.

    pyard demo --text
    python -m benchmarks.deployment demo/text/ard-defaults

The student of the built-in teacher `scenes-text` in PyTorch, in onnxruntime in three precisions and in a browser, beside stock
diffusers with the teacher. Every way gets the same prompts and the same noise, one at a time, from the text to the picture; the
ways take turns, so that ratios stand where other programs disturb the machine. Writes deployment.json and deployment.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from diffusers import PixArtSigmaPipeline
from tqdm import tqdm

import pyard
from pyard.bench.machine import cores, processor
from pyard.data.captioned_scenes import Proportion, follow_prompts, scene_batch
from pyard.diffusion.noise import standard_normal
from pyard.evaluation.captioned_scenes import PROMPT_SEED
from pyard.export.pipeline import export_pipeline
from pyard.models.student import Student
from pyard.runtime import OnnxPipeline

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "examples" / "browser"
TEACHER = Path(pyard.__file__).parent / "teachers/data/scenes-text"
STOCK, PYTORCH, BROWSER = "stock diffusers, the teacher", "PyTorch", "browser, WebAssembly"
PRECISIONS = ("fp32", "fp16", "int8")

Draw = Callable[[str, int], tuple[np.ndarray, float]]  # prompt and seed to a picture [3, H, W], -1 to 1, and milliseconds


def timed(draw: Callable[[str, np.ndarray], np.ndarray], shape: tuple[int, ...]) -> Draw:
    """A way of drawing that runs in this process, from prompt and noise [1, 3, H, W]."""

    def run(prompt: str, seed: int) -> tuple[np.ndarray, float]:
        noise = standard_normal(seed, [0], shape)
        begin = time.perf_counter()
        picture = draw(prompt, noise)
        return picture, 1000 * (time.perf_counter() - begin)

    return run


def in_pytorch(run: Path, shape: tuple[int, ...]) -> Draw:
    pipe: Any = pyard.ARDPipeline.from_pretrained(run, pipeline=TEACHER)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, noise: np.ndarray) -> np.ndarray:
        return pipe(prompt, latents=torch.from_numpy(noise), output_type="latent").images[0].float().numpy()

    return timed(draw, shape)


def in_diffusers(steps: int, guidance: float, shape: tuple[int, ...]) -> Draw:
    pipe: Any = PixArtSigmaPipeline.from_pretrained(TEACHER, vae=None)
    pipe.set_progress_bar_config(disable=True)
    usual = dict(num_inference_steps=steps, guidance_scale=guidance, output_type="latent", use_resolution_binning=False)
    usual |= dict(height=shape[1], width=shape[2], clean_caption=False)

    def draw(prompt: str, noise: np.ndarray) -> np.ndarray:
        return pipe(prompt, latents=torch.from_numpy(noise), **usual).images[0].float().numpy()

    return timed(draw, shape)


def in_onnxruntime(folder: Path, threads: int) -> Draw:
    pipeline = OnnxPipeline(folder, ["CPUExecutionProvider"], threads)

    def draw(prompt: str, noise: np.ndarray) -> np.ndarray:
        return pipeline.latents(pipeline.encode(prompt), noise)[0]

    return timed(draw, pipeline.sizes[0].sample_shape)


def in_browser(folder: Path, stack: ExitStack) -> tuple[Draw, dict[str, Any]] | None:
    """The example page in Chromium; None where node, Chromium or the packages are missing."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    puppeteer = PAGE / "node_modules/puppeteer-core/lib/esm/puppeteer/puppeteer-core.js"
    if chromium is None or shutil.which("node") is None or not puppeteer.exists():
        print("no browser: it needs node, chromium, and npm ci --prefix examples/browser")
        return None
    pipe: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    server = subprocess.Popen([sys.executable, str(PAGE / "serve.py"), str(folder), "--port", "0"], **pipe)
    stack.callback(server.kill)
    driver = Path(__file__).with_name("draw_in_browser.mjs")
    assert server.stdout is not None
    command = ["node", str(driver), puppeteer.as_uri(), chromium, server.stdout.readline().strip()]
    node = stack.enter_context(subprocess.Popen(command, **pipe))
    assert node.stdin is not None
    assert node.stdout is not None
    asked, answered = node.stdin, node.stdout
    stack.callback(asked.close)
    about = json.loads(answered.readline())

    def draw(prompt: str, seed: int) -> tuple[np.ndarray, float]:
        asked.write(json.dumps([prompt, seed]) + "\n")
        asked.flush()
        answer = json.loads(answered.readline())
        return np.reshape(np.array(answer["data"], dtype=np.float32), answer["dims"])[0], answer["milliseconds"]

    return draw, about


def megabytes(*places: Path) -> float:
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def export(student: Student, folder: Path, **settings: Any) -> Path:
    if not folder.exists():
        export_pipeline(student, folder, text_encoders=TEACHER, **settings)
    return folder


def measure(run: Path, prompts: int, threads: int, exported: Path | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    student = Student.from_pretrained(run).eval()
    shape = student.sample_shape
    settings = student.config.teacher_settings or {}
    steps, guidance = settings["teacher_steps"], settings["cfg_scale"]
    batch = scene_batch(PROMPT_SEED, range(prompts), None, "train")
    text = TEACHER / "text_encoder", TEACHER / "tokenizer"
    facts: dict[str, Any] = {}
    with TemporaryDirectory() as name, ExitStack() as stack:
        stock = f"{STOCK}, {steps} steps"
        ways: dict[str, Draw] = {stock: in_diffusers(steps, guidance, shape), PYTORCH: in_pytorch(run, shape)}
        weights = (run / "student" if (run / "student").is_dir() else run) / "model.safetensors"
        sizes = {stock: megabytes(TEACHER / "transformer", *text), PYTORCH: megabytes(weights, *text)}
        place = exported or Path(name)
        for precision in PRECISIONS:
            # int8 is above the export's bound; what that costs is what is measured here.
            bound = 10.0 if precision == "int8" else None
            folder = export(student, place / precision, form="sampler", precision=precision, parity_bound=bound)
            ways[f"onnxruntime, {precision}"] = in_onnxruntime(folder, threads)
            sizes[f"onnxruntime, {precision}"] = megabytes(folder)
        step = export(student, place / "step", form="step")
        if (browser := in_browser(step, stack)) is not None:
            ways[BROWSER], facts = browser
            sizes[BROWSER] = megabytes(step)
        pictures: dict[str, list[np.ndarray]] = {way: [] for way in ways}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for seed, caption in enumerate(tqdm(batch.captions)):
            for way, draw in ways.items():
                picture, milliseconds = draw(caption, seed)
                pictures[way].append(picture)
                if seed >= 5:  # those before warm caches up
                    times[way].append(milliseconds)
    rows = []
    for way in ways:
        drawn = np.stack(pictures[way])
        followed = Proportion(int(follow_prompts(drawn, batch.prompts).sum()), prompts)
        row = dict(way=way, milliseconds=statistics.median(times[way]), megabytes=sizes[way], followed=followed.value)
        row["interval"] = list(followed.interval)
        row["rms_difference_to_pytorch"] = float(np.sqrt(np.mean((drawn - np.stack(pictures[PYTORCH])) ** 2)))
        rows.append(row)
    machine = dict(processor=processor(), cores=cores(), threads=threads, load_average=round(os.getloadavg()[0], 1))
    versions = dict(python=platform.python_version(), torch=torch.__version__, onnxruntime=onnxruntime.__version__)
    return dict(
        prompts=prompts,
        student_steps=student.num_steps,
        size=f"{shape[2]} x {shape[1]}",
        machine=machine,
        versions=versions,
        browser=facts,
        rows=rows,
    )


def table(result: dict[str, Any]) -> str:
    lines = ["| | ms a picture | MB | prompts followed | RMS difference to PyTorch |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        low, high = (100 * value for value in row["interval"])
        difference = "" if row["way"] == PYTORCH else f"{row['rms_difference_to_pytorch']:.1e}"
        followed = f"{100 * row['followed']:.1f} % ({low:.0f} … {high:.0f})"
        lines.append(f"| {row['way']} | {row['milliseconds']:.1f} | {row['megabytes']:.1f} | {followed} | {difference} |")
    machine = result["machine"]
    lines += [
        "",
        f"{result['prompts']} prompts, one at a time, from text to picture ({result['size']} pixels); medians, in turns.",
        f"Student of {result['student_steps']} steps. {machine['processor']}, {machine['threads']} thread(s), load",
        f"average {machine['load_average']} at the end. MB: weights, text encoder. In brackets: 95 % intervals.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="run folder of a scenes-text student")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1, help="for PyTorch and onnxruntime; the browser chooses its own")
    parser.add_argument("--exported", type=Path, help="folder to keep exports in; existing ones are reused")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    result = measure(options.student, options.prompts, options.threads, options.exported)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "deployment.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "deployment.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
