"""The processes of one experiment: one alone, or those of torchrun (gloo)."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable

import torch
from torch import distributed

from bench.errors import UserError, one_line

POLL_SECONDS = 0.05
TIMEOUT = datetime.timedelta(days=30)  # a rank may wait as long as another one trains


class Job:
    """rank and world of this process, and what it tells the others."""

    def __init__(self):
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.rank = int(os.environ.get('RANK', 0))
        if self.world > 1:
            distributed.init_process_group('gloo', timeout=TIMEOUT)

    def wait(self, meanwhile: Callable[[], None] = lambda: None):
        """Until all processes are here. Not in a blocking call, which would be deaf to signals."""
        if self.world == 1:
            return
        with lost_peers():
            work = distributed.barrier(async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(POLL_SECONDS)
            work.wait()

    def share(self, value: object = None) -> object:
        """The value of rank 0, for all."""
        self.wait()
        values = [value]
        if self.world > 1:
            with lost_peers():
                distributed.broadcast_object_list(values)
        return values[0]


@contextlib.contextmanager
def lost_peers():
    """gloo's error when another process has ended, as one line."""
    try:
        yield
    except RuntimeError:
        raise UserError('another process of the job ended') from None


def pick_device(name: str) -> torch.device:
    """The device of this process: 'auto' and 'cuda' are its own GPU under torchrun."""
    count = torch.cuda.device_count()
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name == 'cuda':
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    if name not in ('cpu', *(f'cuda:{i}' for i in range(count))):
        raise UserError(f'--device {one_line(name)}: torch finds {count} CUDA devices and cpu')
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What the log calls a device if the script does not say."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'cpu ({torch.get_num_threads()} threads)'
