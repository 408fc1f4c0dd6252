"""Downloads the C++ headers of a torch release without installing it: `torch_headers.py 2.11.0 build/torch-2.11.0`.

Of PyPI's wheels the one for macOS is the smallest (80 MB; that for Linux with CUDA has 530), and every header that the
operators include is the same in both. Prints the include folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

INCLUDE = "torch/include/"
COMPLETE = "complete.txt"  # written last


class DownloadError(Exception):
    """Why the wheel is not there."""


def fetch_headers(version: str, folder: Path) -> Path:
    """The include folder of a torch release below `folder`, where it is kept.

    Raises:
        DownloadError: If pip cannot download the wheel.
    """
    if not (folder / COMPLETE).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unpacked = Path(temporary) / "headers"
            with zipfile.ZipFile(_download(version, Path(temporary))) as wheel:
                wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith(INCLUDE)])
            (unpacked / COMPLETE).write_text(f"torch {version}\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            unpacked.rename(folder)
    return folder / INCLUDE


def _download(version: str, folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)),
        *("--implementation", "cp", "--python-version", "3.11", "--platform", "macosx_11_0_arm64", f"torch=={version}"),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        said = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")] or ["pip downloaded no wheel"]
        raise DownloadError(f"the headers of torch {version} cannot be downloaded from PyPI: {said[-1]}")
    return wheels[0]


def main() -> int:
    """Fetches what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="version of torch, such as 2.11.0")
    parser.add_argument("folder", type=Path, help="folder to keep the headers in")
    arguments = parser.parse_args()
    try:
        print(fetch_headers(arguments.version, arguments.folder))
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
