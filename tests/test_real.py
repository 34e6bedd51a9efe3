"""A short run on CIFAR-10's own images, where AIRBENCH_DATA names a directory that has them."""
import os

import pytest

from conftest import SCRIPTS

DATA = os.environ.get('AIRBENCH_DATA') and os.path.abspath(os.environ['AIRBENCH_DATA'])


@pytest.mark.skipif(not DATA, reason='AIRBENCH_DATA names no directory with CIFAR-10')
@pytest.mark.parametrize('name', SCRIPTS)
def test_narrow_network_learns_real_images(name, run):
    """Chance is 10%; widths and epochs are chosen for half a minute on two cores."""
    process = run(name, '--data-dir', DATA, '--trials', 1, '--seed', 1, '--target', 45,
                  '--hyp', 'opt.train_epochs=2', 'opt.batch_size=512', 'net.widths.block1=16',
                  'net.widths.block2=32', 'net.widths.block3=32')
    assert process.returncode == 0, process.stderr
    average = process.stdout.split('\nAverage')[1].splitlines()[0].split()
    assert average[-2:] == ['1/1', '0/1'], process.stdout  # over 45%, not diverged
