"""The command line: every stage of pyard is a sub-command whose flags and help are those of its Python function."""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import itertools
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyard.errors import InputError
from pyard.version import __version__


class Command(NamedTuple):
    """Where a sub-command lives, what the overview says of it, and flags that may stand without a value, for their default.

    The flags are the function's parameters; with `config`, the fields of that dataclass, which the function takes.
    """

    module: str
    function: str
    summary: str
    bare: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()  # flags whose values may stand first, without the flag
    config: str = ""


COMMANDS = {
    "demo": Command("pyard.demo.digits", "demo", "distil real digits into an ONNX student, with pictures and a table"),
    "teach": Command("pyard.teachers.digits", "teach", "train the built-in teacher of handwritten digits"),
    "teach scenes-text": Command("pyard.teachers.scenes_text", "teach", "train the built-in text-to-image teacher"),
    "convert": Command("pyard.teachers.convert", "convert", "turn a DiT, SiT or diffusers checkpoint into a teacher, or back"),
    "trajectories": Command("pyard.trajectories", "generate_trajectories", "write a teacher's ODE trajectories to a store"),
    "trajectories verify": Command("pyard.trajectories", "verify_trajectories", "check every checksum", positional=("store",)),
    "trajectories stats": Command("pyard.trajectories", "trajectory_stats", "print and draw it", positional=("store",)),
    "trajectories merge": Command("pyard.trajectories", "merge_trajectories", "join the parts of several folders"),
    "trajectories convert": Command(
        "pyard.trajectories", "convert_trajectories", "import or export the authors' .npz files", positional=("source", "out")
    ),
    "train": Command(
        "pyard.training", "train_command", "train a student on trajectories (generates missing ones)", config="TrainConfig"
    ),
    "estimate": Command(
        "pyard.estimate.recipe_cost", "estimate", "say what a recipe costs: bytes, GPU-hours, memory", positional=("recipe",)
    ),
    "consolidate": Command("pyard.training.sharded", "consolidate", "make a student's folder of a checkpoint, sharded or not"),
    "sample": Command("pyard.sampling.draw", "sample_to_file", "draw samples with a student"),
    "describe": Command(
        "pyard.estimate.student_cost",
        "describe",
        "say what a student costs: parameters, FLOPs, cache, history",
        positional=("student",),
    ),
    "evaluate": Command("pyard.evaluation", "evaluate", "measure a student against its teacher and real data"),
    "export": Command("pyard.export", "export", "write a student as one ONNX file and check it", bare=("--onnx",)),
    "bench onnx": Command("pyard.bench.onnx", "bench_onnx", "time students in PyTorch and onnxruntime"),
    "bench quality": Command("pyard.bench.quality", "bench_quality", "compare students that differ in one thing"),
    "doctor": Command("pyard.cli.doctor", "doctor", "say what is built, for what, and what to do about what is not"),
}

