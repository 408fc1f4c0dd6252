"""Installs the package `pyard` into a folder of its own, site-packages/pyard_runtime, which a .pth file appends to sys.path.

So pyard-runtime and pyard-distill have no file in common and can be installed and removed in any order. Where both are
installed, `import pyard` finds pyard-distill's, which has all that is here: site-packages is searched before that folder.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDER = "pyard_runtime"


class BuildInFolder(build_py):
    """Builds into the folder, and writes the .pth file beside it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.site = Path(self.build_lib)
        self.build_lib = str(self.site / FOLDER)

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            (self.site / f"{FOLDER}.pth").write_text(f"{FOLDER}\n", encoding="utf-8")


setup(cmdclass={"build_py": BuildInFolder})
