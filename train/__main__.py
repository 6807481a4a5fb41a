"""`python -m mocapsnet.train`, the form that torchrun needs."""

import sys

from mocapsnet.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
