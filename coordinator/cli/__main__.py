"""``python -m coordinator.cli``: the command where it is not installed."""

import sys

from coordinator.cli import main

__all__ = ()

sys.exit(main())
