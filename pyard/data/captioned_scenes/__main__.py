"""Look at captioned scenes, or measure their checker: `python -m pyard.data.captioned_scenes --help`."""

from __future__ import annotations

import argparse
import sys
import time

from pyard.data.captioned_scenes.batches import scene_batch
from pyard.data.captioned_scenes.contact_sheet import save_contact_sheet
from pyard.data.captioned_scenes.scene import SceneSetting
from pyard.data.captioned_scenes.validate import findings_table, validate_checker
from pyard.data.captioned_scenes.vocabulary import SPLITS
from pyard.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0, 1 if the checker is not as good as it must be, or 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m pyard.data.captioned_scenes", description="Captioned scenes.")
    commands = parser.add_subparsers(dest="command", required=True)
    setting = argparse.ArgumentParser(add_help=False)
    setting.add_argument("--size", type=int, default=16, help="side of the pictures in pixels, 16 to 32 (%(default)s)")
    setting.add_argument("--cells", type=int, default=2, help="cells along a side (%(default)s)")
    setting.add_argument("--jitter", type=float, default=0.5, help="how free positions are, 0 to 1 (%(default)s)")
    setting.add_argument("--seed", type=int, default=0, help="random seed of the scenes (%(default)s)")
    sheet = commands.add_parser("sheet", parents=[setting], help="draw scenes with their captions into a PNG")
    sheet.add_argument("out", help="the PNG")
    sheet.add_argument("--count", type=int, default=40, help="how many scenes (%(default)s)")
    sheet.add_argument("--split", choices=SPLITS, default="train", help="which combinations they show (%(default)s)")
    check = commands.add_parser("check", parents=[setting], help="measure how often the checker is right")
    check.add_argument("--count", type=int, default=2000, help="scenes of every category (%(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.count < 1:
            raise InputError(f"--count is {options.count}; expected at least 1")
        chosen = SceneSetting(options.size, options.cells, options.jitter)
        if options.command == "sheet":
            batch = scene_batch(options.seed, range(options.count), chosen, options.split)
            save_contact_sheet(batch.pictures, batch.captions, options.out)
            return 0
        start = time.perf_counter()
        findings = validate_checker(chosen, options.count, options.seed)
    except (InputError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(findings_table(findings))
    print(f"\n{chosen}, seed {options.seed}, {time.perf_counter() - start:.0f} s")
    return 0 if all(finding.reached for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
