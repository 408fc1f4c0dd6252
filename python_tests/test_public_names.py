from __future__ import annotations

import ast
from pathlib import Path

import pyard


def test_type_checkers_see_every_public_name() -> None:
    """A checker takes `import x as x` for an export; it does not run `__getattr__`."""
    (seen,) = (part for part in ast.parse(Path(pyard.__file__).read_text(encoding="utf-8")).body if isinstance(part, ast.If))
    imports = [(line.module, name) for line in seen.body if isinstance(line, ast.ImportFrom) for name in line.names]
    assert {name.name: module for module, name in imports if name.asname == name.name} == pyard._HOMES
    assert len(imports) == len(pyard._HOMES)


def test_every_public_name_can_be_imported() -> None:
    for name in pyard.__all__:
        assert getattr(pyard, name) is not None
