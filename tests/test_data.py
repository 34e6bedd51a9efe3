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
import torch.nn.functional as F
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
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        labels = TRAIN['labels'].to(dtype)
        own = {'labels': labels, 'classes': tuple(names), 'source': 'a camera'}
        torch.save(TRAIN | own, tmp_path / 'train.pt')
        loaded = baseline.read_split(tmp_path / 'train.pt')
        assert_same({'train': loaded}, {'train': TRAIN | {'classes': names}})


REFUSED = {  # kind: the content, a word of what the line says
    'no labels': ({'images': TRAIN['images'], 'classes': NAMES}, 'lacks'),
    'no classes': (
        {'images': TRAIN['images'], 'labels': TRAIN['labels']},
        'lacks',
    ),
    'float images': (TRAIN | {'images': TRAIN['images'].float()}, 'uint8'),
    'NCHW images': (TRAIN | {'images': TRAIN['images'].permute(0, 3, 1, 2)}, '32, 32, 3'),
    'no image': (TRAIN | {'images': TRAIN['images'][:0], 'labels': TRAIN['labels'][:0]}, ''),
    'float labels': (TRAIN | {'labels': TRAIN['labels'].float()}, 'labels'),
    'a label too few': (TRAIN | {'labels': TRAIN['labels'][1:]}, 'labels'),
    'one-hot labels': (TRAIN | {'labels': torch.eye(10)[TRAIN['labels']].long()}, 'labels'),
    'label 10': (TRAIN | {'labels': TRAIN['labels'] + 1}, 'labels'),
    'label -1': (TRAIN | {'labels': TRAIN['labels'] - 1}, 'labels'),
    'a number as classes': (TRAIN | {'classes': 10}, 'classes'),
    'a list': ([TRAIN['images'], TRAIN['labels']], 'a list'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_other_content_is_refused_with_the_reason(kind, baseline, tmp_path):
    path, (content, word) = tmp_path / 'train.pt', REFUSED[kind]
    torch.save(content, path)
    with pytest.raises(baseline.UserError) as error:
        baseline.read_split(path)
    line = str(error.value)
    assert line.startswith(f'{path}') and word in line and '\n' not in line, line


@pytest.fixture
def refused(call, tmp_path, server):
    """Return refused(folder, *words): the command is one line with these words.

    It makes no log, asks no server and leaves the folder as it was.
    """

    def refused(folder, *words):
        before = content_of(folder) if folder.exists() else None
        result = call('--data-dir', folder, *NARROW_ARGS)
        assert_refused(result)
        missing = [word for word in words if str(word) not in result.err]
        assert not missing and not server.requests, result.err
        assert not (tmp_path / 'logs').exists()
        if before is not None:
            assert content_of(folder) == before and not [*folder.glob('.download-*')]

    return refused


@pytest.fixture
def own(data_dir, tmp_path):
    """Return a folder with a train.pt and a test.pt of ten classes."""
    return Path(shutil.copytree(data_dir, tmp_path / 'own'))


def test_a_file_that_is_no_data_is_named(own, refused):
    (own / 'test.pt').write_text('no data')
    refused(own, own / 'test.pt', 'not a file of torch.save')


def test_splits_of_different_classes_are_refused(own, refused):
    """Own training images of five classes beside CIFAR-10's test images."""
    labels = TRAIN['labels'] % 5
    torch.save(TRAIN | {'labels': labels, 'classes': NAMES[:5]}, own / 'train.pt')
    refused(own, own, 'different classes')


@pytest.mark.parametrize('missing', ['train.pt', 'test.pt'])
def test_a_missing_half_is_refused_and_not_downloaded(missing, own, refused):
    (own / missing).unlink()
    refused(own, own / missing, 'missing')


def test_a_folder_of_pictures_is_refused_and_nothing_is_downloaded_into_it(tmp_path, refused):
    folder = tmp_path / 'pictures'
    (folder / 'cat').mkdir(parents=True)
    refused(folder, folder, 'cat', 'empty or new folder')


def test_a_file_as_a_folder_is_refused(own, refused):
    refused(own / 'train.pt' / 'here', own / 'train.pt' / 'here')


def test_a_file_that_may_not_be_read_says_so_and_no_more(own, refused, monkeypatch):
    """Simulated, as root may read everything."""

    def denied(path):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(zipfile, 'ZipFile', denied)
    refused(own, own / 'train.pt', 'cannot be read: Permission denied')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='becomes another user')
def test_a_folder_that_may_not_be_entered_is_one_line(baseline, tmp_path):
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(baseline.UserError, match=f'{tmp_path / "inner"}.*Permission denied'):
            baseline.load_data(tmp_path / 'inner', 'cpu')
    finally:
        os.seteuid(0)


# ---------------------------------------- Hostile files ----------------------------------------
def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


GOOD = saved(TRAIN)
PLACES = range(len(GOOD))


def flipped(rng, places):
    """Return GOOD with one bit flipped in one of some places."""
    mutated = bytearray(GOOD)
    mutated[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def rezipped(name, entry):
    """Return GOOD with another content of an entry of the zip."""
    old, file = zipfile.ZipFile(io.BytesIO(GOOD)), io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as new:
        for info in old.namelist():
            new.writestr(info, entry if info == f'archive/{name}' else old.read(info))
    return file.getvalue()


class Trap:
    """Write a file when unpickled."""

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


@times(45, 600)
@pytest.mark.filterwarnings('ignore')
def test_hostile_file_is_refused_or_as_it_was_and_runs_no_code(n, baseline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(n)
    for kind in itertools.islice(itertools.cycle(MUTATIONS), n):
        path = tmp_path / f'{kind}.pt'  # so each failed assertion shows it
        path.write_bytes(MUTATIONS[kind](rng))
        try:
            loaded = baseline.read_split(path)
        except baseline.UserError as error:
            assert str(error).startswith(str(path)) and '\n' not in str(error)
        else:
            assert_same({'train': loaded}, {'train': TRAIN})
        assert os.listdir(tmp_path) == [path.name]  # what a pickle's code would write
        path.unlink()


# ---------------------------------------- The download ----------------------------------------
ARCHIVE = 'cifar-10-python.tar.gz'
BATCHES = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
CIFAR = {'train': TRAIN, 'test': TEST}


def make_archive():
    """Return CIFAR in CIFAR-10's layout."""
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
    """Return the bytes of a reply, which may claim to be longer than it is."""
    return b'HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n' % (claimed or len(content)) + content


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.server.before()
        self.wfile.write(self.server.reply)
        self.server.after()


@pytest.fixture
def server(monkeypatch):
    """Start a local HTTP server that CIFAR10 asks.

    It has its `reply`, what it does `before` and `after`, the number of `requests` that came, and
    the `attributes` that make CIFAR10 ask it.
    """
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
def folder(tmp_path):
    """Return an empty data folder."""
    (tmp_path / 'data').mkdir()
    return tmp_path / 'data'


def test_download_says_the_full_path_first_and_is_made_once(script, server, tmp_path, monkeypatch):
    """A mistyped --data-dir is seen before 170 MB come."""
    folder = tmp_path / 'some' / 'where'
    said = []
    monkeypatch.setattr('builtins.print', lambda text, **options: said.append(text))
    server.before = lambda: said.append('a request')
    assert_same(script.load_data(folder, 'cpu'), CIFAR)
    assert said[0] == f'Downloading CIFAR-10 (170 MB) into {folder}' and said[1] == 'a request'
    assert sorted(os.listdir(folder)) == ['test.pt', 'train.pt']
    requests = server.requests  # torchvision also asks for redirects
    assert_same(script.load_data(folder, 'cpu'), CIFAR)
    assert server.requests == requests > 0


def test_archive_that_the_user_put_there_needs_no_network(baseline, server, folder):
    (folder / ARCHIVE).write_bytes(CONTENT)
    assert_same(baseline.load_data(folder, 'cpu'), CIFAR)
    assert {ARCHIVE, 'test.pt', 'train.pt'} <= {*os.listdir(folder)} and not server.requests


def test_extracted_folder_in_place_of_the_archive_needs_no_network(baseline, server, folder):
    with tarfile.open(fileobj=io.BytesIO(CONTENT)) as tar:
        tar.extractall(folder)
    assert_same(baseline.load_data(folder, 'cpu'), CIFAR)
    assert not server.requests


NO_ARCHIVES = {
    'an HTML page': b'<html>Not found</html>',
    'a cut file': CONTENT[:5000],
    'an empty file': b'',
}


@pytest.mark.parametrize('kind', NO_ARCHIVES)
def test_something_else_in_place_of_the_archive_is_named_with_its_size(kind, folder, refused):
    content = NO_ARCHIVES[kind]
    (folder / ARCHIVE).write_bytes(content)
    refused(folder, folder / ARCHIVE, 'is not CIFAR-10', f'{len(content):,} bytes', 'remove it')


def test_an_incomplete_extracted_folder_is_named_and_not_completed_by_a_download(folder, refused):
    with tarfile.open(fileobj=io.BytesIO(CONTENT)) as tar:
        tar.extractall(folder)
    (folder / 'cifar-10-batches-py' / 'data_batch_3').unlink()
    refused(folder, folder, 'corrupted')


@pytest.fixture
def download_fails(call, server, folder, monkeypatch):
    """Return download_fails(reply, **attributes): status 2 and one line, no file is changed.

    The line says which files to put where. torchvision's progress may stand above it.
    """

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
    'no reply': {'reply': b''},
    'garbage': {'reply': random.Random(0).randbytes(9999)},
    'wrong MD5': {'reply': sending(CONTENT), 'tgz_md5': '0' * 32},
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


@pytest.mark.parametrize('size', [0, 5_000, 13_000, 40_000, 62_000])
def test_full_disk_leaves_only_whole_files(size, download_fails, folder):
    """No file may grow over a size: of nothing, or of a part of a batch, test.pt or train.pt."""
    (folder / ARCHIVE).write_bytes(CONTENT)
    with limited(resource.RLIMIT_FSIZE, size):
        download_fails()


def test_ctrl_c_in_a_download_leaves_no_file(call, monkeypatch, folder):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.CIFAR10, '__init__', interrupted)
    assert_refused(call('--data-dir', folder, *NARROW_ARGS), 130)
    assert not os.listdir(folder)


# ---------------------------------------- Several processes ---------------------------------------
def downloading(folder, server, file):
    """Start a process that downloads into folder/here, and saves what it loads as a file."""
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
def test_synthetic_data_has_the_form_of_cifar_and_is_always_the_same(script):
    state = torch.get_rng_state()
    data = script.synthetic_data('cpu', train=300, test=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(script.synthetic_data('cpu', train=300, test=50), data)
    for split, n in (('train', 300), ('test', 50)):
        images, labels, classes = (data[split][key] for key in ('images', 'labels', 'classes'))
        assert images.dtype == torch.uint8 and images.shape == (n, 32, 32, 3)
        assert labels.dtype == torch.int64 and {*labels.tolist()} == {*range(10)}
        assert len(classes) == 10


@pytest.fixture(scope='module')
def learnable(baseline):
    """Return 24,576 synthetic images for training and 500 for testing, of 12 x 12 pixels."""
    data = baseline.synthetic_data('cpu', train=24576, test=500)
    for split in data.values():
        images = split['images'].permute(0, 3, 1, 2).float()
        images = F.interpolate(images, 12, mode='area').round().byte()
        split['images'] = images.permute(0, 2, 3, 1).contiguous()
    return data


def accuracy_after(script, data, epochs):
    """Return the accuracy without TTA of a script's own hyperparameters, but for the epochs."""
    hyp = script.default_hyp()
    hyp['opt']['train_epochs'] = epochs
    hyp['net']['tta_level'] = 0
    if script.NAME == 'fast94':
        hyp['opt']['low_res_epochs'] = []  # larger than small images
    record, _ = script.train(data, 1, hyp, quiet=True)
    return record['tta_acc']


def test_small_synthetic_images_are_learned_at_full_width(script, learnable):
    assert accuracy_after(script, learnable, epochs=1.5) > 0.8


@pytest.mark.campaign
def test_synthetic_images_are_learned_within_two_epochs(script):
    assert accuracy_after(script, script.synthetic_data('cpu'), epochs=2.0) > 0.8
