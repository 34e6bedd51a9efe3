"""Hostile caches, faulty downloads, a full disk, several processes, a killed download (on Linux)."""
import contextlib
import gzip
import hashlib
import inspect
import io
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

resource = pytest.importorskip('resource', reason='file-size limits and /proc: Linux')

from conftest import NARROW_ARGS, ROOT, environment, live, times
from test_bench import experiment_of, records, rows_of, wait_for
from test_cli import assert_refused, call  # noqa: F401, F811 (a fixture)
from test_data import (ARCHIVE, MARKER, NAMES, Trap, add, assert_download_failed, assert_same,
                       cifar, closed_port, patched, server)  # noqa: F401, F811 (fixtures)


@contextlib.contextmanager
def limited(kind, value):
    """This process under a limit of the operating system."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def little_memory():
    """`limited` to 256 MiB more than there are."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    return limited(resource.RLIMIT_AS, pages * resource.getpagesize() + 2**28)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------- Hostile caches ----------------------------------------

# A mutation is a function of a random generator, how often it was used before, the file, and its content.

def with_bytes(rng, good, cut, inserted=0):
    place = rng.randrange(len(good))
    return good[:place] + rng.randbytes(inserted) + good[place + cut:]


def with_flipped_bit(rng, good, places):
    mutated = bytearray(good)
    mutated[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def in_entry(*names):
    """A bit flipped in the content of an entry."""
    def mutate(rng, turn, good, cache):
        content = zipfile.ZipFile(io.BytesIO(good)).read(f'archive/{names[turn % len(names)]}')
        start = good.index(content)
        return with_flipped_bit(rng, good, range(start, start + len(content)))
    return mutate


def in_header(rng, turn, good, cache):
    entries = zipfile.ZipFile(io.BytesIO(good)).infolist()
    places = [place for entry in entries for place in range(entry.header_offset, entry.header_offset + 30)]
    return with_flipped_bit(rng, good, [*places, *range(good.index(b'PK\1\2'), len(good))])


def in_directory(name, offset, value):
    """Other bytes in what the zip's directory says about an entry."""
    def mutate(rng, turn, good, cache):
        place = good.rindex(name) - 46 + offset
        return good[:place] + value + good[place + len(value):]
    return mutate


def rezipped(entries, compression=zipfile.ZIP_STORED):
    """The zip with the content of some entries replaced."""
    def mutate(rng, turn, good, cache):
        old, file = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
        with zipfile.ZipFile(file, 'w', compression, compresslevel=1) as new:
            for name in old.namelist():
                new.writestr(name, entries.get(name, old.read(name)))
        return file.getvalue()
    return mutate


def bomb(rng, turn, good, cache):
    return rezipped({'archive/data/0': bytes(300 << 20)}, zipfile.ZIP_DEFLATED)(rng, turn, good, cache)


def overlapping(rng, turn, good, cache):
    """Entries of the zip's directory that all name the same bytes: sums over each would take for ever."""
    file = io.BytesIO(good)
    with zipfile.ZipFile(file, 'a') as old:
        tensor = next(x for x in old.infolist() if x.filename == 'archive/data/0')
        old.filelist += [tensor] * (60_000 + turn)
        old._didModify = True
    return file.getvalue()


def torch_file(*contents, **kwargs):
    """What torch saves of each function of the content in turn."""
    def mutate(rng, turn, good, cache):
        file = io.BytesIO()
        torch.save(contents[turn % len(contents)](cache), file, **kwargs)
        return file.getvalue()
    return mutate


def changed(keys, *changes):
    """What torch saves of the content with each change of each key in turn."""
    return torch_file(*(lambda cache, key=key, change=change: {**cache, key: change(cache.get(key))}
                        for change in changes for key in keys.split()))


def expanded(cache):
    """10**9 images and labels out of one of each."""
    images, labels = (cache[key][:1].clone() for key in ('images', 'labels'))
    return {**cache, 'images': images.expand(10**9, -1, -1, -1), 'labels': labels.expand(10**9)}


def on_meta(cache):
    """10**9 images and labels out of nothing."""
    return {**cache, 'images': torch.empty(10**9, 32, 32, 3, dtype=torch.uint8, device='meta'),
            'labels': torch.empty(10**9, dtype=torch.int64, device='meta')}


def with_global(module, name, argument=b'N'):
    """A pickle that calls a global of Python's."""
    return b'c' + f'{module}\n{name}\n'.encode() + b'(' + argument + b'tR.'


MODULE, SYSTEM = torch.nn.Linear(3, 3), f"cos\nsystem\n(S'touch {MARKER}'\ntR.".encode()
MUTATIONS = {
    'truncated': lambda rng, turn, good, cache: good[:rng.randrange(len(good))],
    'bytes inserted': lambda rng, turn, good, cache: with_bytes(rng, good, 0, rng.randint(1, 100)),
    'bytes deleted': lambda rng, turn, good, cache: with_bytes(rng, good, rng.randint(1, 100)),
    'bit flipped in a header': in_header, 'bit flipped in a tensor': in_entry('data/0', 'data/1'),
    'bit flipped in the pickle': in_entry('data.pkl'),
    'entry said to be a folder': in_directory(b'archive/data/0', 38, b'\x10'),
    'entries that overlap': overlapping,
    'an error of memory': lambda rng, turn, good, cache: rezipped({'archive/data.pkl': [
        with_global('builtins', 'MemoryError'),
        with_global('builtins', 'RuntimeError', b"S'allocate memory'\n"),
        with_global('builtins', 'bytearray', b'I' + str(10**15 + turn).encode() + b'\n')][turn % 3]})(
            rng, turn, good, cache),
    'entry said to be larger': in_directory(b'archive/data/0', 24, b'\xff\xff\xff\x7f'), 'zip bomb': bomb,
    'another torch file': torch_file(lambda cache: MODULE, lambda cache: MODULE.state_dict(),
                                     lambda cache: cache['images'], lambda cache: Trap()),
    'wrong key': torch_file(*(lambda cache, key=key: {key.upper(): cache[key], **{
        other: cache[other] for other in {*cache} - {key}}} for key in ('images', 'labels', 'classes'))),
    'wrong dtype': changed('images', lambda x: x.float() * float('nan'), torch.Tensor.char, torch.Tensor.half,
                           lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8)),
    'wrong shape': changed('images', *(lambda x, shape=shape: x.reshape(shape) for shape in (
        (-1, 3, 32, 32), (-1, 16, 64, 3), (-1,), (1, -1, 32, 32, 3), (-1, 32, 32, 1)))),
    'wrong label': changed('labels', *(lambda x, label=label: torch.cat((x[1:], torch.tensor([label])))
                                       for label in (10, -1, 255, 2**62, -2**63))),
    'more claimed than is there': torch_file(expanded),
    'tensors without content': torch_file(on_meta),
    'no plain tensor': changed('images labels', torch.Tensor.to_sparse, torch.Tensor.tolist,
                               lambda x: x.to('meta'), lambda x: x.numpy().tobytes()),
    'code among the content': changed('classes images labels more', lambda entry: Trap()),
    'code as a bare pickle': lambda rng, turn, good, cache: [SYSTEM, pickle.dumps(Trap()), torch_file(
        lambda cache: Trap(), _use_new_zipfile_serialization=False)(rng, turn, good, cache)][turn % 3],
    'code in an entry': lambda rng, turn, good, cache: rezipped(
        {f'archive/{["data.pkl", "data/0", "byteorder"][turn % 3]}': SYSTEM})(rng, turn, good, cache)}


