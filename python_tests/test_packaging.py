"""What people install: the source archive, the wheel built from it, and the wheel of a machine without a compiler."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="names libraries as Linux does"),
]


def build(hook: str, source: Path, out: Path, **environment: str) -> Path:
    """Call a PEP 517 hook of pyard's build backend, as pip does in `source`; returns the file that it made in `out`."""
    code = f"import pyard_backend; print(pyard_backend.{hook}({str(out)!r}))"
    variables = {**os.environ, "PYTHONPATH": str(source / "build_backend"), "PYARD_CUDA": "0", **environment}
    variables.pop("PYARD_NATIVE", None)
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=variables, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return out / finished.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made from this tree and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "sdist.lock"):  # setuptools collects the files in the tree itself; tests run side by side
        archive_file = build("build_sdist", ROOT, folder)
    with tarfile.open(archive_file) as archive:
        archive.extractall(folder, filter="data")
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    return source


def test_the_archive_has_what_a_build_and_a_reader_need(unpacked: Path) -> None:
    tracked = [ROOT / name for name in ("Makefile", "setup.py", "CMakeLists.txt", "constraints.txt", "README.md", "LICENSE")]
    for folder in ("csrc", "cmake", "build_backend", "docs", "recipes", "examples", "pyard"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        tracked += [path for path in files if not {"__pycache__", "node_modules"} & set(path.parts)]
    expected = {path.relative_to(ROOT) for path in tracked if path.suffix not in (".so", ".dylib")}
    found = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert expected - found - {Path("pyard/_build.json")} == set()


def test_a_wheel_of_the_archive_has_the_native_parts(unpacked: Path, tmp_path: Path) -> None:
    wheel = zipfile.ZipFile(build("build_wheel", unpacked, tmp_path))
    names = set(wheel.namelist())
    assert {
        "pyard/libpyard_ops.so",
        "pyard/_build.json",
        "pyard/py.typed",
        "pyard/__main__.py",
        "pyard/recipes/digits.yaml",
    } <= names
    assert [name for name in names if name.startswith("pyard/_trajectory.")]
    assert not [name for name in names if name.startswith(("python_tests", "benchmarks"))]
    wheel.extractall(tmp_path / "installed")
    code = "from pyard.ops.backend import library; print(library.path)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    printed = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert Path(printed.strip()) == tmp_path / "installed/pyard/libpyard_ops.so"


def test_a_wheel_for_an_index_has_a_manylinux_tag_and_no_torch(unpacked: Path, tmp_path: Path) -> None:
    """What `make wheels` does: an index refuses the tag linux_x86_64."""
    pytest.importorskip("auditwheel", reason="the extra 'wheels' is not installed: pip install -e '.[wheels]'")
    wheel = build("build_wheel", unpacked, tmp_path)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (options,) = re.findall(r"auditwheel repair (.*?)\s+-w dist", makefile)
    command = [sys.executable, "-m", "auditwheel", "repair", *shlex.split(options), "-w", str(tmp_path / "dist"), str(wheel)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (repaired,) = (tmp_path / "dist").glob("*.whl")
    (glibc,) = re.findall(r"^pyard_distill-[\d.]+-cp\d+-cp\d+-manylinux_2_(\d+)_\w+\.whl$", repaired.name)
    assert 17 <= int(glibc) <= int(os.confstr("CS_GNU_LIBC_VERSION").split(".")[-1])
    names = zipfile.ZipFile(repaired).namelist()
    assert not [name for name in names if "libtorch" in name or "libc10" in name or ".libs/" in name]
    zipfile.ZipFile(repaired).extractall(tmp_path / "installed")
    code = "from pyard.ops.backend import library; print(library.path)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    printed = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(printed.stdout.strip()) == tmp_path / "installed/pyard/libpyard_ops.so"


def test_without_a_compiler_the_wheel_is_plain_and_says_why(unpacked: Path, tmp_path: Path) -> None:
    wheel = zipfile.ZipFile(build("build_wheel", unpacked, tmp_path, CXX="/bin/false"))
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    record = json.loads(wheel.read("pyard/_build.json"))
    assert not record["built"]
    assert "a C++17 compiler is needed" in record["reason"]


def test_sources_that_do_not_compile_are_loud_in_a_checkout(unpacked: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(unpacked, source)
    header = source / "csrc/ops.h"
    header.write_text(f'#error "broken on purpose"\n{header.read_text(encoding="utf-8")}', encoding="utf-8")
    plain = zipfile.ZipFile(build("build_wheel", source, tmp_path / "plain"))
    assert "broken on purpose" in json.loads(plain.read("pyard/_build.json"))["reason"]
    (source / ".git").mkdir()
    with pytest.raises(AssertionError, match="broken on purpose"):
        build("build_wheel", source, tmp_path / "checkout")


def test_cuda_kernels_that_do_not_build_leave_their_reason(unpacked: Path, tmp_path: Path) -> None:
    real, other = Path(torch.__file__).parent, tmp_path / "overlay" / "torch"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (other / "version.py").write_text(f"__version__ = {torch.__version__!r}\ncuda = '13.0'\n")  # a torch with CUDA
    for part in ("include", "lib"):
        (other / part).symlink_to(real / part)
    path = os.pathsep.join([str(unpacked / "build_backend"), str(other.parent)])
    wheel = zipfile.ZipFile(build("build_wheel", unpacked, tmp_path, PYARD_CUDA="auto", CUDACXX="/bin/false", PYTHONPATH=path))
    assert "pyard/libpyard_ops.so" in wheel.namelist()
    record = json.loads(wheel.read("pyard/_build.json"))
    assert record["built"]
    assert record["cuda_failed"]
    assert record["cuda"].startswith("configuring the operators failed")
    assert "error" in record["cuda"].splitlines()[0].lower()


@pytest.mark.parametrize("variable", ["PYARD_CUDA", "PYARD_NATIVE"])
def test_a_mistyped_variable_is_an_error(variable: str, unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked / "build_backend"), variable: "yes"}
    code = f"import pyard_backend; pyard_backend.build_wheel({str(tmp_path)!r})"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode != 0
    assert f"{variable} must be auto, 0 or 1, not 'yes'" in finished.stderr
