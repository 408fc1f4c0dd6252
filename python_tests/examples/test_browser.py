"""The example page: its noise is pyard's in every bit, and its pictures are those of Python's onnxruntime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export.test_traced_text_to_image import tiny_text_student
from factories import digits_student, scenes_student, tiny_student
from filelock import FileLock
from models.autoencoders import plain_vae
from tiny_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

import pyard
from pyard.diffusion.noise import normal_quantile, standard_normal
from pyard.export import export_onnx
from pyard.export.pipeline import export_pipeline
from pyard.models.codec import LatentCodec
from pyard.runtime import OnnxPipeline, OnnxStudent
from pyard.runtime.prompts import PromptEncoder

PAGE = Path(__file__).parents[2] / "examples" / "browser"
DRIVER = Path(__file__).with_name("draw_in_browser.mjs")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")

needs_node = pytest.mark.skipif(NODE is None, reason="no node: install Debian's nodejs")


def javascript(code: str, *arguments: str) -> str:
    assert NODE is not None
    command = [NODE, "--input-type=module", "-e", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_node
def test_the_noise_is_that_of_python_in_every_bit():
    pairs = [(0, 0), (1, 5), (2**64 - 1, 2**64 - 1), (2**63 + 12345, 3), (7, 123456789012345)]
    code = f"""
import {{ standardNormal }} from {json.dumps((PAGE / "noise.js").as_uri())};
for (const [seed, index] of {json.dumps([[str(n) for n in pair] for pair in pairs])}) {{
  console.log(Buffer.from(standardNormal(BigInt(seed), BigInt(index), 4099).buffer).toString('hex'));
}}"""
    for line, (seed, index) in zip(javascript(code).split(), pairs, strict=True):
        assert bytes.fromhex(line) == standard_normal(seed, [index], (4099,)).tobytes()


@needs_node
def test_quantiles_are_those_of_python_in_every_bit():
    """Of probabilities in the far tails, which no seed that can be tried reaches, at the seams, and between."""
    seams = [0.075, 0.925, np.exp(-25.0), 0.5, 2.0**-53, 1 - 2.0**-53, 0.7071067811865476, 0.3]
    beside = [np.nextafter(p, side) for p in seams for side in (0.0, 1.0)]
    random = np.random.default_rng(0)
    probabilities = np.array([*seams, *beside, *(2.0 ** -random.uniform(1, 60, 3000)), *random.uniform(0, 1, 3000)])
    probabilities = probabilities[(probabilities > 0) & (probabilities < 1)]
    code = f"""
import {{ readFileSync }} from 'node:fs';
import {{ normalQuantile }} from {json.dumps((PAGE / "noise.js").as_uri())};
const given = new Float64Array(new Uint8Array(Buffer.from(readFileSync(0, 'utf8'), 'hex')).buffer);
console.log(Buffer.from(given.map(normalQuantile).buffer).toString('hex'));"""
    done = subprocess.run(
        [str(NODE), "--input-type=module", "-e", code],
        input=probabilities.tobytes().hex(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert bytes.fromhex(done.stdout.strip()) == normal_quantile(probabilities).tobytes()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("browser") / "digits.onnx"
    export_onnx(digits_student(), file, form="step")
    return file


@needs_node
def test_metadata_are_read_from_the_file(tmp_path: Path):
    file = tmp_path / "student.onnx"
    export_onnx(tiny_student(2, history_layers=1), file, form="step")
    code = f"""