OVERVIEW = """usage: pyard COMMAND [flags]   (also: python -m pyard COMMAND)

Few-step students of diffusion transformers, by autoregressive distillation.

{commands}

Each command explains itself: pyard COMMAND --help. Flags can also come from a YAML file (--config FILE); --print_config
writes one. Set PYARD_TRACEBACK=1 to see the traceback of an input error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0 done, 2 wrong input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--version"], ["-V"]):
        print(f"pyard {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(OVERVIEW.format(commands="\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())))
        return 0 if argv else 2
    name = next((words for words in (" ".join(argv[:2]), argv[0]) if words in COMMANDS), argv[0])
    if name not in COMMANDS:
        print(f"pyard: error: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(name, COMMANDS[name], argv[len(name.split()) :])


def run(name: str, command: Command, argv: Sequence[str]) -> int:
    """Parse a command's flags, call its function and turn an InputError into one line and status 2."""
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the paragraphs and examples of docstrings."""

    module = importlib.import_module(command.module)
    function = command_line_face(getattr(module, command.function))
    settings = getattr(module, command.config) if command.config else None
    description = (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()
    parser = ArgumentParser(prog=f"pyard {name}", description=description, formatter_class=Formatter)
    parser.add_argument("--config", action="config", help="read flags from this YAML file")
    if settings is None:
        parser.add_function_arguments(function, fail_untyped=False, sub_configs=False)
    else:
        parser.add_class_arguments(settings, fail_untyped=False, sub_configs=False)
    parsed = parser.parse_args(complete(name_values(argv, command.positional), settings or function, command.bare))
    flags = vars(parser.instantiate(parsed))
    flags.pop("config", None)
    try:
        result = function(**flags) if settings is None else function(settings(**flags))
    except (InputError, OSError) as error:
        if os.environ.get("PYARD_TRACEBACK"):
            raise
        print(f"pyard {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npyard {name}: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def name_values(argv: Sequence[str], positional: tuple[str, ...]) -> list[str]:
    """The words with `--name` before each of the first ones that are values of the `positional` flags."""
    leading = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))[: len(positional)]
    named = [word for name, value in zip(positional, leading, strict=False) for word in (f"--{name}", value)]
    return [*named, *argv[len(leading) :]]


def complete(argv: Sequence[str], function: Callable[..., Any], bare: tuple[str, ...]) -> list[str]:
    """Words as jsonargparse takes them.

    --num-steps is --num_steps, a lone switch is true, a lone `bare` flag is left out, and several values after a flag that
    takes a list are one list.
    """
    parameters = inspect.signature(function, eval_str=True).parameters.items()
    switches = [name for name, p in parameters if p.annotation in (bool, bool | None)]
    kinds = {name: (p.annotation, *typing.get_args(p.annotation)) for name, p in parameters}
    lists = [name for name, members in kinds.items() if list in [typing.get_origin(m) for m in members]]
    argv, words = joined(argv, lists), []
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        alone = not equals and (i + 1 == len(argv) or argv[i + 1].startswith("--"))
        if not word.startswith("--"):
            words.append(word)
        elif not (alone and flag in bare):
            words.append("--" + name + (equals + value if not (alone and name in switches) else "=true"))
    return words


def joined(argv: Sequence[str], lists: Sequence[str]) -> list[str]:
    """The words with several values of a flag of `lists` as one: --trajectories a b is --trajectories '["a", "b"]'."""
    words: list[str] = []
    rest = list(argv)
    while rest:
        words.append(rest.pop(0))
        if words[-1].startswith("--") and words[-1].removeprefix("--").replace("-", "_") in lists:
            values = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
            if len(values) > 1:
                words.append(f"[{', '.join(map(_item, values))}]")
                rest = rest[len(values) :]
    return words


def _item(word: str) -> str:
    """A word as an item of a JSON list: numbers as they are, everything else a string."""
    try:
        return word if isinstance(json.loads(word), int | float) else json.dumps(word)
    except ValueError:
        return json.dumps(word)


def command_line_face(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the types that can be typed in a shell only: `str | Path | Teacher` becomes `str | Path`."""
    hints = typing.get_type_hints(function, localns=_Names(function.__globals__))
    hints = {name: typable(hint) for name, hint in hints.items()}
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in signature.parameters.values()]

    @functools.wraps(function)
    def face(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    del face.__wrapped__  # type: ignore[attr-defined]
    face.__annotations__ = {p.name: p.annotation for p in parameters}
    face.__signature__ = signature.replace(parameters=parameters, return_annotation=signature.empty)  # type: ignore[attr-defined]
    return face


class _Names(dict[str, Any]):
    """Names of a module, with a class of no meaning for those that it imports for the type checker alone."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, None) or type(name, (), {})


def typable(hint: Any) -> Any:
    """A type hint without the members of a union that only Python code can pass."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    kept = [m for m in typing.get_args(hint) if not isinstance(m, type) or m in (str, int, float, bool, Path, type(None))]
    return functools.reduce(lambda a, b: a | b, kept)
