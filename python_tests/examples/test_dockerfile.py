"""The Dockerfile of the service: built where there is Docker, its steps run in virtual environments where there is none."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from factories import digits_student
from PIL import Image

from pyard.export import export_onnx
from pyard.runtime import OnnxStudent

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples" / "Dockerfile"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "runtime").is_dir(), reason="a source archive of pyard-distill has no runtime/"),
]


def instructions() -> Iterator[tuple[str, str]]:
    for line in DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            yield word, rest


class Steps:
    """What Docker does with the file: for each stage a folder that stands for its root, and a fresh virtual environment."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.stages: dict[str, Path] = {}
        self.entrypoint: list[str] = []
        self.healthcheck: list[str] = []
        for word, rest in instructions():
            getattr(self, f"step_{word.lower()}")(rest)

    def step_from(self, rest: str) -> None:
        image, _, name = rest.partition(" AS ")
        assert re.fullmatch(r"python:3\.\d+-slim", image)
        self.root = self.folder / (name or "service")
        self.stages[name] = self.root
        subprocess.run([sys.executable, "-m", "venv", self.root / "venv"], check=True)
        tools = self.root / "venv/bin"
        # Neither torch nor a compiler: no path leads to one.
        self.environment = {"PATH": f"{tools}:/usr/bin:/bin", "CC": "/bin/false", "CXX": "/bin/false"}
        self.environment |= {
            name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HTTP", "SSL", "http"))
        }

    def step_workdir(self, rest: str) -> None:
        self.here = self.root / rest.lstrip("/")
        self.here.mkdir(parents=True)

    def step_copy(self, rest: str) -> None:
        *options, source, target = rest.split()
        origin = ROOT / source
        kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        assert options or f"!{source}" in kept, "Docker does not see it"
        for option in options:
            origin = self.stages[option.removeprefix("--from=")] / source.lstrip("/")
        to = self.root / target.lstrip("/") if target.startswith("/") else self.here / target
        if origin.is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info")  # as .dockerignore says
            shutil.copytree(origin, to, symlinks=True, ignore=left_out)
        else:
            shutil.copy(origin, to)

    def step_run(self, rest: str) -> None:
        done = self.bash(self.inside(rest))
        if "No matching distribution" in done.stderr and "setuptools" in done.stderr:
            pytest.skip(f"pip finds no package index here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr

    def step_user(self, rest: str) -> None:
        assert rest != "root"

    def step_expose(self, rest: str) -> None:
        assert rest == "8000"

    def step_healthcheck(self, rest: str) -> None:
        self.healthcheck = json.loads(self.inside(rest.removeprefix("CMD ")))

    def step_entrypoint(self, rest: str) -> None:
        self.entrypoint = json.loads(self.inside(rest))

    def inside(self, text: str) -> str:
        text = re.sub(r"(?<![\w.:/])/(?=wheels|student\.onnx)", f"{self.root}/", text)
        return text.replace("8000", str(self.port)).replace("0.0.0.0", "127.0.0.1")

    def bash(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", "-ec", line], cwd=self.here, env=self.environment, capture_output=True, text=True, check=False
        )


def test_its_steps_make_a_service_that_draws_without_torch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    steps = Steps(tmp_path, port)
    export_onnx(digits_student(), steps.root / "student.onnx")
    assert steps.bash("python -c 'import torch'").returncode == 1
    assert steps.bash("python -m pyard doctor").returncode == 0
    log = (tmp_path / "log").open("w", encoding="utf-8")
    process = subprocess.Popen(steps.entrypoint, cwd=steps.here, env=steps.environment, stderr=log)
    try:
        answer = wait_for(f"http://127.0.0.1:{port}/image?label=3&seed=7", process)
        picture = np.asarray(Image.open(io.BytesIO(answer))).astype(int)
        assert subprocess.run(steps.healthcheck, env=steps.environment, check=False).returncode == 0
    finally:
        process.terminate()
        process.wait(60)
    (sample,) = OnnxStudent(steps.root / "student.onnx").sample([3], seed=7)
    assert picture.shape == (8, 8)
    assert picture.std() > 50
    assert np.abs(picture - (sample[0].clip(-1, 1) + 1) * 127.5).max() <= 1
    assert subprocess.run(steps.healthcheck, env=steps.environment, capture_output=True, check=False).returncode != 0


def wait_for(url: str, process: subprocess.Popen[bytes]) -> bytes:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.URLError:
            assert process.poll() is None, "the service ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_docker_builds_it() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker daemon on this machine")
    subprocess.run([docker, "build", "-q", "-f", str(DOCKERFILE), "-t", "pyard-serve:test", str(ROOT)], check=True)
    code = "import importlib.util as i, pyard.runtime; assert i.find_spec('torch') is None"
    subprocess.run([docker, "run", "--rm", "--entrypoint", "python", "pyard-serve:test", "-c", code], check=True)
