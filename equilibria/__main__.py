"""`python -m equilibria` is the command `equilibria`."""

import sys

from equilibria.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
