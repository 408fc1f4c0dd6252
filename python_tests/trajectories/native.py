"""The compiled reader for tests: absent it is a skip, but a failure where the build was to include it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from pyard.trajectories.gather import native_module


def require_native() -> Any:
    """The module `pyard._trajectory`."""
    module, reason = native_module()
    if module is None:
        if os.environ.get("PYARD_NATIVE") == "1":
            pytest.fail(f"PYARD_NATIVE=1, but {reason}")
        pytest.skip(reason)
    return module
