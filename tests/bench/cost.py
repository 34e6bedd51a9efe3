"""The cost of a recipe: FLOP of a run, which are the same on every machine."""

import math

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.arms import Arm

TRAIN_IMAGES = 4
TEST_IMAGES = 2


def first_images(
    data: dict, train: int, test: int, device: str | torch.device | None = None
) -> dict:
    """The data with its first images and labels only."""
    counts = {'train': train, 'test': test}
    part = {}
    for split, content in data.items():
        part[split] = {
            key: value[: counts[split]].to(device or value.device)
            if torch.is_tensor(value)
            else value
            for key, value in content.items()
        }
    return part


def count_epochs(arm: Arm, part: dict, batch_size: int, n_epochs: int, **changes) -> list[int]:
    """FLOP of a run on the CPU up to the end of each epoch, and up to its own end."""
    marks = [0]
    changes |= {'opt.batch_size': batch_size, 'opt.train_epochs': n_epochs}
    with FlopCounterMode(display=False) as counter:
        arm.script.module.train(
            part,
            0,
            hyp=arm.nested_hyp(**changes),
            device=torch.device('cpu'),
            quiet=True,
            on_epoch=lambda row: marks.append(counter.get_total_flops()),
        )
        marks.append(counter.get_total_flops())
    return marks


def count_parts(arm: Arm, data: dict, n_epochs: int) -> tuple[list[int], float] | None:
    """FLOP of training on one image in each epoch, and of evaluating one; None if not to be had.

    FlopCounterMode counts two short runs over the same 4 training images: with two steps of 2
    images in each epoch, and with one step of 3 (the fourth is dropped). Everything but the steps
    is equal in both, so the difference of an epoch is the cost of training on one image. What the
    last part has more than that is the evaluation.
    """
    part = first_images(data, TRAIN_IMAGES, TEST_IMAGES, 'cpu')
    four, three = (count_epochs(arm, part, size, n_epochs) for size in (2, 3))
    # on_epoch may be left out after the last epoch, which then shares its part with the evaluation.
    if not len(four) == len(three) in (n_epochs + 1, n_epochs + 2):
        return None
    per_image = (np.diff(four) - np.diff(three)).tolist()
    evaluation = four[-1] - four[-2] - TRAIN_IMAGES * per_image[-1]
    share = arm.hyp.get('net.tta_share', 1.0)
    if share < 1:  # the images that get TTA, in whole batches: of 2 images both
        without = count_epochs(arm, part, 3, n_epochs, **{'net.tta_share': 1.0})
        all_tta = without[-1] - without[-2] - (TRAIN_IMAGES - 1) * per_image[-1]
        evaluation -= (1 - share) * all_tta
    return per_image[:n_epochs], evaluation / TEST_IMAGES


def run_flop(arm: Arm, train: int, test: int, data: dict) -> int | None:
    """FLOP of all training steps and the final evaluation of a run on `train` and `test` images.

    None where a script does not train as `count_parts` needs it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on so few images a second thread costs more than it brings
    try:
        batch_size, epochs = arm.hyp['opt.batch_size'], arm.hyp['opt.train_epochs']
        n_epochs = max(2, math.ceil(epochs))  # whole ones, and the first is not the last
        parts = count_parts(arm, data, n_epochs)
    except (Exception, SystemExit):  # an error that matters comes again in the warm-up
        return None
    finally:
        torch.set_num_threads(threads)
    if parts is None or sum(parts[0]) == 0:
        return None
    steps_per_epoch = train // batch_size
    steps_left, total = math.ceil(steps_per_epoch * epochs), test * parts[1]
    for flop in parts[0]:
        steps = min(steps_per_epoch, steps_left)
        steps_left -= steps
        total += steps * batch_size * flop
    return round(total)