@pytest.fixture(scope='module')
def cache(baseline):
    """The content of a cache, and its file."""
    content = baseline.synthetic_data('cpu', train=24, test=1)['train']
    file = io.BytesIO()
    torch.save(content, file)
    return SimpleNamespace(content=content, file=file.getvalue())


def mutation(cache, kind, turn):
    return MUTATIONS[kind](random.Random(f'{kind} {turn}'), turn, cache.file, cache.content)


def wrong_with(baseline, path, content, errors):
    """What is wrong with read_cache of a file that has this content, or a fault that is one of the errors."""
    wrong, start = [], time.process_time()
    try:
        with little_memory():
            loaded = baseline.read_cache(path, 'cpu')
        assert_same({'train': loaded}, {'train': content})
    except AssertionError:
        wrong.append('other content')
    except Exception as error:
        if not isinstance(error, errors) or not re.fullmatch(f'{path}(:| is damaged).*', str(error)):
            wrong.append(repr(error))
    if os.path.exists(MARKER):
        os.remove(MARKER)
        wrong.append('its code was run')
    seconds = time.process_time() - start
    return wrong + [f'{seconds} s of work'] * (seconds > 3)


@times(22, 220)
def test_mutated_cache_is_refused_or_as_it_was_and_its_code_not_run(
        baseline, cache, tmp_path, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    path, found = tmp_path / 'train.pt', {}
    for turn, kind in [divmod(i, len(MUTATIONS)) for i in range(n)]:
        kind = [*MUTATIONS][kind]
        path.write_bytes(mutation(cache, kind, turn))
        errors = (baseline.UserError, MemoryError) if kind == 'an error of memory' else baseline.UserError
        found[kind, turn] = wrong_with(baseline, path, cache.content, errors)
    assert not {key: wrong for key, wrong in found.items() if wrong} and len(found) == n


@pytest.mark.parametrize('kind', ['entry said to be a folder', 'zip bomb', 'wrong label', 'code in an entry'])
def test_hostile_cache_ends_the_command_in_one_line(call, cache, data_dir, tmp_path, kind):
    folder = Path(shutil.copytree(data_dir, tmp_path / 'data'))
    (folder / 'train.pt').write_bytes(mutation(cache, kind, 0))
    with little_memory():
        result = call('--data-dir', folder, *NARROW_ARGS)
    assert_refused(result)
    assert str(folder / 'train.pt') in result.err and os.listdir(tmp_path) == ['data']


# ---------------------------------------- Faulty downloads ----------------------------------------

@pytest.fixture
def download_fails(call, patched, server, data_dir, tmp_path):
    """download_fails(reply, **attributes): with do_GET = reply it ends in one line and changes no file."""
    shutil.copy(data_dir / 'train.pt', tmp_path)
    before = content_of(tmp_path)

    def download_fails(reply, **attributes):
        server.handler.do_GET = reply
        patched(url=server.url, **attributes)
        assert_download_failed(call('--data-dir', tmp_path, *NARROW_ARGS), tmp_path)
        assert content_of(tmp_path) == before
    return download_fails


def sending(content):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)
    return do_GET


