"""`python tests/bench ...`, also under torchrun."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.cli import main  # noqa: E402  the package is in the folder above

if __name__ == '__main__':
    sys.exit(main())
