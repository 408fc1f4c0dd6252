"""docs/deployment.md: its commands for installing without torch and for the browser are run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from factories import digits_student, scenes_student

from pyard.export import export_onnx

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "runtime").is_dir(), reason="a source archive of pyard-distill has no runtime/"),
]


def commands(title: str) -> list[str]:
    """The lines of the bash blocks below a title."""
    (section,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#+ )", PAGE, re.DOTALL | re.MULTILINE)
    return "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)).splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the commands are typed in: a copy, since installing leaves files in the tree."""
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info", "node_modules")
    for name in ("pyard", "runtime", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=left_out)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    return tmp_path


def bash(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", **variables}
    return subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_python_without_torch(clone: Path):
    export_onnx(digits_student(), clone / "student.onnx")
    lines = commands("Python without torch")
    assert len(lines) == 4
    for line in lines:
        done = bash(line, clone)
        if " install " in line and "No matching distribution" in done.stderr:
            pytest.skip(f"pip finds no package index here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 1, 8, 8)\n"


def test_in_the_browser(clone: Path):
    if shutil.which("npm") is None:
        pytest.skip("no npm: install Debian's npm")
    digits_student().save_pretrained(clone / "runs/digits")
    scenes_student().save_pretrained(clone / "runs/scenes")
    install, *others = commands("In the browser")
    done = bash(install, clone)
    if done.returncode and re.search(r"ENOTFOUND|ECONN|ETIMEDOUT|EAI_AGAIN|ENETUNREACH", done.stderr):
        pytest.skip(f"npm reaches no registry: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    exports, serves = others[::2], others[1::2]
    for export in exports:
        done = bash(export, clone, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    for serve, query, name, local in zip(
        serves,
        ("", "?student=student/"),
        ("student.onnx", "student/transformer/weights.data"),
        ("step.onnx", "scenes/transformer/weights.data"),
        strict=True,
    ):
        with served(serve, clone) as url:
            assert url.endswith(f"/{query}")
            page = url.removesuffix(query)
            assert get(page) == ("text/html", (clone / "examples/browser/index.html").read_bytes())
            assert get(page + name)[1] == (clone / local).read_bytes()
            for library in ("onnxruntime-web/dist/ort.wasm.bundle", "@huggingface/tokenizers/dist/tokenizers"):
                assert get(f"{page}node_modules/{library}.min.mjs")[0] == "text/javascript"
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(f"{page}student/../../LICENSE")
    shutil.rmtree(clone / "examples/browser/node_modules")
    for argument, message in (("nowhere.onnx", "no such file"), ("step.onnx", "run npm ci")):
        done = bash(f"{sys.executable} examples/browser/serve.py {argument}", clone)
        assert done.returncode == 1
        assert message in done.stderr


@contextmanager
def served(command: str, folder: Path) -> Iterator[str]:
    """The address that a server prints, as long as it runs."""
    assert command.endswith("--port 8080")
    line = f"exec {command.replace('python', sys.executable, 1).replace('8080', '0')}"
    process = subprocess.Popen(["bash", "-c", line], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)


def get(url: str) -> tuple[str, bytes]:
    """Content type and content, with the headers that threads need."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        return answer.headers["Content-Type"], answer.read()