def redirect(self):
    self.send_response(302)
    self.send_header('Location', self.path)
    self.end_headers()


REPLIES = {'status 404': lambda self: self.send_error(404), 'status 500': lambda self: self.send_error(500),
           'a redirect to itself': redirect, 'nothing': lambda self: None,
           'garbage': lambda self: self.wfile.write(random.Random(0).randbytes(9999))}


@pytest.mark.parametrize('reply', REPLIES)
def test_server_without_the_archive_is_one_line_and_changes_nothing(download_fails, reply):
    download_fails(REPLIES[reply])


def test_archive_with_a_wrong_md5_is_one_line_and_changes_nothing(download_fails, cifar):
    download_fails(sending(cifar.path.read_bytes()), tgz_md5='0' * 32)


@times(3, 20)
def test_download_cut_anywhere_is_one_line_and_changes_nothing(download_fails, cifar, n):
    def cut(self):
        self.send_response(200)
        self.send_header('Content-Length', len(archive))
        self.end_headers()
        self.wfile.write(archive[:place])

    archive = cifar.path.read_bytes()
    for place in random.Random(0).sample(range(len(archive)), n):
        download_fails(cut)


CORRUPT = {'empty': lambda archive: b'', 'garbage': lambda archive: random.Random(0).randbytes(9999),
           'half': lambda archive: archive[:len(archive) // 2], 'no tar': gzip.compress,
           'byte changed': lambda archive: with_flipped_bit(random.Random(0), archive, range(5000, 60000)),
           'no batches': lambda archive: gzip.compress(bytes(10240))}


@pytest.mark.parametrize('fault', CORRUPT)
def test_corrupt_archive_is_one_line_and_changes_nothing(download_fails, cifar, fault):
    archive = CORRUPT[fault](cifar.path.read_bytes())
    download_fails(sending(archive), tgz_md5=hashlib.md5(archive).hexdigest())  # or it would not be opened


# ---------------------------------------- Disk full ----------------------------------------

def write_archive(path, n_test):
    """An archive of 5 x 4 black images and n_test, far smaller than its content; CIFAR10's attributes."""
    sizes = {**{f'data_batch_{k}': 4 for k in range(1, 6)}, 'test_batch': n_test}
    with tarfile.open(path, 'w:gz') as tar:
        *entries, meta = [add(tar, name, {'labels': [3] * n, 'data': np.zeros((n, 3072), np.uint8),
                                          'label_names': NAMES}) for name, n in [*sizes.items(), ('meta', 0)]]
    return {'tgz_md5': hashlib.md5(path.read_bytes()).hexdigest(), 'train_list': entries[:5],
            'test_list': entries[5:], 'meta': {'filename': meta[0], 'key': 'label_names', 'md5': meta[1]}}


@pytest.mark.parametrize('size, n_test, made', [
    (0, 4, []), (300, 4, []), (5_000, 4, []), (50_000, 30, []), (40_000, 4, []), (124_000, 40, ['train.pt'])],
    ids=['nothing fits', 'no archive', 'no batch', 'no test batch', 'no train.pt', 'no test.pt'])
def test_full_disk_is_one_line_and_leaves_only_whole_files(
        call, patched, closed_port, tmp_path, size, n_test, made):
    here = tmp_path / 'here'
    here.mkdir()
    patched(url=f'http://127.0.0.1:{closed_port}/', **write_archive(here / ARCHIVE, n_test))
    before = content_of(here)
    words = ['--data-dir', here, '--trials', 1, *NARROW_ARGS, 'opt.batch_size=4', 'opt.train_epochs=1']
    with limited(resource.RLIMIT_FSIZE, size):
        assert_download_failed(call(*words), here)
    left = content_of(here)
    assert {*left} == {ARCHIVE, *made} and left.items() >= before.items()
    result = call(*words)
    assert result.status == 0, result.err
    left.update({name: content_of(here)[name] for name in ('train.pt', 'test.pt') if name not in left})
    assert content_of(here) == left


def test_disk_that_the_download_fills_is_one_line_and_changes_nothing(download_fails, cifar):
    with limited(resource.RLIMIT_FSIZE, 50_000):
        download_fails(sending(cifar.path.read_bytes()))


# ---------------------------------------- Several processes ----------------------------------------

@contextlib.contextmanager
def started(folder, n, before, code):
    """n processes that have all done one piece of code and begin another at once."""
    lines = ['import datetime, sys, zlib', 'from unittest import mock',
             f'sys.path.insert(0, {str(ROOT)!r})', 'import airbench94_baseline', before,
             'print("ready", flush=True)', 'input()', code]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(live(
            folder, [sys.executable, '-c', '\n'.join(lines)], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(no_proxy='127.0.0.1'))) for _ in range(n)]
        assert [process.stdout.readline() for process in processes] == ['ready\n'] * n
        for process in processes:
            process.stdin.write('\n')
            process.stdin.flush()
        yield processes


