"""docs/deployment.md: its commands are run as they stand there, on other ports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from factories import digits_student, scenes_student
from services import answers, free_port, wait_until

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "runtime").is_dir(), reason="a source archive of pyard-distill has no runtime/"),
]


def commands(title: str) -> list[str]:
    """The lines of the bash blocks below a title."""
    (section,) = re.findall(rf"^#+ {title}\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)).splitlines()


def copy_of_the_tree(folder: Path) -> Path:
    """What the commands are typed in: a copy, since installing leaves files in the tree."""
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info", "node_modules")
    for name in ("pyard", "runtime", "examples"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    shutil.copy(ROOT / "LICENSE", folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clone after the page's first commands, and after its first two for a machine without torch."""
    clone = copy_of_the_tree(tmp_path_factory.mktemp("clone"))
    digits_student().save_pretrained(clone / "runs/digits")
    scenes_student().save_pretrained(clone / "runs/scenes")
    exports = commands("Deployment")
    assert len(exports) == 2
    for line in exports:
        done = bash(line, clone, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    for line in commands("Python without torch")[:2]:
        install(line, clone)
    return clone


def install(line: str, clone: Path) -> None:
    done = bash(line, clone)
    if "No matching distribution" in done.stderr:
        pytest.skip(f"pip finds no package index here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def bash(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", **variables}
    return subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_python_without_torch(exported: Path):
    lines = commands("Python without torch")[2:]
    assert len(lines) == 3
    printed = []
    for line in lines:
        done = bash(line, exported)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[1:] == ["(1, 1, 8, 8)\n", "(1, 16, 16, 3)\n"]
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (exported / "snippet.py").write_text(code, encoding="utf-8")
    done = bash("serving/bin/python snippet.py", exported)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "student.onnx: sampler of 4 steps, fp32, on CPUExecutionProvider", *["(1, 16, 16, 3)"] * 3
    ]  # fmt: skip


def test_one_machine(exported: Path):
    printed = typed("One machine", exported)
    assert b"IEND" in (exported / "three.png").read_bytes()
    assert (exported / "circles.png").read_bytes().startswith(b"\x89PNG")
    assert (exported / "previews.multipart").read_bytes().count(b"IEND") == 3
    assert '{"status":"ok","waiting":0}' in printed
    assert '"num_classes":10' in printed
    assert 'pyard_requests_total{status="200"} 1.0' in printed


def test_many_machines(exported: Path):
    printed = typed("Many machines", exported)
    assert (exported / "three-by-ray.png").read_bytes().startswith(b"\x89PNG")
    assert '{"status":"ok"}' in printed


def typed(title: str, clone: Path) -> str:
    """What the commands of a section print, services aside: those run until the section ends."""
    ports: dict[str, int] = {}
    printed = ""
    with ExitStack() as stack:
        for line in commands(title):
            for port in set(re.findall(r"\b800\d\b", line)):
                line = line.replace(port, str(ports.setdefault(port, free_port())))
            if "serve.py" in line:
                environment = {**os.environ, "PYTHONPATH": "", "RAY_USAGE_STATS_ENABLED": "0"}
                process = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=clone, env=environment)
                stack.callback(process.wait, 120)
                stack.callback(process.terminate)
                wait_until(partial(stopped_or_answers, process, int(line.split("--port ")[1].split()[0])), seconds=180)
                assert process.poll() is None, line
            elif " install " in line:
                install(line, clone)
            else:
                done = bash(line, clone)
                assert done.returncode == 0, (line, done.stderr)
                printed += done.stdout
    return printed


def stopped_or_answers(process: subprocess.Popen[bytes], port: int) -> bool:
    return process.poll() is not None or answers(port)


def test_in_the_browser(tmp_path: Path):
    clone = copy_of_the_tree(tmp_path)
    if shutil.which("npm") is None:
        pytest.skip("no npm: install Debian's npm")
    digits_student().save_pretrained(clone / "runs/digits")
    scenes_student().save_pretrained(clone / "runs/scenes")
    first, *others = commands("In the browser")
    done = bash(first, clone)
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
