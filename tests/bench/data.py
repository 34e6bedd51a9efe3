"""Data of an experiment: read by one process, in memory that all its arms share."""

import mmap
import os
import sys
import tempfile
import zlib

import numpy as np

from bench.errors import UserError

SPLITS = ('train', 'test')
TENSORS = ('images', 'labels')
ALIGNMENT = 64  # bytes, as in torch's own tensors


def make_file() -> int:
    """Return the descriptor of a file without a name, in memory where the system can."""
    if hasattr(os, 'memfd_create'):  # Linux; /dev/shm is often too small in a container
        return os.memfd_create('bench-data')
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def hold_out(data: dict, n: int) -> dict:
    """Return the data with the last n training images in place of the test set."""
    train = data['train']
    left = len(train['labels']) - n
    if left < 1:
        raise UserError(f'--holdout {n}: there are {len(train["labels"])} training images')
    split = {'train': dict(train), 'test': dict(train)}
    for key in TENSORS:
        split['train'][key] = train[key][:left]
        split['test'][key] = train[key][left:]
    kept = set(split['train']['labels'].tolist())
    held = set(split['test']['labels'].tolist())
    if not held <= kept:  # the images are sorted by class
        raise UserError(
            f'--holdout {n}: the last {n} images have classes that the others lack; '
            'shuffle the training images'
        )
    return split


def describe(data: dict, name: str) -> dict:
    """Return the facts of the data for the log: name, sizes and checksums, as a script logs."""
    facts = {'name': name, 'classes': len(data['train']['classes'])}
    for split in SPLITS:
        facts[split] = len(data[split]['labels'])
        for key in TENSORS:
            values = np.ascontiguousarray(data[split][key])
            facts[f'{split}_{key}_crc32'] = zlib.crc32(values)
    return facts


def write(file: int, data: dict) -> dict:
    """Write the data to a file. Returns the layout, from which `read` finds them."""
    layout = {}
    arrays = []
    end = 0
    for split in SPLITS:
        layout[split] = {'classes': list(data[split]['classes'])}
        for key in TENSORS:
            array = np.ascontiguousarray(data[split][key])
            layout[split][key] = {
                'tensor': not isinstance(data[split][key], np.ndarray),
                'dtype': array.dtype.str,
                'shape': array.shape,
                'start': end,
            }
            arrays.append((end, array))
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    os.ftruncate(file, end)
    with mmap.mmap(file, end) as memory:
        for start, array in arrays:
            memory[start : start + array.nbytes] = memoryview(array).cast('B')
    return layout


def read(file: int, layout: dict, device) -> dict:
    """Return the data of a file, on a device: on the CPU in the memory of all who read it.

    What a process writes to it becomes its own copy, and no other sees it.
    """
    memory = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    data = {}
    for split in SPLITS:
        data[split] = {'classes': layout[split]['classes']}
        for key in TENSORS:
            place = layout[split][key]
            dtype = np.dtype(place['dtype'])
            count = int(np.prod(place['shape']))
            array = np.frombuffer(memory, dtype, count, place['start']).reshape(place['shape'])
            if place['tensor']:
                torch = sys.modules.get('torch')
                if torch is None:
                    raise UserError('the data are torch tensors, but the script imports no torch')
                data[split][key] = torch.from_numpy(array).to(device)
            else:
                data[split][key] = array
    return data
