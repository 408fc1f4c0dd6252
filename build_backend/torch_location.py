"""Where the torch of this environment lives, found without importing it: version and headers are all we need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11"

# Runs in another interpreter too, so it uses the standard library alone and prints one line of JSON.
_PROBE = """
import importlib.util, json, pathlib
spec = importlib.util.find_spec("torch")
found = None
if spec is not None and spec.origin:
    folder = pathlib.Path(spec.origin).parent
    version = {}
    exec((folder / "version.py").read_text(encoding="utf-8"), version)
    if (folder / "include").is_dir():
        found = {"folder": str(folder), "version": str(version["__version__"]), "cuda": version.get("cuda")}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class TorchLocation:
    """An installed torch: its package folder, version and the CUDA version it was built with (None: no CUDA)."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def new_enough(self) -> bool:
        """Whether its stable ABI has all that the operators use."""
        major, minor = self.version.split(".")[:2]
        return (int(major), int(minor)) >= MINIMUM_TORCH


def find_torch() -> TorchLocation | None:
    """The torch to build against: this process's own if it is new enough, else the one outside pip's isolated build.

    pip isolates a build by environment variables alone (PYTHONPATH leads to an overlay whose sitecustomize hides the
    environment's packages), so the same interpreter started without them sees the environment as the user does.
    """
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for environment in (dict(os.environ), plain):
        found = _probe(environment)
        if found is not None and found.new_enough:
            return found
    return None


def _probe(environment: dict[str, str]) -> TorchLocation | None:
    # -P: the current folder must not be taken for an installed package.
    command = [sys.executable, "-P", "-c", _PROBE]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, encoding="utf-8")
    if finished.returncode != 0:
        return None
    found = json.loads(finished.stdout.strip().splitlines()[-1])
    return None if found is None else TorchLocation(Path(found["folder"]), found["version"], found["cuda"])
