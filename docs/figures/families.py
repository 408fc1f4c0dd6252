"""The table of families in docs/text-to-image.md, from the results of the tests: python docs/figures/families.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2]
PAGE = HERE / "docs" / "text-to-image.md"
BEGIN = "<!-- families: written by docs/figures/families.py from what the tests say -->"
END = "<!-- end of families -->"

# A row: what users call it, its backbone, its tiny pipeline.
FAMILIES = {
    "PixArt-α": ("pixart", "pixart_alpha"),
    "PixArt-Σ": ("pixart", "pixart_sigma"),
    "SD3, SD3.5": ("sd3", "sd3"),
    "AuraFlow": ("aura_flow", "aura_flow"),
    "FLUX.1": ("flux", "flux"),
    "FLUX.2 klein": ("flux2", "flux2_klein"),
    "Qwen-Image": ("qwen_image", "qwen_image"),
    "Z-Image": ("z_image", "z_image"),
}
_BACKBONES, _TEACHER = "python_tests/models/wrapped/test_backbones.py", "python_tests/teachers/text_to_image/test_teacher.py"
# A column: its heading, the test that decides it.
COLUMNS = {
    "equals diffusers": (_BACKBONES, "test_wrapped_is_the_stock_transformer"),
    "parallel pass = rollout, every mask": (_BACKBONES, "test_parallel_pass_is_cached_rollout"),
    "trajectory ends at the pipeline's image": (_TEACHER, "test_trajectories_end_where_the_pipelines_images_begin"),
    "prompts to `ARDPipeline`": (_TEACHER, "test_from_a_folder_and_a_file_of_prompts_to_pictures"),
}


class Outcomes:
    """A plugin of pytest that keeps what became of every test."""

    def __init__(self) -> None:
        self.of: dict[str, list[bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of.setdefault(report.nodeid, []).append(report.outcome == "passed")


def table(outcomes: dict[str, list[bool]]) -> str:
    """The table in Markdown."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family, names in FAMILIES.items():
        cells = []
        for file, test in COLUMNS.values():
            mine = [
                good
                for node, results in outcomes.items()
                if node.startswith(f"{file}::{test}[") and set(re.split(r"[\[\]-]", node)[1:]) & set(names)
                for good in results
            ]
            cells.append("✔" if mine and all(mine) else "fails" if mine else "not run")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the tests and write the table; returns 1 if one failed."""
    outcomes = Outcomes()
    chosen = [f"{file}::{test}" for file, test in COLUMNS.values()]
    status = pytest.main(["-q", "--rootdir", str(HERE), *(str(HERE / one) for one in chosen)], plugins=[outcomes])
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes.of)}\n{END}{after}", encoding="utf-8")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
