"""The command line: every stage of pyard is a sub-command whose flags and help are those of its Python function."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyard.cli.flags import arguments, as_yaml, flags_of, read_flags
from pyard.cli.help_text import plain_help
from pyard.errors import InputError
from pyard.storage.typed import hints_of
from pyard.version import MISSING, __version__


class Command(NamedTuple):
    """Where a sub-command lives, what the overview says of it, and flags that may stand without a value, for their default.

    The flags are the function's parameters; with `config`, the fields of that dataclass, which the function takes.
    """

    module: str
    function: str
    summary: str
    bare: tuple[str, ...] = ()  # flags that may stand without a value, for their default
    positional: tuple[str, ...] = ()  # flags whose values may stand first, without the flag
    config: str = ""


COMMANDS = {
    "demo": Command("pyard.demo.digits", "demo", "distil real digits into an ONNX student, with pictures and a table"),
    "teach": Command("pyard.teachers.digits", "teach", "train the built-in teacher of handwritten digits"),
    "teach scenes-text": Command("pyard.teachers.scenes_text", "teach", "train the built-in text-to-image teacher"),
    "convert": Command(
        "pyard.teachers.convert",
        "convert",
        "convert a checkpoint to a teacher or back, or a text-to-image student to a LoRA",
        positional=("source",),
    ),
    "trajectories": Command("pyard.trajectories", "generate_trajectories", "write a teacher's ODE trajectories to a store"),
    "trajectories verify": Command(
        "pyard.trajectories", "verify_trajectories", "check a store against its checksums", positional=("store",)
    ),
    "trajectories stats": Command(
        "pyard.trajectories", "trajectory_stats", "summarise a store and draw a few of its trajectories", positional=("store",)
    ),
    "trajectories merge": Command("pyard.trajectories", "merge_trajectories", "join stores that were written in parts"),
    "trajectories convert": Command(
        "pyard.trajectories", "convert_trajectories", "import or export the authors' .npz files", positional=("source", "out")
    ),
    "train": Command(
        "pyard.training", "train_command", "train a student; generates the trajectories if none are given", config="TrainConfig"
    ),
    "estimate": Command(
        "pyard.estimate.recipe_cost", "estimate", "estimate the bytes, GPU-hours and memory of a recipe", positional=("recipe",)
    ),
    "consolidate": Command(
        "pyard.training.sharded", "consolidate", "convert a checkpoint, sharded or not, into a student folder"
    ),
    "sample": Command("pyard.sampling.draw", "sample_to_file", "draw samples with a student"),
    "describe": Command(
        "pyard.estimate.student_cost",
        "describe",
        "print what a student costs: parameters, FLOPs, cache, history",
        positional=("student",),
    ),
    "evaluate": Command("pyard.evaluation", "evaluate", "measure a student against its teacher and real data"),
    "export": Command("pyard.export", "export", "write a student as one ONNX file and check it", bare=("onnx",)),
    "bench onnx": Command("pyard.bench.onnx", "bench_onnx", "time students in PyTorch and onnxruntime"),
    "bench quality": Command("pyard.bench.quality", "bench_quality", "compare students that differ in one setting"),
    "doctor": Command(
        "pyard.cli.doctor", "doctor", "check the installation: what is built, for what, and what to do about problems"
    ),
}

# Commands that go on where they were interrupted.
_RESUMED = ("demo", "teach", "teach scenes-text", "trajectories", "train", "bench quality")

OVERVIEW = """usage: pyard COMMAND [flags]   (also: python -m pyard COMMAND)

Few-step students of diffusion transformers, by autoregressive distillation.

{commands}

