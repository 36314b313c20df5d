"""``python -m kore``: the command line, also for torchrun."""

import sys

from kore.cli import main

if __name__ == "__main__":
    sys.exit(main())
