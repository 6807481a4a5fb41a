"""`python -m mocapsnet`, also the form that torchrun needs: `torchrun -m mocapsnet train`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
