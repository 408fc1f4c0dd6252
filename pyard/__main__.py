"""`python -m pyard` is the command `pyard`."""

import sys

from pyard.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
