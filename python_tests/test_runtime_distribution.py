"""pyard-runtime: the same modules, alone where there is no torch, and beside pyard-distill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from factories import digits_student, scenes_student

import pyard
from pyard.export import export_onnx
from pyard.export.pipeline import export_pipeline
from pyard.runtime import OnnxPipeline, OnnxStudent

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "runtime"

pytestmark = pytest.mark.skipif(not RUNTIME.is_dir(), reason="a source archive of pyard-distill has no runtime/")
slow = pytest.mark.slow


def test_modules_are_links_and_not_copies():
    files = [path for path in (RUNTIME / "pyard").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 10
    for path in files:
        assert path.resolve() == ROOT / path.relative_to(RUNTIME), f"{path} is a copy"


def test_modules_import_each_other_numpy_and_onnxruntime_alone(tmp_path):
    """A module that pyard.runtime imports and that runtime/pyard has no link to is missing on every server."""
    names = [path.relative_to(RUNTIME).with_suffix("") for path in (RUNTIME / "pyard").rglob("*.py")]
    names += [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "pyard/runtime").rglob("*.py")]
    names = [".".join(name.parts).removesuffix(".__init__") for name in names if name.name != "__main__"]
    code = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {{*sys.stdlib_module_names, "pyard", "numpy", "onnxruntime"}}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
for name in {sorted(set(names))!r}:
    assert importlib.import_module(name).__file__.startswith({str(RUNTIME)!r}), name
"""
    done = python(Path(sys.executable), code, PYTHONPATH=str(RUNTIME))
    assert done.returncode == 0, done.stderr


def test_both_projects_agree():
    full, alone = (tomllib.loads((f / "pyproject.toml").read_text(encoding="utf-8"))["project"] for f in (ROOT, RUNTIME))
    assert full["version"] == alone["version"] == pyard.__version__
    assert f"\nversion: {pyard.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{pyard.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert full["requires-python"] == alone["requires-python"]
    assert "scripts" not in alone  # bin/pyard would be a file of both
    ours = {requirement.split(";")[0] for requirement in full["dependencies"]}
    assert set(alone["dependencies"]) <= ours
    assert set(full["optional-dependencies"]["serve"]) <= {*alone["optional-dependencies"]["serve"], *ours}


