"""Each native operator a few times at DiT-XL/2's size, for ncu, or under PyTorch's profiler where there is none."""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu.attention import Case
from benchmarks.gpu.measure import Setting
from benchmarks.gpu.operators import row_cases
from pyard import ops


def main() -> None:
    """Runs them, under PyTorch's profiler if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--profile", action="store_true", help="run PyTorch's profiler")
    arguments = parser.parse_args()
    setting = Setting(arguments.device, arguments.smoke)
    work = [(function, leaves) for function, leaves, *_ in row_cases(setting, setting.half, setting.half).values()]
    case = Case(setting, 256, 72, True)

    def run() -> None:
        with ops.use_backend("native"):
            for function, leaves in [*work, (case.attend, None)]:
                inputs = case.leaves if leaves is None else leaves
                out = function() if leaves is None else function(*leaves)
                outputs = out if isinstance(out, tuple) else (out,)
                torch.autograd.grad(outputs, inputs, outputs)

    run()
    if not arguments.profile:
        return
    with torch.profiler.profile() as profile:
        for _ in range(3):
            run()
    on_device = "device" if arguments.device == "cuda" else "cpu"
    print(profile.key_averages().table(sort_by=f"self_{on_device}_time_total", row_limit=25, max_name_column_width=90))


if __name__ == "__main__":
    main()
