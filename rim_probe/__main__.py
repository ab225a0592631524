"""`python -m rim_probe`: see rim_probe.cli."""

import sys

from rim_probe.cli import main

sys.exit(main())
