"""Files that may be anybody's, the download by torchvision's own code, the synthetic images."""

import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import os
import pickle
import random
import resource
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import NARROW_ARGS, ROOT, assert_refused, limited, live, times

RNG = np.random.default_rng(0)
IMAGES = torch.from_numpy(RNG.integers(256, size=(24, 32, 32, 3), dtype=np.uint8))
LABELS, NAMES = torch.arange(24) % 10, [*'abcdefghij']
TRAIN = {'images': IMAGES[:20].clone(), 'labels': LABELS[:20].clone(), 'classes': NAMES}
TEST = {'images': IMAGES[20:].clone(), 'labels': LABELS[20:].clone(), 'classes': NAMES}


def assert_same(loaded, expected):
    for split, content in expected.items():
        assert loaded[split]['classes'] == content['classes']
        for key in ('images', 'labels'):
            assert loaded[split][key].dtype == content[key].dtype
            assert torch.equal(loaded[split][key], content[key])


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------- Files that are there ------------------------------------
def test_good_files_are_read_as_they_are_without_torchvision(script, data, data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setitem(sys.modules, 'torchvision.datasets', None)
    before = content_of(data_dir)
    assert_same(script.load_data(data_dir, 'cpu'), data)
    assert content_of(data_dir) == before


def test_own_data_may_have_small_labels_other_classes_and_more_entries(baseline, tmp_path):
    names = [*map(str, range(100))]
    own = {'labels': TRAIN['labels'].byte(), 'classes': tuple(names), 'source': 'a camera'}
    torch.save(TRAIN | own, tmp_path / 'train.pt')
    loaded = baseline.read_split(tmp_path / 'train.pt', 'cpu')
    assert_same({'train': loaded}, {'train': TRAIN | {'classes': names}})


REFUSED = {  # kind: the content, a word of what the line says
    'no labels': ({'images': TRAIN['images'], 'classes': NAMES}, "no 'labels'"),
    'no classes': ({'images': TRAIN['images'], 'labels': TRAIN['labels']}, "no 'classes'"),
    'float images': (TRAIN | {'images': TRAIN['images'].float()}, 'uint8'),
    'NCHW images': (TRAIN | {'images': TRAIN['images'].permute(0, 3, 1, 2)}, '32, 32, 3'),
    'no image': (TRAIN | {'images': TRAIN['images'][:0], 'labels': TRAIN['labels'][:0]}, ''),
    'float labels': (TRAIN | {'labels': TRAIN['labels'].float()}, 'labels'),
    'a label too few': (TRAIN | {'labels': TRAIN['labels'][1:]}, 'labels'),
    'one-hot labels': (TRAIN | {'labels': torch.eye(10)[TRAIN['labels']].long()}, 'labels'),
    'label 10': (TRAIN | {'labels': TRAIN['labels'] + 1}, 'labels'),
    'label -1': (TRAIN | {'labels': TRAIN['labels'] - 1}, 'labels'),
    'a number as classes': (TRAIN | {'classes': 10}, ''),
    'a list': ([TRAIN['images'], TRAIN['labels']], ''),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_other_content_is_refused_with_the_reason(kind, baseline, tmp_path):
    path, (content, word) = tmp_path / 'train.pt', REFUSED[kind]
    torch.save(content, path)
    with pytest.raises(baseline.UserError) as error:
        baseline.read_split(path, 'cpu')
    line = str(error.value)
    assert line.startswith(f'{path}: ') and word in line and '\n' not in line, line
    assert 'If it is not your own, delete it' in line


def test_unusable_data_folder_ends_the_command_in_one_line_without_a_log(call, data_dir, tmp_path):
    bad = Path(shutil.copytree(data_dir, tmp_path / 'data')) / 'test.pt'
    bad.write_text('no data')
    for folder, named in (('data', bad), ('/dev/null/x', '/dev/null/x')):
        result = call('--data-dir', folder, *NARROW_ARGS)
        assert_refused(result)
        assert str(named) in result.err and os.listdir(tmp_path) == ['data']


# ---------------------------------------- Hostile files ----------------------------------------
def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


GOOD = saved(TRAIN)
PLACES = range(len(GOOD))


def flipped(rng, places):
    """GOOD with one bit flipped in one of some places."""
    mutated = bytearray(GOOD)
    mutated[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def in_directory(offset, value):
    """GOOD with other bytes in what the zip's directory says about the images."""
    place = GOOD.rindex(b'archive/data/0') - 46 + offset
    return GOOD[:place] + value + GOOD[place + len(value) :]


def rezipped(name, entry, compression=zipfile.ZIP_STORED):
    """GOOD with another content of an entry of the zip."""
    old, file = zipfile.ZipFile(io.BytesIO(GOOD)), io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression, compresslevel=1) as new:
        for info in old.namelist():
            new.writestr(info, entry if info == f'archive/{name}' else old.read(info))
    return file.getvalue()


def overlapping():
    """GOOD with entries that all name the same bytes: sums over each would take for ever."""
    file = io.BytesIO(GOOD)
    with zipfile.ZipFile(file, 'a') as old:
        old.filelist += [old.getinfo('archive/data/0')] * 60_000
        old._didModify = True
    return file.getvalue()


class Trap:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return open, ('code-of-a-pickle-ran', 'w')


SYSTEM = b"cos\nsystem\n(S'touch code-of-a-pickle-ran'\ntR."  # a pickle that calls it
IMAGE, LABEL = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
HUGE = {'images': IMAGE.expand(10**9, -1, -1, -1), 'labels': LABEL.expand(10**9)}
META = {key: tensor.to('meta') for key, tensor in HUGE.items()}
MUTATIONS = {
    'empty': lambda rng: b'',
    'truncated': lambda rng: GOOD[: rng.choice(PLACES)],
    'bit flipped at the start': lambda rng: flipped(rng, PLACES[:1500]),  # the pickle
    'bit flipped at the end': lambda rng: flipped(rng, PLACES[-1500:]),  # the zip's directory
    'bit flipped anywhere': lambda rng: flipped(rng, PLACES),
    'said to be a folder': lambda rng: in_directory(38, b'\x10'),
    'said to be larger': lambda rng: in_directory(24, b'\xff\xff\xff\x7f'),
    'zip bomb': lambda rng: rezipped('data/0', bytes(300 << 20), zipfile.ZIP_DEFLATED),
    'entries that overlap': lambda rng: overlapping(),
    'more claimed than is there': lambda rng: saved(TRAIN | HUGE),
    'images without content': lambda rng: saved(TRAIN | META),
    'labels without content': lambda rng: saved(TRAIN | {'labels': META['labels'][:20]}),
    'sparse images': lambda rng: saved(TRAIN | {'images': HUGE['images'][:20].to_sparse()}),
    'huge labels': lambda rng: saved(TRAIN | {'labels': TRAIN['labels'] + 2**62}),
    'code among the classes': lambda rng: saved(TRAIN | {'classes': [Trap()]}),
    'code beside the entries': lambda rng: saved(TRAIN | {'more': Trap()}),
    'code alone': lambda rng: pickle.dumps(Trap()),
    'code in an old file': lambda rng: saved(Trap(), _use_new_zipfile_serialization=False),
    'code in the pickle': lambda rng: rezipped('data.pkl', SYSTEM),
    'code in a tensor': lambda rng: rezipped('data/0', SYSTEM),
}


@times(60, 600)
@pytest.mark.filterwarnings('ignore')
def test_hostile_file_is_refused_or_as_it_was_and_runs_no_code(n, baseline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(n)
    for kind in itertools.islice(itertools.cycle(MUTATIONS), n):
        path = tmp_path / f'{kind}.pt'  # so each failed assertion shows it
        path.write_bytes(MUTATIONS[kind](rng))
        pages, start = int(Path('/proc/self/statm').read_text().split()[0]), time.process_time()
        try:
            with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + 2**28):
                loaded = baseline.read_split(path, 'cpu')
        except baseline.UserError as error:
            assert str(error).startswith(f'{path}: ') and '\n' not in str(error)
        else:
            assert_same({'train': loaded}, {'train': TRAIN})
        assert time.process_time() - start < 5, kind
        assert os.listdir(tmp_path) == [path.name]  # what a pickle's code would write
        path.unlink()


# ---------------------------------------- The download ----------------------------------------
ARCHIVE = 'cifar-10-python.tar.gz'
BATCHES = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
CIFAR = {'train': TRAIN, 'test': TEST}


def make_archive():
    """CIFAR in CIFAR-10's layout."""
    pixels = IMAGES.permute(0, 3, 1, 2).reshape(6, 4, 3072).numpy()
    files = {'batches.meta': {'label_names': NAMES}}
    for name, data, labels in zip(BATCHES, pixels, LABELS.view(6, 4).tolist(), strict=True):
        files[name] = {'data': data, 'labels': labels}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w:gz') as tar:
        for name, content in files.items():
            pickled = pickle.dumps(content)
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(pickled)
            tar.addfile(info, io.BytesIO(pickled))
    return archive.getvalue()


CONTENT = make_archive()
ATTRIBUTES = {  # of torchvision's CIFAR10, with no MD5 but the archive's
    'tgz_md5': hashlib.md5(CONTENT).hexdigest(),
    'train_list': [(name, None) for name in BATCHES[:5]],
    'test_list': [(name, None) for name in BATCHES[5:]],
    'meta': {'filename': 'batches.meta', 'key': 'label_names', 'md5': None},
}


def sending(content, claimed=None):
    """The bytes of a reply, which may claim to be longer than it is."""
    return b'HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n' % (claimed or len(content)) + content


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.server.before()
        self.wfile.write(self.server.reply)
        self.server.after()


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server that CIFAR10 asks: its `reply`, what it does `before` and `after`, the
    number of `requests` that came, and the `attributes` that make CIFAR10 ask it."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.requests, server.reply = 0, sending(CONTENT)
        server.before = server.after = lambda: None
        server.handle_error = lambda *args: None  # torchvision hangs up after the redirects
        url = f'http://127.0.0.1:{server.server_port}/{ARCHIVE}'
        server.attributes = {**ATTRIBUTES, 'url': url}
        for pair in server.attributes.items():
            monkeypatch.setattr(torchvision.datasets.CIFAR10, *pair)
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(data_dir, tmp_path):
    """A data folder that has a train.pt only."""
    (tmp_path / 'data').mkdir()
    return Path(shutil.copy(data_dir / 'train.pt', tmp_path / 'data')).parent


def test_download_leaves_train_and_test_and_is_made_once(script, server, tmp_path, capsys):
    folder = tmp_path / 'some' / 'where'
    assert_same(script.load_data(folder, 'cpu'), CIFAR)
    assert sorted(os.listdir(folder)) == ['test.pt', 'train.pt']
    assert str(folder.absolute()) in capsys.readouterr().out  # the full path, before 170 MB come
    requests = server.requests  # torchvision also asks for redirects
    assert_same(script.load_data(folder, 'cpu'), CIFAR)
    assert server.requests == requests > 0


def test_missing_half_is_downloaded_and_the_other_kept(baseline, server, folder, data):
    assert_same(baseline.load_data(folder, 'cpu'), {**CIFAR, 'train': data['train']})


def test_archive_that_the_user_put_there_needs_no_network(baseline, server, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(CONTENT)
    assert_same(baseline.load_data(tmp_path, 'cpu'), CIFAR)
    assert {ARCHIVE, 'test.pt', 'train.pt'} <= {*os.listdir(tmp_path)} and not server.requests


@pytest.fixture
def download_fails(call, server, folder, monkeypatch):
    """download_fails(reply, **attributes): status 2, one line (after torchvision's progress) that
    says which files to put where, and no file is changed."""

    def download_fails(reply=b'', **attributes):
        server.reply = reply
        for pair in attributes.items():
            monkeypatch.setattr(torchvision.datasets.CIFAR10, *pair)
        before = content_of(folder)
        result = call('--data-dir', 'data', *NARROW_ARGS)
        assert result.status == 2 and 'Traceback' not in result.err, result.err
        line = result.err.splitlines()[-1]
        words = str(folder), 'train.pt', 'test.pt', ARCHIVE, '--synthetic'
        assert [word for word in words if word not in line] == [], line
        assert content_of(folder) == before and not [*folder.glob('.download-*')]

    return download_fails


def corrupt(archive):
    """Such an archive of the right MD5, or it would not be opened."""
    return {'reply': sending(archive), 'tgz_md5': hashlib.md5(archive).hexdigest()}


FAULTS = {
    'no network': {'url': f'http://127.0.0.1:0/{ARCHIVE}'},  # nobody can listen there
    'status 404': {'reply': b'HTTP/1.0 404 Not Found\r\n\r\n'},
    'a redirect to itself': {'reply': b'HTTP/1.0 302 Found\r\nLocation: /\r\n\r\n'},
    'no reply': {'reply': b''},
    'garbage': {'reply': random.Random(0).randbytes(9999)},
    'wrong MD5': {'reply': sending(CONTENT), 'tgz_md5': '0' * 32},
    'empty archive': corrupt(b''),
    'half an archive': corrupt(CONTENT[: len(CONTENT) // 2]),
    'no tar': corrupt(gzip.compress(CONTENT)),
    'no batches': corrupt(gzip.compress(bytes(10240))),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_failed_download_ends_in_one_line_and_changes_no_file(fault, download_fails):
    download_fails(**FAULTS[fault])


@times(2, 20)
def test_download_cut_anywhere(n, download_fails):
    for place in random.Random(0).sample(range(len(CONTENT)), n):
        download_fails(sending(CONTENT[:place], claimed=len(CONTENT)))


def test_disk_that_the_download_fills(download_fails):
    with limited(resource.RLIMIT_FSIZE, 50_000):
        download_fails(sending(CONTENT))


FULL = [(0, ''), (5_000, 'batch'), (40_000, 'train.pt'), (62_000, 'train.pt'), (13_000, 'test.pt')]


@pytest.mark.parametrize('size, part', FULL)
def test_full_disk_leaves_only_whole_files(size, part, download_fails, folder):
    """No file may grow over a size: of nothing, or of a part of a batch, train.pt or test.pt."""
    (folder / ARCHIVE).write_bytes(CONTENT)
    if part == 'train.pt':
        (folder / part).unlink()
    with limited(resource.RLIMIT_FSIZE, size):
        download_fails()


def test_ctrl_c_in_a_download_leaves_no_file(call, monkeypatch, folder):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.CIFAR10, '__init__', interrupted)
    assert_refused(call('--data-dir', folder, *NARROW_ARGS), 130)
    assert os.listdir(folder) == ['train.pt']


# ---------------------------------------- Several processes ---------------------------------------
def downloading(folder, server, file):
    """A process that downloads into folder/here, and saves what it loads as a file."""
    code = f"""
import sys, torch, torchvision
sys.path.insert(0, {str(ROOT)!r})
import airbench94_baseline as script
for pair in {server.attributes!r}.items():
    setattr(torchvision.datasets.CIFAR10, *pair)
torch.save(script.load_data('here', 'cpu'), {file!r})
"""
    return live(folder, [sys.executable, '-c', code])


@times(2, 10)
def test_processes_on_an_empty_folder_all_end_well(n, server, tmp_path):
    server.before = threading.Barrier(n, timeout=600).wait  # until each has asked
    files = [f'{i}.pt' for i in range(n)]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(downloading(tmp_path, server, file)) for file in files]
        for process in started:
            said = process.stdout.read()
            assert process.wait() == 0, said
    for file in files:
        assert_same(torch.load(tmp_path / file, weights_only=True), CIFAR)
    assert sorted(os.listdir(tmp_path / 'here')) == ['test.pt', 'train.pt']


def test_killed_download_leaves_no_half_file_and_the_next_succeeds(baseline, server, tmp_path):
    here, killed = tmp_path / 'here', threading.Event()
    server.reply, server.after = sending(CONTENT[:50_000], claimed=len(CONTENT)), killed.wait
    with downloading(tmp_path, server, 'loaded.pt') as process:
        while not any(path.stat().st_size for path in here.rglob('*.gz*')):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    killed.set()
    assert [name.split('-')[0] for name in os.listdir(here)] == ['.download']
    server.reply = sending(CONTENT)
    assert_same(baseline.load_data(here, 'cpu'), CIFAR)


# ---------------------------------------- Synthetic images ----------------------------------------
def test_synthetic_data_has_the_form_of_cifar_and_is_always_the_same(baseline, modified):
    state = torch.get_rng_state()
    data = baseline.synthetic_data('cpu', train=300, test=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(modified.synthetic_data('cpu', train=300, test=50), data)
    for split, n in (('train', 300), ('test', 50)):
        images, labels, classes = (data[split][key] for key in ('images', 'labels', 'classes'))
        assert images.dtype == torch.uint8 and images.shape == (n, 32, 32, 3)
        assert labels.dtype == torch.int64 and {*labels.tolist()} == {*range(10)}
        assert len(classes) == 10
