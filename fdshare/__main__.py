"""``python -m fdshare``: the command line."""

import sys

from fdshare.cli import main

if __name__ == "__main__":  # a spawned worker of the demo imports this module under another name
    sys.exit(main())
