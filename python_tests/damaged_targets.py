"""What is read of damaged inputs, and how: commands, calls of the library, and flags with values that they do not take."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damaged_files import (
    ANY_FILE,
    JSON_FILE,
    JSON_LINES,
    NPZ,
    PICKLE,
    PICTURE,
    SAFETENSORS,
    YAML_FILE,
    Damage,
    changed_value,
    rewriting,
)

from pyard.cli.command_line import main
from pyard.errors import InputError

Call = Callable[[Path], int | None]


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Args:
        name: of its folder among the good ones.
        files: patterns of the files in it that are damaged.
        read: reads it, given the folder.
        more: damages beside those of every file, by ending.
        weight: how often it is damaged, beside others.
        tolerates: names of damages with which it can be read, though the file cannot.
        ending: what the files' endings are taken for; None: what they are.
    """

    name: str
    files: tuple[str, ...]
    read: Call
    more: tuple[Damage, ...] = ()
    weight: int = 1
    tolerates: tuple[str, ...] = ()
    ending: str | None = None


def damages_of(file: str, target: Target) -> tuple[Damage, ...]:
    by_ending = {
        ".json": JSON_FILE, ".safetensors": SAFETENSORS, ".pt": PICKLE, ".npz": NPZ, ".yaml": YAML_FILE, ".jsonl": JSON_LINES,
        ".png": PICTURE,
    }  # fmt: skip
    own = by_ending.get(Path(file).suffix if target.ending is None else target.ending, ())
    # Those that know the file's format go deepest, so they come as often as all others.
    return (*own, *own, *ANY_FILE, *target.more, *target.more)


def _command(line: str, *words: str) -> Call:
    """A command line, and words that may have spaces; FOLDER is where the input is."""
    return lambda folder: main([word.replace("FOLDER", str(folder)) for word in (*line.split(), *words)])