def outputs_of(processes):
    ends = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert {end[2] for end in ends} == {0}, ends
    return [end[0] for end in ends]


@pytest.fixture
def as_patched(cifar, server):
    """Code of a process that downloads the archive of `server`."""
    return (f"import torchvision\nfor pair in {({'url': server.url, **cifar.attributes})!r}.items():\n"
            "    setattr(torchvision.datasets.CIFAR10, *pair)")


def sums(data):
    return [zlib.crc32(x[key].numpy().tobytes()) for x in data.values() for key in ('images', 'labels')]


@times(3, 10)
def test_processes_on_an_empty_directory_all_end_well(cifar, as_patched, tmp_path, n):
    code = f"{inspect.getsource(sums)}\nprint(*sums(airbench94_baseline.load_data('here', 'cpu')))"
    with started(tmp_path, n, as_patched, code) as processes:
        lines = [out.splitlines()[-1] for out in outputs_of(processes)]
    assert lines == [' '.join(map(str, sums(cifar.content)))] * n
    assert sorted(os.listdir(tmp_path / 'here')) == ['test.pt', 'train.pt']


def test_download_that_is_killed_leaves_no_half_cache_and_the_next_succeeds(
        baseline, cifar, patched, server, as_patched, tmp_path):
    def hang(self, source, output):
        output.write(source.read(50_000))
        hanging.wait(100)

    here, hanging, server.handler.copyfile = tmp_path / 'here', threading.Event(), hang
    with started(tmp_path, 1, as_patched, "airbench94_baseline.load_data('here', 'cpu')") as [process]:
        wait_for(lambda: any(path.stat().st_size for path in here.rglob('*.gz*')) or process.poll())
        process.kill()
        process.wait(100)
    hanging.set()
    del server.handler.copyfile
    assert [name.split('-')[0] for name in os.listdir(here)] == ['.download']
    patched(url=server.url)
    assert_same(baseline.load_data(here, 'cpu'), cifar.content)


def test_experiments_begun_in_the_same_second_have_a_log_folder_each(data_dir, tmp_path):
    clock = ('airbench94_baseline.datetime = now = mock.Mock(wraps=datetime)\n'
             'now.datetime.now.return_value = datetime.datetime(2026, 1, 1)')
    args = ['--data-dir', str(data_dir), '--trials', '3', '--quiet', *NARROW_ARGS, 'opt.train_epochs=1']
    with started(tmp_path, 2, clock, f'airbench94_baseline.main({args})') as processes:
        outputs = outputs_of(processes)
    logs = [tmp_path / re.search('^Log: (.*)', out, re.M)[1] for out in outputs]
    assert sorted(tmp_path.glob('logs/*')) == sorted(logs) and len({*logs}) == 2
    for log, out in zip(logs, outputs):
        assert [(r['trial'], f"{r['tta_acc']:.2%}"[:-1]) for r in records(log)] == [
            (trial, accuracy) for trial, _, _, accuracy in rows_of(out)]
        assert f"seed {experiment_of(log)['seed']}\n" in out and len(records(log)) == 3
        assert (log / 'code.py').read_text() == (ROOT / 'airbench94_baseline.py').read_text()
