"""`python -m pyard.export` is `pyard export`."""

import sys

from pyard.cli.command_line import COMMANDS, run

if __name__ == "__main__":
    sys.exit(run("export", COMMANDS["export"], sys.argv[1:]))
