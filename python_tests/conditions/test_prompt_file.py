"""Prompts from files, folders and lists; what is wrong is named with its line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pyard.conditions import PromptLine, read_prompts
from pyard.errors import InputError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["trailing newline", "none"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_text_file_has_a_prompt_in_every_line(tmp_path: Path, ending: str, last: bool, mark: str) -> None:
    prompts = ["a red circle", "  zwei Füchse\t", "one\u2028paragraph\x0b\x85", "狐 🦊", "a red circle"]
    path = written(tmp_path / "prompts.TXT", mark + ending.join(prompts) + (ending if last else ""))
    assert read_prompts(path) == [PromptLine(prompt, None) for prompt in prompts]
    assert read_prompts(str(path)) == read_prompts(path)


def test_json_lines_have_prompts_and_negative_prompts(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "negative_prompt": "b", "seed": 3},
        {"negative_prompt": "", "prompt": "c\nd"},
        {"prompt": "e", "negative_prompt": None},
        {"other": [1], "prompt": "f"},
    ]
    path = written(tmp_path / "p.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\r\n")
    wanted = [PromptLine("a", "b"), PromptLine("c\nd", ""), PromptLine("e", None), PromptLine("f", None)]
    assert read_prompts(path) == wanted
    assert read_prompts(wanted) == wanted


def test_a_picture_folder_has_its_captions_in_metadata(tmp_path: Path) -> None:
    lines = [
        {"file_name": "0.png", "text": "a", "caption": "other"},
        {"file_name": "1.png", "prompt": "b", "negative_prompt": "n"},
        {"file_name": "2.png", "caption": "c"},
    ]
    written(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_prompts(tmp_path) == [PromptLine("a"), PromptLine("b", "n"), PromptLine("c")]
    assert read_prompts(tmp_path / "metadata.jsonl") == read_prompts(tmp_path)


def test_a_list_has_texts_or_lines() -> None:
    assert read_prompts(["a", PromptLine("b", "")]) == [PromptLine("a", None), PromptLine("b", "")]
    assert read_prompts(("a",)) == [PromptLine("a", None)]


DEEP = "[" * 100_000
BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty file": ("a.txt", "", "is empty; expected at least one prompt"),
    "empty JSON lines": ("a.jsonl", b"\xef\xbb\xbf", "is empty; expected at least one prompt"),
    "empty line": ("a.txt", "a\n\nb\n", "line 2: an empty prompt"),
    "blank line": ("a.txt", "a\nb\n \t\r\n", "line 3: an empty prompt"),
    "two trailing newlines": ("a.txt", "a\n\n", "line 2: an empty prompt"),
    "empty line of JSON": ("a.jsonl", '{"prompt": "a"}\n\n', "line 2: empty; expected a JSON object"),
    "broken JSON": ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2: not valid JSON"),
    "deep JSON": ("a.jsonl", DEEP, "line 1: not valid JSON"),
    "a key twice": ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: not valid JSON .a key appears twice"),
    "a JSON list": ("a.jsonl", '["a"]', "line 1: a JSON list; expected an object"),
    "no prompt": ("a.jsonl", '{"text": "a"}', 'line 1: no "prompt" among the keys text'),
    "no key": ("a.jsonl", "{}", r'no "prompt" among the keys \(none\)'),
    "a number": ("a.jsonl", '{"prompt": 1}', "line 1: the prompt is a int; expected a string"),
    "negative list": ("a.jsonl", '{"prompt": "a", "negative_prompt": []}', "the negative_prompt is a list"),
    "empty prompt": ("a.jsonl", '{"prompt": ""}', "line 1: an empty prompt"),
    "lone surrogate": ("a.jsonl", '{"prompt": "\\ud83d"}', "line 1: not valid JSON \\(it has a lone surrogate"),
    "no caption": ("metadata.jsonl", '{"file_name": "0.png"}', "none of text, prompt, caption among the keys file_name"),
    "latin-1": ("a.txt", "a\nF\xfcchse".encode("latin-1"), "line 2: not UTF-8"),
    "UTF-16": ("a.txt", "a circle".encode("utf-16"), "line 1: not UTF-8"),
    "UTF-16 unmarked": ("a.txt", "a circle".encode("utf-16-le"), "line 1: the prompt has a NUL character"),
    "ending": ("a.csv", "prompt\na\n", "has the extension '.csv'; expected a .txt file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    path = written(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as failed:
        read_prompts(path)
    assert str(path) in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list is empty"),
        (["a", " "], r"prompts\[1\]: an empty prompt"),
        (["a", 3], r"prompts\[1\]: the prompt is a int"),
        ([PromptLine("a", 3)], r"prompts\[0\]: the negative_prompt is a int"),  # type: ignore[arg-type]
        (None, "found a NoneType; expected a .txt file"),
        ("a red circle", "a red circle does not exist; expected a .txt file.*or a list of texts"),
    ],
)
def test_a_bad_list_is_one_line(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as failed:
        read_prompts(source)
    assert "\n" not in str(failed.value)


def test_a_folder_without_metadata_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no metadata\.jsonl; expected a .txt file"):
        read_prompts(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="is not a regular file"):
        read_prompts(tmp_path / "pipe.txt")
