"""Ways to count what the host asks of a GPU: launches, and bytes moved by generated kernels."""

import ctypes
import logging
import tempfile

import torch
from torch import profiler


def stand_in() -> ctypes.CDLL | None:
    """Return the library of a stand-in for a GPU, which executes no kernel, if it is one."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, 'fakegpu_dump') else None


class Kernels:
    """Count the kernels launched between start and stop. A CUDA graph is one launch."""

    def __init__(self):
        self.stand_in = stand_in()
        self.profile = None

    def start(self):
        if self.stand_in:
            self.stand_in.fakegpu_reset()
            return
        self.profile = profiler.profile(activities=[profiler.ProfilerActivity.CUDA])
        self.profile.start()

    def stop(self) -> int:
        if not self.stand_in:
            self.profile.stop()
            events = self.profile.events()
            return sum(e.device_type.name == 'CUDA' and 'Mem' not in e.name for e in events)
        with tempfile.NamedTemporaryFile('r') as file:
            self.stand_in.fakegpu_dump(file.name.encode())
            return sum(line.startswith('kernel\t') for line in file)


def count_triton_bytes():
    """Let Inductor keep, in `metrics.nodes_num_elem`, what each kernel of a new graph moves."""
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True  # a cached graph is not counted
    log = logging.getLogger('torch._inductor.compile_fx.__inductor_metrics')
    log.setLevel(logging.INFO)  # it counts only where it would also log
    log.propagate = False


def triton_bytes() -> int:
    """Return what the generated kernels of all graphs compiled so far read and write."""
    from torch._inductor import metrics

    return sum(4 * n for node, n in metrics.nodes_num_elem if not node.is_extern())


def random_data(device) -> dict:
    """Return random images and labels of CIFAR-10's sizes, in the form of `load_data`."""
    data = {}
    for split, n in (('train', 50000), ('test', 10000)):
        data[split] = {
            'images': torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8).to(device),
            'labels': torch.randint(10, (n,)).to(device),
            'classes': list('abcdefghij'),
        }
    return data


def blank_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and targets for `train_step` on CUDA: four, of size x size pixels, all 0."""
    images = torch.zeros(4, 3, size, size, device='cuda', dtype=torch.half)
    return images.to(memory_format=torch.channels_last), torch.zeros(4, 10, device='cuda')
