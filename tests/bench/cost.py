"""Cost of a recipe: the FLOP of a run, which are the same on every machine."""

import math

from bench import contract
from bench.contract import BATCH_SIZE, TRAIN_EPOCHS, Script
from bench.errors import UserError

TRAIN_IMAGES = 4
TEST_IMAGES = 100  # so that a share of them is exact to a percent


def count_epochs(script: Script, hyp: dict, data: dict, batch_size: int, test: int) -> list[int]:
    """Return the FLOP of each epoch of a short run on the CPU, and of its final evaluation.

    The run has four training images and so many test images.
    """
    from torch.utils.flop_counter import FlopCounterMode

    part = contract.first_images(data, TRAIN_IMAGES, test)
    marks = [0]
    with FlopCounterMode(display=False) as counter:
        script.train(
            part,
            0,
            {**hyp, BATCH_SIZE: batch_size},
            contract.cpu(),
            quiet=True,
            on_epoch=lambda row: marks.append(counter.get_total_flops()),
        )
        marks.append(counter.get_total_flops())
    if len(marks) != hyp[TRAIN_EPOCHS] + 2:
        raise UserError('on_epoch was not called after every epoch')
    return [after - before for before, after in zip(marks, marks[1:], strict=False)]


def run_flop(script: Script, hyp: dict, data: dict) -> int:
    """Return the FLOP of the training steps and the final evaluation of a run.

    FlopCounterMode counts three short runs on the same four images: in each epoch they make two
    steps of 2, one of 4, and one of 3 (the last image is dropped). All else is the same, so the
    differences are the FLOP of a step by itself (of an optimizer with matrix products) and of an
    image in a step. The evaluation comes after the last epoch; a few images are scaled to all.

    data: those of the real run, on the CPU. Raises UserError where a script cannot be counted.
    """
    if BATCH_SIZE not in hyp or TRAIN_EPOCHS not in hyp:
        raise UserError(f'hyp has no {BATCH_SIZE} or no {TRAIN_EPOCHS}')
    batch_size = hyp[BATCH_SIZE]
    epochs = hyp[TRAIN_EPOCHS]
    whole_epochs = {**hyp, TRAIN_EPOCHS: type(epochs)(math.ceil(epochs))}
    train = len(data['train']['labels'])
    test = len(data['test']['labels'])
    test_images = min(TEST_IMAGES, test)
    *two_steps, evaluation = count_epochs(script, whole_epochs, data, 2, test_images)
    *one_step, _ = count_epochs(script, whole_epochs, data, 4, 1)
    *fewer_images, _ = count_epochs(script, whole_epochs, data, 3, 1)

    steps_per_epoch = train // batch_size
    steps_left = math.ceil(steps_per_epoch * epochs)
    total = evaluation * test / test_images
    for two, one, fewer in zip(two_steps, one_step, fewer_images, strict=True):
        if 0 < one <= fewer:
            raise UserError('its loader keeps the last, smaller batch of an epoch')
        steps = min(steps_per_epoch, steps_left)
        steps_left -= steps
        total += steps * ((two - one) + batch_size * (one - fewer))
    if total == 0:
        raise UserError('torch counted no FLOP')
    return round(total)