def _python(function: Callable[[Path], Any]) -> Call:
    """A call of the library, whose InputError ends as that of a command does."""

    def call(folder: Path) -> int:
        try:
            _require_finite(function(folder))
        except InputError as error:
            print(f"pyard: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0

    return call


def _require_finite(found: Any) -> None:
    """What comes out with status 0 is to be numbers."""
    for part in found if isinstance(found, list | tuple) else [found]:
        array = part.detach().float().numpy() if isinstance(part, torch.Tensor) else part
        if isinstance(array, np.ndarray) and array.dtype.kind == "f":
            assert np.isfinite(array).all(), "a result of NaN or infinity"


def _onnx(folder: Path) -> list[Any]:
    from pyard.runtime import OnnxStudent

    return [OnnxStudent(file, threads=1).sample([0, 1]) for file in sorted(folder.glob("*.onnx"))]


def _feature_network(folder: Path) -> Any:
    from pyard.evaluation.onnx_network import open_onnx

    functions = open_onnx(folder / "student.onnx", {})
    return [] if functions else [np.zeros(1)]


def _reference(folder: Path) -> None:
    from pyard.evaluation.reference import load_reference

    class Mean:
        name, size = "mean", 128

        def features(self, images: np.ndarray) -> np.ndarray:
            return np.repeat(images.mean(axis=(1, 2, 3))[:, None], 128, axis=1).astype(np.float64)

    for name in ("images.npz", "small.npz", "statistics.npz"):
        load_reference(folder / name, Mean(), (1, 8, 8))


def _real(folder: Path) -> list[Any]:
    from pyard.data.real_data import RealData, RealReader

    # A whole epoch: only the samples that are used are read.
    found = [RealData.load(folder / name, (1, 8, 8), 5) for name in ("real.npz", "real.safetensors")]
    return [next(RealReader(data, data.count, seed=0, flips=True))[0] for data in found]


def _pictures(folder: Path) -> list[Any]:
    from pyard.evaluation.images import folder_images

    return list(folder_images(folder, 8, 3, 2))


def _vae_of(folder: Path) -> Any:
    from pyard.models.codec import LatentCodec

    codec = LatentCodec(folder / "vae")
    codec.check((4, 2, 2))
    return codec.decode(torch.randn(1, 4, 2, 2))


def _read_prompts(folder: Path) -> None:
    from pyard.conditions import read_prompts

    for name in ("prompts.txt", "prompts.jsonl"):
        read_prompts(folder / name)


def _prompt_table(folder: Path) -> Any:
    from pyard.conditions import PromptTable

    table = PromptTable(folder / "table")
    table.verify()
    return [table.take(table.null([0, 1]))["tokens"], len(table.texts)]


def _embedding_table(folder: Path) -> Any:
    from pyard.conditions import load_conditions

    table = load_conditions(folder)
    if table is None:
        raise InputError("no table there, which is said by whoever needs one")
    return table.take([0, 1])["tokens"]


def _batches(folder: Path) -> list[Any]:
    from pyard.trajectories import TrajectoryReader

    return [
        next(TrajectoryReader(folder / "store", 4, target="denoised", backend=backend, prefetch=0)).frames  # type: ignore[arg-type]
        for backend in ("python", "auto")
    ]


def _recipe(folder: Path) -> None:
    from pyard.training.config import TrainConfig

    TrainConfig.read(folder / "recipe.yaml")


def _text_teacher(name: str) -> Call:
    def call(folder: Path) -> Any:
        import pyard
        from pyard.teachers.text_to_image.text_encoder import PipelineTextEncoder

        teacher: Any = pyard.load_teacher(folder / name)
        if teacher.codec is not None:
            teacher.codec.check(teacher.sample_shape)
        teacher.visits(4, teacher.sample_shape)
        return [one.tensors["tokens"] for one in PipelineTextEncoder(folder / name).encode(["a red circle"])]

    return _python(call)


def _metadata(path: Path, rng: random.Random) -> None:
    """pyard's entry in an ONNX file with another value."""
    import onnx

    model = onnx.load(path)
    entry = next(prop for prop in model.metadata_props if prop.key == "pyard")
    entry.value = changed_value(json.loads(entry.value), rng).encode(errors="replace").decode()
    path.unlink()
    onnx.save(model, path)


def _graph(path: Path, rng: random.Random) -> None:
    """A graph with other names, an operator that there is none of, or weights in a file elsewhere."""
    import onnx

    model = onnx.load(path)
    what = rng.randrange(5)
    if what == 0:
        model.graph.input[0].name = "x"
    elif what == 1:
        rng.choice(model.graph.node).op_type = "Nonsense"
    elif what == 2:
        del model.graph.node[rng.randrange(len(model.graph.node))]
    elif what == 3:
        tensor = rng.choice(model.graph.initializer)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        for key, value in (("location", rng.choice(("../../../etc/passwd", "/dev/zero", "none.data"))), ("length", "64")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    else:
        model.opset_import[0].version = rng.choice((1, 99, 2**40))
    path.unlink()
    path.write_bytes(model.SerializeToString())


_ONNX = (*(Damage("metadata", _metadata, False),) * 12, *(Damage("graph", _graph, False),) * 5)
_TEXT = (
    rewriting("no UTF-8", lambda content, rng: content + b"\xff\xfe", certain=True),
    rewriting("a NUL", lambda content, rng: content + b"\0\n", certain=True),
)

_STORE = ("store/*.json", "store/shards/*")
_RUN = ("run/*.json*", "run/*.yaml", "run/checkpoints/*/*")
_RESUME = "train --config FOLDER/run/settings.yaml --teacher FOLDER/teacher --trajectories FOLDER/store --out FOLDER/run"
_CERTAIN = tuple(
    {damage.name for damages in (ANY_FILE, JSON_FILE, SAFETENSORS, PICKLE, YAML_FILE) for damage in damages if damage.certain}
)

TARGETS = (
    Target("teacher", ("teacher/*",), _command("convert FOLDER/teacher --out FOLDER/out"), weight=3),
    Target("student", ("student/*",), _command("sample --student FOLDER/student --labels 0,1 --out FOLDER/o.npz"), weight=4),
    Target("student", ("student/*",), _command("describe FOLDER/student")),
    Target("student", ("student/*",), _command("export --student FOLDER/student --onnx FOLDER/s.onnx")),
    Target("checkpoint", ("dit.pt",), _command("convert FOLDER/dit.pt --num_heads 2 --out FOLDER/out"), weight=5),
    Target(
        "checkpoint",
        ("old.pt",),
        _command("convert FOLDER/old.pt --num_heads 2 --family dit --out FOLDER/out"),
        ending="",
        weight=2,
    ),
    Target("safetensors", ("*",), _command("convert FOLDER/dit.safetensors --num_heads 2 --out FOLDER/out"), weight=3),
    Target("store", _STORE, _command("trajectories verify FOLDER/store"), weight=3),
    # It says which shards there are, and what is wrong with the others.
    Target("store", _STORE, _command("trajectories stats FOLDER/store"), weight=3, tolerates=_CERTAIN),
    Target("store", _STORE, _python(_batches), weight=4),
    Target("stopped", _RUN, _command("consolidate --run FOLDER/run --out FOLDER/out"), weight=3, tolerates=_CERTAIN),
    Target("stopped", _RUN, _command(_RESUME), weight=3, tolerates=_CERTAIN),
    Target("recipe", ("recipe.yaml",), _command("train --config FOLDER/recipe.yaml --print_config"), weight=4),
    Target("recipe", ("recipe.yaml",), _python(_recipe), weight=3),
    Target("recipe", ("recipe.yaml",), _command("estimate FOLDER/recipe.yaml --tflops 100"), weight=2),
    Target("pictures", ("*",), _python(_pictures), weight=4, tolerates=("folder",)),
    Target("reference", ("*",), _python(_reference), weight=5),
    Target("real", ("*",), _python(_real), weight=4),
    Target("vae", ("vae/*",), _python(_vae_of), weight=2),
    Target("texts", ("*",), _python(_read_prompts), _TEXT, weight=2, tolerates=("web page", "pointer", "brackets")),
    Target("prompts", ("table/*", "table/shards/*"), _python(_prompt_table), weight=4),
    Target("table", ("conditions/*",), _python(_embedding_table), weight=2),
    Target("tree", ("zt/4/7/*.npz",), _command("trajectories convert FOLDER FOLDER/store --num_steps 2"), weight=2),
    Target("onnx", ("*.onnx",), _python(_onnx), _ONNX, weight=5),
    Target("onnx", ("student.onnx",), _python(_feature_network), _ONNX[-5:]),
    Target("dit", ("dit/*/*",), _command("convert FOLDER/dit/transformer --out FOLDER/out"), weight=3),
    Target("pipeline", ("pixart/*.json", "pixart/*/*"), _text_teacher("pixart"), weight=4, tolerates=_CERTAIN),
    Target("pipeline", ("sd3/*.json", "sd3/*/*"), _text_teacher("sd3"), weight=3, tolerates=_CERTAIN),
)

# Flags with values that they do not take, or hardly; the commands end at once with any value that they do take.
_FLAGS = {
    "sample --student FOLDER/student --out FOLDER/o.npz": (
        "labels seed batch_size dtype sample_shape height network prompts pipeline out student"
    ),
    "describe --student FOLDER/student": "student network batch_size",
    "export --student FOLDER/student --onnx FOLDER/s.onnx": "form precision opset parity_bound batch_size vae onnx",
    "convert --source FOLDER/student --out FOLDER/out": "source out num_heads num_classes weights to rank family",
    "trajectories stats FOLDER/student": "picture trajectories vae teacher store",
    "consolidate --run FOLDER/student --out FOLDER/out": "run out step weights network",
    "evaluate --students FOLDER/student --teacher_steps 0 --count 4": (
        "students count seed batch_size reference features labels sample_shape prompts clip"
    ),
    "train --teacher FOLDER/none --out FOLDER/run": (
        "teacher num_steps history_layers mask window target output heads batch_size max_steps learning_rate lr_schedule "
        "ema_decay save_every seed cfg_scale adversarial.r1 num_trajectories lora_rank keep_last warmup_steps history_bias"
    ),
}
_FLAG_VALUES = (
    "",
    "-1",
    "-2",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1" + "0" * 30,
    "1.5",
    "[]",
    "{}",
    "[[[[]]]]",
    "none",
    "true",
    "x",
    "1,2,x",
    "[1, 2",
    "[" * 5000,
    "*a",
    "&a [*a]",
    "../..",
    "/dev/zero",
    "/dev/null",
    "ä" * 300,
    "a" * 5000,
    "-",
    "--",
    "\x00",
    "!!python/object/apply:os.system [x]",
    "0x10",
    "1_000",
    "é",
    "~",
    "package.module:Class",
    "os:system",
    "FOLDER",
    "FOLDER/student/config.json",
    "FOLDER/student/model.safetensors",
)


def flag_damage(rng: random.Random) -> tuple[str, Call]:
    """A command with a flag that has values of no kind that it takes; and its name."""
    line = rng.choice(list(_FLAGS))
    flag = rng.choice(_FLAGS[line].split())
    values = [rng.choice(_FLAG_VALUES) for _ in range(rng.choice((1, 1, 1, 2)))]
    return f"{line} --{flag} {values!r:.60}", _command(line, f"--{flag}", *values)
