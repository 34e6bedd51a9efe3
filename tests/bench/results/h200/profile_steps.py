"""What profile.txt shows: python tests/bench/results/h200/profile_steps.py, in the repository's root."""

import copy
import sys

sys.path.insert(0, '.')
import airbench94_baseline as b
from torch.profiler import ProfilerActivity, profile

data = b.load_data('holdout', 'cuda')
for sizes in ([], [24, 24, 24]):
    hyp = copy.deepcopy(b.hyp)
    hyp['opt']['train_epochs'] = 2
    hyp['opt']['small_sizes'] = sizes
    for _ in range(3):
        record, _ = b.train(data, 0, hyp, quiet=True)
    first, second = (row['clock_seconds'] for row in record['epochs'])
    print(sizes, 'step ms', 1e3 * (second - first) / 39)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        b.train(data, 0, hyp, quiet=True)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    print('kernel ms per step', sum(event.self_device_time_total for event in events) / 78e3)
    for event in events[:14]:
        micros, calls = event.self_device_time_total, event.count
        print(f'{micros / 78e3:.3f} ms {calls / 78:.1f} {event.key[:70]}')