def python(executable: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code where no compiler is found."""
    environment = {**os.environ, "PATH": str(executable.parent), "PYTHONPATH": "", **variables}
    return subprocess.run(
        [executable, "-P", "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


def pip(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYARD_NATIVE": "0", "PYARD_CUDA": "0", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what is built: setuptools leaves files in the tree that it builds."""
    folder = tmp_path_factory.mktemp("sources")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "build", "*.egg-info", "_build.json")
    for name in ("pyard", "build_backend", "runtime"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheels(sources: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    done = pip("wheel", "--no-build-isolation", "--no-deps", "-w", folder, sources, sources / "runtime")
    assert done.returncode == 0, done.stderr
    return {name: next(folder.glob(f"pyard_{name}-*.whl")) for name in ("distill", "runtime")}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("digits") / "digits.onnx"
    export_onnx(digits_student(), file)
    return file


def environment(folder: Path) -> Path:
    """A fresh virtual environment, without pip; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def alone(wheels, tmp_path_factory) -> Path:
    """An environment in which pip has installed pyard-runtime[serve,text] and what it depends on."""
    executable = environment(tmp_path_factory.mktemp("alone") / "venv")
    done = pip("--python", executable, "install", "numpy", "onnxruntime")
    if done.returncode:
        pytest.skip(f"pip finds no package index here: {done.stderr.strip().splitlines()[-1]}")
    done = pip("--python", executable, "install", f"{wheels['runtime']}[serve,text]")
    assert done.returncode == 0, done.stderr
    return executable


DRAW = "import sys, numpy; from pyard.runtime import OnnxStudent; "


@slow
def test_alone_it_draws_what_pyard_draws(alone: Path, digits: Path, tmp_path: Path):
    listed = {item["name"] for item in json.loads(pip("--python", alone, "list", "--format", "json").stdout)}
    assert "pyard-runtime" in listed
    assert not listed & {"torch", "diffusers", "pyard-distill", "jsonargparse", "onnx", "safetensors", "setuptools"}
    drawn = tmp_path / "drawn.npy"
    code = DRAW + f"numpy.save({str(drawn)!r}, OnnxStudent({str(digits)!r}, threads=1).sample([3, 1, 4], seed=7))"
    done = python(alone, code)
    assert (done.returncode, done.stderr) == (0, "")
    expected = OnnxStudent(digits, threads=1).sample([3, 1, 4], seed=7)
    assert np.abs(expected).max() > 0.9
    np.testing.assert_allclose(np.load(drawn), expected, rtol=0, atol=1e-4)


@slow
def test_alone_it_draws_from_prompts(alone: Path, tmp_path: Path):
    folder, drawn = tmp_path / "scenes", tmp_path / "drawn.npy"
    export_pipeline(scenes_student(), folder, form="sampler")
    prompts = ["a red circle above a blue square", "two green triangles"]
    code = f"import numpy; from pyard.runtime import OnnxPipeline; pipeline = OnnxPipeline({str(folder)!r}, threads=1); "
    done = python(alone, code + f"numpy.save({str(drawn)!r}, pipeline.sample({prompts!r}, seed=7))")
    assert (done.returncode, done.stderr) == (0, "")
    expected = OnnxPipeline(folder, ["CPUExecutionProvider"], 1).sample(prompts, seed=7)
    assert expected.std() > 10
    assert np.abs(np.load(drawn).astype(int) - expected).max() <= 1


@slow
def test_alone_the_doctor_runs_and_the_rest_says_what_is_missing(alone: Path):
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; from pyard.cli.command_line import main; sys.exit(main({list(words)!r}))"
        return python(alone, code)

    report = command("doctor")
    assert (report.returncode, report.stderr) == (0, "")
    assert "installed as pyard-runtime\n" in report.stdout
    assert "runtime only" in report.stdout
    assert "torch  " not in report.stdout
    assert "CPUExecutionProvider" in report.stdout
    assert json.loads(command("doctor", "--json").stdout)["distributions"] == ["pyard-runtime"]
    assert "usage: pyard doctor" in command("doctor", "--help").stdout
    for words in (["train", "--teacher", "digits"], ["export", "--help"]):
        done = command(*words)
        assert done.returncode == 2
        assert done.stderr == f"pyard {words[0]}: error: {pyard.version.MISSING}\n"
    done = python(alone, "import pyard; print(pyard.__version__, pyard.InputError.__name__); pyard.train")
    assert done.stdout == f"{pyard.__version__} InputError\n"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: pyard.train: {pyard.version.MISSING}"


def shared(folder: Path) -> Path:
    """A fresh environment that sees this one's packages (torch, numpy, onnxruntime), but not its pyard."""
    import torch

    executable = environment(folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "zz_packages.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n", encoding="utf-8")
    return executable


def installed_files(executable: Path) -> dict[str, set[str]]:
    code = """
import importlib.metadata as metadata, json, pathlib, sysconfig
site = sysconfig.get_path("purelib")
found = {name: [str(f.locate()) for f in d.files] for d in metadata.distributions(path=[site]) if (name := d.metadata["Name"])}
print(json.dumps(found))"""
    done = python(executable, code)
    assert done.returncode == 0, done.stderr
    return {name: set(files) for name, files in json.loads(done.stdout).items()}


def works(executable: Path, digits: Path, *, full: bool) -> None:
    """pyard draws, and trains if it is the whole of it."""
    code = DRAW + f"print(OnnxStudent({str(digits)!r}).sample([3], seed=7).std()); import pyard; print(pyard.__file__)"
    done = python(executable, code)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("pyard_runtime" in done.stdout.splitlines()[1]) != full
    assert python(executable, "import pyard; pyard.NoiseSchedule, pyard.train").returncode == (0 if full else 1)


@slow
@pytest.mark.parametrize("removed", ["pyard-distill", "pyard-runtime"])
@pytest.mark.parametrize("first", ["distill", "runtime"])
@pytest.mark.parametrize("editable", [False, True])
def test_beside_each_other_in_any_order(first, removed, editable, wheels, sources, digits, tmp_path):
    executable = shared(tmp_path / "venv")
    install = ["--python", executable, "install", "--no-deps", "--no-index", "--no-build-isolation"]
    full = ["-e", sources] if editable else [wheels["distill"]]
    steps = [full, [wheels["runtime"]]]
    for step in steps if first == "distill" else steps[::-1]:
        done = pip(*install, *step)
        assert done.returncode == 0, done.stderr
    files = installed_files(executable)
    assert not files["pyard-distill"] & files["pyard-runtime"]
    works(executable, digits, full=True)
    assert pip("--python", executable, "uninstall", "-y", removed).returncode == 0
    works(executable, digits, full=removed == "pyard-runtime")
    (left,) = {"pyard-distill", "pyard-runtime"} - {removed}
    assert pip("--python", executable, "uninstall", "-y", left).returncode == 0
    assert not [path for path in (tmp_path / "venv").rglob("*pyard*") if path.is_file()]
