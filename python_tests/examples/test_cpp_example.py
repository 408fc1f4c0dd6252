"""The C++ example draws what Python draws: the same noise to the last bit, the same samples up to rounding."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from factories import randomise, tiny_student, tiny_teacher

import pyard
from pyard.diffusion.noise import normal_quantile, standard_normal
from pyard.export import export_onnx
from pyard.models.student import Student
from pyard.runtime import OnnxStudent

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

# Reads probabilities from its input, writes their quantiles; then the noise of the samples that its arguments name.
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "standard_normal.h"
int main(int, char** arguments) {
  double p = 0;
  while (std::fread(&p, sizeof p, 1, stdin) == 1) {
    const double x = pyard::normal_quantile(p);
    std::fwrite(&x, sizeof x, 1, stdout);
  }
  for (; arguments[1] != nullptr; arguments += 2) {
    std::vector<float> noise(1001);
    const auto number = [](const char* text) { return std::strtoull(text, nullptr, 10); };
    pyard::standard_normal(number(arguments[1]), number(arguments[2]), noise.data(), noise.size());
    std::fwrite(noise.data(), sizeof(float), noise.size(), stdout);
  }
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler; set CXX to one")
def test_the_noise_is_pythons_to_the_last_bit(tmp_path: Path) -> None:
    (tmp_path / "noise.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{EXAMPLES}"]
    subprocess.run([COMPILER, *flags, str(tmp_path / "noise.cpp"), "-o", str(tmp_path / "noise")], check=True)
    tails = 2.0 ** -np.arange(2.0, 53.0)
    probability = np.concatenate([tails, 1.0 - tails, np.linspace(1e-6, 1.0 - 1e-6, 10_001)])
    samples = [(0, 0), (7, 123), (2**64 - 1, 2**64 - 2), (2**63, 5)]
    command = [str(tmp_path / "noise"), *(str(number) for pair in samples for number in pair)]
    done = subprocess.run(command, input=probability.tobytes(), capture_output=True, check=True)
    quantiles, noise = done.stdout[: probability.nbytes], done.stdout[probability.nbytes :]
    np.testing.assert_array_equal(np.frombuffer(quantiles), normal_quantile(probability))
    expected = [standard_normal(seed, [index], (1001,))[0] for seed, index in samples]
    np.testing.assert_array_equal(np.frombuffer(noise, dtype=np.float32).reshape(len(samples), -1), expected)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built example. cmake finds onnxruntime in the system's folders and in those of CMAKE_PREFIX_PATH."""
    cmake = shutil.which("cmake")
    if cmake is None or COMPILER is None:
        pytest.skip("no cmake or no C++ compiler")
    build = tmp_path_factory.mktemp("examples")
    done = subprocess.run([cmake, "-S", EXAMPLES, "-B", build], capture_output=True, text=True, check=False)
    if done.returncode and "Could not find ONNXRUNTIME_" in done.stderr:
        pytest.skip("no onnxruntime for C++: install Debian 13's libonnxruntime-dev, or set CMAKE_PREFIX_PATH to a release")
    assert done.returncode == 0, done.stderr
    subprocess.run([cmake, "--build", build], check=True, capture_output=True)
    return build / "onnx_inference"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = tiny_teacher(in_channels=1)
    student = Student.from_teacher(teacher, pyard.TimeGrid.build(teacher.schedule, 2), history_layers=1)
    randomise(student, 1)
    file = tmp_path_factory.mktemp("export") / "student.onnx"
    export_onnx(student.eval(), file, opset=20)  # what the oldest onnxruntime that distributions have reads
    return file


def draw(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)


def test_samples_are_those_of_the_runtime(program: Path, path: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "samples.f32", OnnxStudent(path).sample([3, 0, 4], seed=2**64 - 1)
    done = draw(program, path, out, 2**64 - 1, 3, 0, 4)
    assert (done.returncode, done.stderr) == (0, "")
    found = np.fromfile(out, dtype=np.float32).reshape(expected.shape)
    # onnxruntime of two versions may compute one graph: the error of an export against PyTorch is what is allowed.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()

    standard_normal(2**64 - 1, range(3), expected.shape[1:]).tofile(tmp_path / "noise.f32")
    assert draw(program, path, tmp_path / "again.f32", tmp_path / "noise.f32", 3, 0, 4).returncode == 0
    assert (tmp_path / "again.f32").read_bytes() == out.read_bytes()

    assert draw(program, path, tmp_path / "samples.pgm", 2**64 - 1, 3, 0, 4).returncode == 0
    head, pixels = (tmp_path / "samples.pgm").read_bytes().split(b"255\n", 1)
    assert head == b"P5\n24 8\n"
    levels = (np.concatenate(list(found[:, 0]), axis=1).clip(-1, 1) + 1) * 127.5
    assert np.abs(np.frombuffer(pixels, dtype=np.uint8).reshape(8, 24) - levels).max() <= 0.501


def test_wrong_input_is_said(program: Path, path: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.f32"
    export_onnx(tiny_student(2, history_layers=1), tmp_path / "step.onnx", form="step", opset=20)
    (tmp_path / "short.f32").write_bytes(b"1234")
    for arguments, message in (
        ((path, out, 0, 5), "label 5: the student has 5 classes"),
        ((path, out, 0, -1), "label -1: the student has 5 classes"),
        ((path, out, 0, "3x"), "label 3x: expected a whole number"),
        ((path, out, tmp_path / "short.f32", 1), "expected a seed, or a file of 256 bytes of noise"),
        ((path, tmp_path / "samples.ppm", 0, 1), "the samples have 1 channels"),
        ((tmp_path / "step.onnx", out, 0, 1), "no student of the form 'sampler'"),
        ((tmp_path / "missing.onnx", out, 0, 1), "missing.onnx"),
        ((path, tmp_path / "nowhere" / "samples.f32", 0, 1), "cannot be written"),
    ):
        done = draw(program, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
    assert draw(program, path).returncode == 2
