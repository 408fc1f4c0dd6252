"""Reading prompts from a text file, JSON lines, a picture folder with captions, or Python strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyard.errors import InputError
from pyard.storage.reading import parse_json, read_text

METADATA_NAME = "metadata.jsonl"

_EXPECTED = f"expected a .txt file, a .jsonl file, a folder with {METADATA_NAME}, or a list of texts"
_CAPTION_KEYS = ("text", "prompt", "caption")


class PromptLine(NamedTuple):
    """A prompt, and the negative prompt that guidance leads away from.

    Args:
        prompt: the text; never blank.
        negative_prompt: the text, which may be empty; None: the default of the teacher's pipeline.
    """

    prompt: str
    negative_prompt: str | None = None


def read_prompts(source: str | Path | Sequence[str | PromptLine]) -> list[PromptLine]:
    """Read prompts in order; a text that appears twice counts as two prompts.

    Example:
        read_prompts("prompts.txt")
        read_prompts(["a red circle", PromptLine("a blue square", negative_prompt="blurry")])

    Args:
        source: a `.txt` file with one prompt per line; a `.jsonl` file of objects with `prompt` and optionally
            `negative_prompt`; a folder of pictures whose `metadata.jsonl` has `text`, `prompt` or `caption` in each line (the
            first of these is used) and optionally `negative_prompt`; or a list. Files are UTF-8, with or without a byte order
            mark, with either line ending. Other keys are ignored. Texts are not changed; leading spaces are kept.

    Returns:
        At least one prompt.

    Raises:
        InputError: the file does not exist, is of another kind, or has no prompts; or a line is blank, invalid or not UTF-8,
            which the message names.
    """
    if not isinstance(source, str | Path):
        return _from_list(source)
    path = Path(source)
    if path.is_dir():
        if not (path / METADATA_NAME).is_file():
            raise InputError(f"prompts: the folder {path} has no {METADATA_NAME}; {_EXPECTED}")
        path /= METADATA_NAME
    # Not a pipe or device, which might never end.
    elif not path.is_file():
        raise InputError(f"prompts: {path} {'is not a regular file' if path.exists() else 'does not exist'}; {_EXPECTED}")
    read: Callable[[str, str], PromptLine]
    if path.name == METADATA_NAME:
        read = _captioned
    elif path.suffix.lower() == ".jsonl":
        read = _prompted
    elif path.suffix.lower() == ".txt":
        read = _plain
    else:
        raise InputError(f"prompts: {path} has the extension {path.suffix!r}; {_EXPECTED}")
    prompts = [read(line, f"{path}, line {number}") for number, line in enumerate(_lines(path), 1)]
    if not prompts:
        raise InputError(f"prompts: {path} is empty; expected at least one prompt")
    return prompts


def has_captions(folder: str | Path) -> bool:
    """Whether a folder has captions for its pictures, in a `metadata.jsonl`."""
    return (Path(folder) / METADATA_NAME).is_file()


def read_captions(folder: str | Path) -> list[tuple[Path, PromptLine]]:
    """The pictures of a folder and their captions, in the order of the lines of its `metadata.jsonl`.

    This is the convention of Hugging Face's `imagefolder`: each line has `file_name`, relative to the folder, and `text` (or
    `prompt`, or `caption`). A picture may have several lines; pictures without a line are left out.

    Raises:
        InputError: as in `read_prompts`; or a line has no `file_name`, or one that is not a file in the folder.
    """
    path = Path(folder) / METADATA_NAME
    captions = []
    for number, (line, prompt) in enumerate(zip(_lines(path), read_prompts(Path(folder)), strict=True), 1):
        name = _object(line, f"{path}, line {number}").get("file_name")
        if not isinstance(name, str) or not name:
            raise InputError(f'{path}, line {number}: "file_name" is {name!r}; expected the name of a picture beside it')
        if not (Path(folder) / name).is_file():
            raise InputError(f"{path}, line {number}: there is no picture {name} in {folder}")
        captions.append((Path(folder) / name, prompt))
    return captions


def _from_list(source: Any) -> list[PromptLine]:
    if not isinstance(source, Sequence):
        raise InputError(f"prompts: found a {type(source).__name__}; {_EXPECTED}")
    prompts = []
    for number, item in enumerate(source):
        if isinstance(item, PromptLine):
            prompts.append(_checked(item.prompt, item.negative_prompt, f"prompts[{number}]"))
        else:
            prompts.append(_checked(item, None, f"prompts[{number}]"))
    if not prompts:
        raise InputError("prompts: the list is empty; expected at least one prompt")
    return prompts


def _lines(path: Path) -> list[str]:
    """The lines of a file without their endings."""
    try:
        text = read_text(path, None)
    except InputError as error:
        raise InputError(f"prompts: {error}") from None
    # Not splitlines, which also splits at separators that may occur within a prompt.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _plain(line: str, where: str) -> PromptLine:
    return _checked(line, None, where)


def _prompted(line: str, where: str) -> PromptLine:
    entry = _object(line, where)
    if "prompt" not in entry:
        raise InputError(f'{where}: no "prompt" among the keys {", ".join(entry) or "(none)"}; expected one in every line')
    return _checked(entry["prompt"], entry.get("negative_prompt"), where)


def _captioned(line: str, where: str) -> PromptLine:
    entry = _object(line, where)
    key = next((key for key in _CAPTION_KEYS if key in entry), None)
    if key is None:
        raise InputError(f"{where}: none of {', '.join(_CAPTION_KEYS)} among the keys {', '.join(entry) or '(none)'}")
    return _checked(entry[key], entry.get("negative_prompt"), where)


def _object(line: str, where: str) -> dict[str, Any]:
    if not line.strip():
        raise InputError(f"{where}: empty; expected a JSON object. Remove the line")
    entry = parse_json(line, where)
    if not isinstance(entry, dict):
        raise InputError(f'{where}: a JSON {type(entry).__name__}; expected an object, such as {{"prompt": "a red circle"}}')
    return entry


def _checked(prompt: Any, negative_prompt: Any, where: str) -> PromptLine:
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if text is None and name == "negative_prompt":
            continue
        if not isinstance(text, str):
            raise InputError(f"{where}: the {name} is a {type(text).__name__}; expected a string")
        if "\0" in text:
            raise InputError(f"{where}: the {name} has a NUL character; is the file UTF-16? Save it as UTF-8")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no tokenizer takes
            raise InputError(f"{where}: the {name} has a lone surrogate, which is not a character; remove it") from None
    if not prompt.strip():
        raise InputError(f"{where}: an empty prompt; write one or remove the line")
    return PromptLine(prompt, negative_prompt)
