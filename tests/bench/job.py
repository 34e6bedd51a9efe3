"""The processes of one experiment: one alone, or those of torchrun (gloo)."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable

from bench.errors import UserError

POLL_SECONDS = 0.05
TIMEOUT = datetime.timedelta(days=30)  # a rank may wait as long as another one trains


class Job:
    """rank and world of this process, and what it tells the others."""

    def __init__(self):
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.rank = int(os.environ.get('RANK', 0))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        if self.world > 1:
            from torch import distributed  # only here: it takes seconds to import

            self.distributed = distributed
            distributed.init_process_group('gloo', timeout=TIMEOUT)

    def wait(self, meanwhile: Callable[[], None] = lambda: None):
        """Wait until all processes are here; not in a blocking call, deaf to signals."""
        if self.world == 1:
            return
        with lost_peers():
            work = self.distributed.barrier(async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(POLL_SECONDS)
            work.wait()

    def share(self, value: object = None) -> object:
        """Return the value of rank 0 in all processes."""
        self.wait()
        values = [value]
        if self.world > 1:
            with lost_peers():
                self.distributed.broadcast_object_list(values)
        return values[0]


@contextlib.contextmanager
def lost_peers():
    """Turn gloo's error when another process has ended into one line."""
    try:
        yield
    except RuntimeError:
        raise UserError('another process of the job ended') from None
