"""`python -m varkit` is `varkit`."""

import sys

from varkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
