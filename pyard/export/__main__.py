"""`python -m pyard.export` is `pyard export`."""

import sys

from pyard.export import main

sys.exit(main())
