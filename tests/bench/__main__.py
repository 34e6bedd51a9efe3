"""`python tests/bench ...`, also under torchrun."""

import os
import sys
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.cli import main  # noqa: E402  the package is in the folder above

if __name__ == '__main__':
    if 'WORLD_SIZE' not in os.environ:
        sys.exit(main())
    # A process of torchrun ends by os._exit: torch 2.4 can hang where it frees a process group,
    # whose thread wants the GIL, and the peers would wait for it.
    status = 1
    try:
        status = main()
    except SystemExit as end:  # --help
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError:
        status = 1
    os._exit(status)
