"""Types in `--help` are in plain words."""

from __future__ import annotations

import pytest

from pyard.cli.command_line import COMMANDS, main
from pyard.cli.help_text import plain_help, plain_type


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("<class 'Path'>", "path"),
        ("Literal['ddp', 'fsdp']", "ddp | fsdp"),
        ("Optional[Literal['direct', 'jump']]", "direct | jump | none"),
        ("Union[Literal['own', 'none'], Path, null]", "own | none | path"),
        ("Union[tuple[float, float], Literal['auto'], null]", "two floats | auto | none"),
        ("Optional[list[int | str]]", "list of int | str | none"),
        ("Union[type[Backbone], str, null]", "str | none"),
        ("Union[Literal['uniform', 'min_snr'], tuple[float, ...]]", "uniform | min_snr | list of float"),
        ("str | null", "str | none"),
    ],
)
def test_a_type(written: str, plain: str) -> None:
    assert plain_type(written) == plain


def test_a_flag_s_help() -> None:
    assert plain_help("steps; none: 4. (type: int | null, default: null)") == "steps; none: 4. (int | none; default: none)"
    assert plain_help("the folder (of a run). (required, type: <class 'Path'>)") == "the folder (of a run). (required, path)"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_shows_python_s_types(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for riddle in ("Optional[", "Union[", "Literal[", "<class", "type: ", "null", "None"):
        assert riddle not in shown, f"{riddle}: {shown[max(0, shown.find(riddle) - 80) :][:160]}"
