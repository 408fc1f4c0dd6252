"""What nvcc makes of the row kernels: every access of a tensor is one of 16 bytes. Needs nvcc, no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from ops.cuda_emulator.kernels import SOURCES

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")

# Accesses that are narrower by design: indices, sums over tokens (a column a thread), log-sum-exps.
NARROW = {
    "gather_rows": {"ld.global.u64"},
    "gelu_tanh": {"ld.global.f32", "st.global.f32", "st.global.u16"},
    "residual_norm_forward": set(),
    "residual_norm_backward": {"ld.global.f32", "st.global.f32", "st.global.u16"},
    "block_attention_forward": {"ld.global.f32", "st.global.f32"},
}


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc to compile the kernels with")
@pytest.mark.parametrize("name", NARROW)
def test_tensors_are_accessed_16_bytes_at_a_time(name: str, tmp_path: Path) -> None:
    ptx = tmp_path / "kernels.ptx"
    command = [str(NVCC), "-std=c++17", "-O3", "-arch=sm_90", f"-I{SOURCES}", f"-I{SOURCES / 'ptx'}"]
    subprocess.run([*command, "-ptx", str(SOURCES / f"{name}.cu"), "-o", str(ptx)], check=True)
    accesses = Counter(re.findall(r"^\s*((?:ld|st)\.global[.\w]*)", ptx.read_text(encoding="utf-8"), re.MULTILINE))
    wide = {access for access in accesses if ".v4." in access}
    assert wide, accesses
    assert set(accesses) - wide == NARROW[name], accesses
