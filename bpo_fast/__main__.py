"""`python -m bpo_fast` is the command `bpo-fast`."""

import sys

from bpo_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