For the flags of a command: pyard COMMAND --help. For the version: pyard --version.
Flags may be written with hyphens or underscores (--num-steps, --num_steps). A list is written as several values (3 1 4), as
numbers with commas (3,1,4) or in brackets ('[a, b]'). Flags can also come from a YAML file or a named recipe (--config FILE);
flags on the command line override it. --print_config prints such a file. Set PYARD_TRACEBACK=1 to see the traceback of an
input error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0 done, 2 wrong input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may know ASCII alone
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
    try:
        module = importlib.import_module(command.module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("pyard."):
            print(f"pyard {name}: error: {MISSING}", file=sys.stderr)
            return 2
        return _cannot_import(name, error)
    function = typable_function(getattr(module, command.function))
    settings = getattr(module, command.config) if command.config else None
    target = settings or function
    if any(word in ("-h", "--help") for word in argv):
        print_help(name, function, settings)
        raise SystemExit(0)
    flags = flags_of(target)
    shows = [word for word in argv if word in ("--print_config", "--print-config")]
    try:
        words = [word for word in argv if word not in shows]
        found = read_flags(words, flags, bare=command.bare, positional=command.positional, complete=not shows)
        if shows:
            print(as_yaml(target, found), end="")
            return 0
    except InputError as error:
        print(f"pyard {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    # Weights, shards and prompts are mapped, and no exception tells of a disk's error in a mapping: the process is killed.
    with contextlib.suppress(ImportError, AttributeError):  # it was not built, or by an earlier version
        importlib.import_module("pyard._trajectory").exit_on_bus_errors(f"pyard {name}")
    try:
        with _warnings_in_one_line(name):
            values = arguments(target, found)
            result = function(**values) if settings is None else function(settings(**values))
    except ImportError as error:
        return _cannot_import(name, error)
    except (InputError, OSError) as error:
        if os.environ.get("PYARD_TRACEBACK"):
            raise
        print(f"pyard {name}: error: {in_flags(' '.join(str(error).split()), flags)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("PYARD_TRACEBACK") or not _is_out_of_memory(error):
            raise
        found = " ".join(str(error).split())[:200]
        print(f"pyard {name}: error: out of memory: {found}; docs/out-of-memory.md says what needs less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        then = "; the same command resumes" if name in _RESUMED else ""
        print(f"\npyard {name}: interrupted{then}", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's or torch's error, or that of its allocator on the CPU; torch may not be installed."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _cannot_import(name: str, error: ImportError) -> int:
    """Say in one line that a package that a command needs is missing or broken; one of pyard's own modules is a fault of it."""
    if os.environ.get("PYARD_TRACEBACK") or (error.name or "pyard").partition(".")[0] == "pyard":
        raise error
    print(f"pyard {name}: error: {' '.join(str(error).split())}; `pyard doctor` says what to install", file=sys.stderr)
    return 2


def in_flags(message: str, flags: Collection[str]) -> str:
    """A message of a Python function with its arguments as they are typed: `family='dit'` is `--family dit`."""

    def assignment(match: re.Match[str]) -> str:
        return f"--{match[1]} {match[2].strip(chr(39))}" if match[1] in flags else match[0]

    message = re.sub(r"(?<![\w.(-])([a-z_]+)=('[^']*'|[\w./]+)", assignment, message)
    # "batch_size is 0; expected ...", after "training: " or as a whole.
    return re.sub(r"(?<![\w-])([a-z_.]+) is (?=\S)", lambda m: f"--{m[0]}" if m[1] in flags else m[0], message, count=1)


@contextlib.contextmanager
def _warnings_in_one_line(name: str) -> Iterator[None]:
    """Warnings of pyard as one line each; those of other packages as they are."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        if category is UserWarning and "pyard" in Path(filename).parts:
            print(f"pyard {name}: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, lineno, *more)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = usual


def print_help(name: str, function: Callable[..., Any], settings: Any) -> None:
    """The flags of a command with what docstrings say of them, those of a dataclass in its groups."""
    from argparse import SUPPRESS, RawDescriptionHelpFormatter

    try:
        from jsonargparse import ArgumentParser, DefaultHelpFormatter
    except ModuleNotFoundError:  # where pyard-runtime alone is installed
        print(f"usage: pyard {name} [flags]\n\n{inspect.getdoc(function)}")
        return

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the paragraphs and examples of docstrings, and says types in plain words."""

        def _expand_help(self, action: Any) -> str:
            return plain_help(super()._expand_help(action))

        def _format_action_invocation(self, action: Any) -> str:
            # The second form of a list's flag, `--students+`, is jsonargparse's own.
            flags = re.sub(r", --[\w.]+\+ \S+$", "", super()._format_action_invocation(action))
            return flags.replace(",null}", ",none}")

    description = (inspect.getdoc(function) or "").split("\nArgs:")[0].strip()
    usage = f"pyard {name} [--config FILE] [--print_config] [flags]"
    parser = ArgumentParser(prog=f"pyard {name}", usage=usage, description=description, formatter_class=Formatter)
    parser.add_argument("--config", action="config", help="read flags from this YAML file or named recipe")
    if settings is None:
        parser.add_function_arguments(function, fail_untyped=False, sub_configs=False)
    else:
        parser.add_class_arguments(settings, fail_untyped=False, sub_configs=False)
        _regroup(parser, getattr(settings, "GROUPS", {}))
    for action in parser._actions:
        if action.dest == "print_config":
            action.help, action.nargs = "print these settings as YAML that --config reads, and exit", 0
        elif action.help == "Path to a configuration file.":  # of a dataclass among the flags: its fields are flags here
            action.help = SUPPRESS
    parser.print_help()


def _regroup(parser: Any, groups: Mapping[str, str]) -> None:
    """Move a dataclass's flags into groups, each from the field that it begins with."""
    titles = {first: title for title, first in groups.items()}
    current = None
    for group in list(parser._action_groups):
        for action in list(group._group_actions):
            if action.dest in titles:
                current = parser.add_argument_group(titles[action.dest])
            if current is not None and "." not in action.dest:
                group._group_actions.remove(action)
                current._group_actions.append(action)
    # The flags of dataclasses in it come last, and what is empty now is not shown.
    nested = [group for group in parser._action_groups if any("." in action.dest for action in group._group_actions)]
    parser._action_groups = [g for g in parser._action_groups if g not in nested and g._group_actions] + nested


def typable_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the types that can be typed in a shell only: `str | Path | Teacher` becomes `str | Path`."""
    hints = {name: typable(hint) for name, hint in hints_of(function).items()}
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in signature.parameters.values()]
    parameters = [p for p in parameters if p.annotation is not type(None)]  # for Python alone, such as `grid`

    @functools.wraps(function)
    def typed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    del typed.__wrapped__  # type: ignore[attr-defined]
    typed.__annotations__ = {p.name: p.annotation for p in parameters}
    typed.__signature__ = signature.replace(parameters=parameters, return_annotation=signature.empty)  # type: ignore[attr-defined]
    return typed


def typable(hint: Any) -> Any:
    """A type hint without the members of a union that only Python code can pass."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    kept = [m for m in typing.get_args(hint) if not isinstance(m, type) or m in (str, int, float, bool, Path, type(None))]
    return functools.reduce(lambda a, b: a | b, kept)
