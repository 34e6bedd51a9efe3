"""`python tests/bench ...`, also under torchrun."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.cli import main  # noqa: E402  the package is in the folder above

if __name__ == '__main__':
    status = main()
    if 'WORLD_SIZE' in os.environ:
        # At once: torch 2.4 can hang where it frees a process group, whose thread wants the GIL.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