import {{ readFileSync }} from 'node:fs';
import {{ readMetadata }} from {json.dumps((PAGE / "student.js").as_uri())};
const bytes = new Uint8Array(readFileSync({json.dumps(str(file))}));
console.log(JSON.stringify(readMetadata(bytes)));
for (const broken of [bytes.subarray(0, bytes.length / 2), new TextEncoder().encode('<!doctype html>'), new Uint8Array(0)]) {{
  try {{ readMetadata(broken); }} catch (error) {{ console.log(error.message); }}
}}"""
    found, *messages = javascript(code).splitlines()
    info = OnnxStudent(file).info
    assert (json.loads(found)["num_steps"], json.loads(found)["num_classes"]) == (info.num_steps, info.num_classes)
    assert len(messages) == 3
    assert all(message.startswith(("this is not an ONNX file", "this is not a file written by")) for message in messages)


@pytest.fixture(scope="module")
def packages() -> Path:
    """The packages of the page, which `npm ci` brings; its puppeteer drives the browser."""
    npm = shutil.which("npm")
    if npm is None or CHROMIUM is None:
        pytest.skip("no npm or no Chromium: install Debian's npm and chromium")
    folder = PAGE / "node_modules"
    with FileLock(PAGE / "npm.lock"):
        if not ((folder / "puppeteer-core").is_dir() and (folder / "@huggingface/tokenizers").is_dir()):
            done = subprocess.run(
                [npm, "ci", "--ignore-scripts", "--prefix", str(PAGE)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                network = ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "ECONNRESET")
                assert any(word in done.stderr for word in network), done.stderr
                pytest.skip(f"npm reaches no registry: {done.stderr.strip().splitlines()[0]}")
    return folder


@contextmanager
def served(student: Path) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, str(PAGE / "serve.py"), str(student), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)


def browse(packages: Path, url: str, *, fails: bool = False, **wanted: Any) -> dict[str, Any]:
    puppeteer = packages / "puppeteer-core/lib/esm/puppeteer/puppeteer-core.js"
    wanted = {"puppeteer": puppeteer.as_uri(), "chromium": CHROMIUM, "url": url, **wanted}
    done = subprocess.run(
        [str(NODE), str(DRIVER), json.dumps(wanted)], capture_output=True, text=True, encoding="utf-8", check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert bool(found["errors"]) == fails, found["errors"]
    origin = url.split("?")[0]
    assert all(request.startswith((origin, "data:", "blob:")) for request in found["requests"]), "it works offline"
    return found


DRAWS = [[3, "0"], [8, "1234"], [5, str(2**64 - 1)]]


def predictions(drawn: dict[str, Any]) -> list[np.ndarray]:
    return [np.reshape(one["data"], one["dims"]) for one in drawn["predictions"]]


@pytest.mark.slow
def test_pixels_are_those_of_python(digits: Path, packages: Path, tmp_path: Path):
    shot = tmp_path / "page.png"
    with served(digits) as url:
        found = browse(packages, url, draws=DRAWS, screenshot=str(shot))
    assert found["isolated"], "without it there are no threads"
    assert "4 steps, fp32" in found["about"]
    assert [caption.split("\n")[0] for caption in found["captions"]] == [f"step {step} of 4" for step in (1, 2, 3, 4)]
    assert all(caption.endswith(" ms") for caption in found["captions"])
    student = OnnxStudent(digits, threads=1)
    for drawn, (label, seed) in zip(found["drawn"], DRAWS, strict=True):
        assert (drawn["label"], drawn["seed"]) == (label, seed)
        expected = list(student.stream([label], seed=int(seed)))
        assert np.abs(expected[0] - expected[-1]).max() > 0.1
        for one, canvas, other in zip(predictions(drawn), drawn["canvases"], expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)
            shown = np.reshape(canvas, (8, 8, 4))
            assert np.abs(shown[..., :3] - (other[0, 0].clip(-1, 1)[..., None] + 1) * 127.5).max() <= 0.6
            assert (shown[..., 3] == 255).all()
    assert shot.stat().st_size > 10_000


@pytest.mark.slow
def test_webgpu_draws_the_same(digits: Path, packages: Path):
    """On Chromium's software renderer, where there is no GPU."""
    with served(digits) as url:
        found = browse(packages, url, draws=DRAWS[:1], provider="webgpu")
    if "webgpu" not in found["providers"]:
        pytest.skip("this Chromium has no WebGPU")
    assert any("ort.webgpu" in request for request in found["requests"])
    expected = OnnxStudent(digits, threads=1).stream([3], seed=0)
    for one, other in zip(predictions(found["drawn"][0]), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_pictures_of_a_decoder_and_a_sampler(packages: Path, tmp_path: Path):
    student = tiny_student(2, history_layers=1)
    student.codec = LatentCodec(plain_vae())
    for form in ("step", "sampler"):
        export_onnx(student, tmp_path / f"{form}.onnx", form=form)
        with served(tmp_path / f"{form}.onnx") as url:
            found = browse(packages, url, draws=[[4, "7"]])
        (drawn,) = found["drawn"]
        (expected,) = OnnxStudent(tmp_path / f"{form}.onnx").sample([4], seed=7)
        assert expected.std() > 5
        assert np.abs(predictions(drawn)[-1][0] - expected.astype(int)).max() <= 1
        assert len(drawn["predictions"]) == (2 if form == "step" else 1)
        assert np.abs(np.reshape(drawn["canvases"][-1], (*expected.shape[:2], 4))[..., :3] - expected.astype(int)).max() <= 1


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    export_pipeline(scenes_student(), folder, form="step")
    return folder


def scenes_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(pyard.__file__).parent / "teachers/data/scenes-text/tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("make", [scenes_tokenizer, t5_tokenizer, clip_tokenizer, qwen_tokenizer])
def test_prompts_become_the_token_numbers_of_python(make: Callable[[], Any], packages: Path, tmp_path: Path):
    make().save_pretrained(tmp_path / "tokenizer")
    # Known words, none, unknown ones, too many, and other letters.
    prompts = ["A red circle above a blue square.", "", "  two unheard-of things ", "a red circle, a Green square " * 9]
    prompts.append("héllo")
    usual = {"tokenizer": "tokenizer", "plain": False, "prefix": "", "suffix": "", "max_length": 9, "pads_to": "longest"}
    usual |= {"pad": 0, "pads_left": False}
    changes = [{}, {"plain": True, "max_length": 40}, {"pads_to": "max_length", "prefix": "a ", "suffix": " square", "pad": 3}]
    changes += [{"pads_to": "max_length", "pads_left": True, "max_length": 200}]
    cases = [({**usual, **change}, prompt) for change in changes for prompt in prompts]
    code = f"""
import {{ readFileSync }} from 'node:fs';
import {{ Tokenizer }} from {json.dumps((packages / "@huggingface/tokenizers/dist/tokenizers.min.mjs").as_uri())};
import {{ tokenNumbers }} from {json.dumps((PAGE / "pipeline.js").as_uri())};
const read = (name) => JSON.parse(readFileSync({json.dumps(str(tmp_path))} + '/tokenizer/' + name));
const tokenizer = new Tokenizer(read('tokenizer.json'), read('tokenizer_config.json'));
console.log(JSON.stringify({json.dumps(cases)}.map(([settings, prompt]) => tokenNumbers(tokenizer, settings, prompt))));"""
    for found, (settings, prompt) in zip(json.loads(javascript(code)), cases, strict=True):
        inputs = PromptEncoder(tmp_path, {}, lambda name: None).inputs(settings, [prompt])
        wanted = (inputs["input_ids"][0].tolist(), inputs["attention_mask"][0].tolist())
        assert (found["ids"], found["given"]) == wanted, (settings, prompt)


@pytest.mark.slow
def test_pictures_of_prompts_are_those_of_python(scenes: Path, packages: Path):
    draws = [["a red circle above a blue square", "0"], ["Two green triangles.", "5"], ["a large yellow circle", "6"]]
    with served(scenes) as url:
        found = browse(packages, url, draws=draws)
    assert "3 steps, fp32" in found["about"]
    pipeline = OnnxPipeline(scenes, ["CPUExecutionProvider"], 1)
    for drawn, (prompt, seed) in zip(found["drawn"], draws, strict=True):
        assert (drawn["prompt"], drawn["seed"]) == (prompt, seed)
        expected = list(pipeline.stream([prompt], seed=int(seed)))
        latents = pipeline.latents(pipeline.encode(prompt), standard_normal(int(seed), [0], pipeline.sizes[0].sample_shape))
        assert expected[-1].std() > 10
        np.testing.assert_allclose(predictions(drawn)[-1], latents, rtol=0, atol=1e-3)
        for canvas, picture in zip(drawn["canvases"], expected, strict=True):
            assert np.abs(np.reshape(canvas, (*picture.shape[1:3], 4))[..., :3] - picture[0].astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_several_text_encoders_and_templates(name: str, packages: Path, tmp_path: Path):
    """SD3: three encoders, beside and below each other, and pooled embeddings. Qwen-Image: a template that is dropped."""
    student, _ = tiny_text_student(name, tmp_path / "pipeline")
    student.codec = LatentCodec(tmp_path / "pipeline" / "vae")
    export_pipeline(student, tmp_path / "exported", form="step")
    draws = [["a red circle above a blue square", "0"], ["The green square, " * 12, "5"]]
    with served(tmp_path / "exported") as url:
        found = browse(packages, url, draws=draws)
    pipeline = OnnxPipeline(tmp_path / "exported", ["CPUExecutionProvider"], 1)
    for drawn, (prompt, seed) in zip(found["drawn"], draws, strict=True):
        expected = list(pipeline.stream([prompt], seed=int(seed)))
        assert expected[-1].std() > 5
        for canvas, picture in zip(drawn["canvases"], expected, strict=True):
            assert np.abs(np.reshape(canvas, (*picture.shape[1:3], 4))[..., :3] - picture[0].astype(int)).max() <= 1


@pytest.mark.slow
def test_what_is_no_student_is_said_on_the_page(digits: Path, packages: Path, tmp_path: Path):
    whole, cut, other = digits.read_bytes(), tmp_path / "cut.onnx", tmp_path / "other.onnx"
    cut.write_bytes(whole[: len(whole) // 2])
    other.write_text("<!doctype html>", encoding="utf-8")
    export_onnx(tiny_student(2, history_layers=1), tmp_path / "latents.onnx", form="step")
    messages = {cut: "is not an ONNX file", other: "this is not", tmp_path / "latents.onnx": "export the student with --vae"}
    for file, message in messages.items():
        with served(file) as url:
            assert message in browse(packages, url, draws=[], fails=True)["message"]
