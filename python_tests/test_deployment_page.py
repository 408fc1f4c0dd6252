"""docs/deployment.md: its commands for installing without torch and for the browser are run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from factories import digits_student

from pyard.export import export_onnx

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "runtime").is_dir(), reason="a source archive of pyard-distill has no runtime/"),
]


def commands(title: str) -> list[str]:
    """The lines of the first bash block below a title."""
    (section,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#+ )", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].splitlines()


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
    export, install, serve = commands("In the browser")
    done = bash(export, clone, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    done = bash(install, clone)
    if done.returncode and re.search(r"ENOTFOUND|ECONN|ETIMEDOUT|EAI_AGAIN|ENETUNREACH", done.stderr):
        pytest.skip(f"npm reaches no registry: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    assert serve.endswith("--port 8080")
    command = ["bash", "-c", f"exec {serve.replace('python', sys.executable, 1).replace('8080', '0')}"]
    process = subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        for name, local in (("", "examples/browser/index.html"), ("student.onnx", "step.onnx")):
            with urllib.request.urlopen(url + name, timeout=60) as answer:
                assert answer.read() == (clone / local).read_bytes()
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        with urllib.request.urlopen(f"{url}node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs", timeout=60) as answer:
            assert answer.headers["Content-Type"] == "text/javascript"
    finally:
        process.terminate()
        process.wait(60)
    for arguments, message in ((["nowhere.onnx"], "no such file"), (["step.onnx"], "run npm ci")):
        shutil.rmtree(clone / "examples/browser/node_modules", ignore_errors=True)
        done = bash(f"{sys.executable} examples/browser/serve.py {' '.join(arguments)}", clone)
        assert done.returncode == 1
        assert message in done.stderr
