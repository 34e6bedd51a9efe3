"""The data: caches of any content, the download by torchvision's own code, and the synthetic images."""
import functools
import hashlib
import http.server
import inspect
import io
import os
import pickle
import shutil
import socket
import sys
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

from conftest import NARROW_ARGS
from test_cli import assert_refused, call  # noqa: F401, F811 (a fixture)

NAMES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
ARCHIVE = 'cifar-10-python.tar.gz'
MARKER = 'code-of-a-pickle-ran'


def assert_same(loaded, expected):
    for split, content in expected.items():
        assert list(loaded[split]['classes']) == list(content['classes'])
        for key in ('images', 'labels'):
            assert loaded[split][key].dtype == content[key].dtype
            assert torch.equal(loaded[split][key], content[key])


# ---------------------------------------- A cache that is there ----------------------------------------

def test_cache_is_read_as_it_is_without_torchvision(baseline, data, data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setitem(sys.modules, 'torchvision.datasets', None)
    files = sorted(data_dir.iterdir())
    assert_same(baseline.load_data(data_dir, 'cpu'), data)
    assert sorted(data_dir.iterdir()) == files


class Trap:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return open, (MARKER, 'w')


def text(path, cache):
    path.write_text('this is not a cache\n')


def truncated(path, cache):
    torch.save(cache, path)
    os.truncate(path, path.stat().st_size // 2)


def directory(path, cache):
    path.mkdir()


def pickled_code(path, cache):
    torch.save({**cache, 'classes': Trap()}, path)


def bare_pickled_code(path, cache):
    path.write_bytes(pickle.dumps(Trap()))


def saved(**changes):
    """A writer of the cache with other entries: key=function(entry), or key=None for no such entry."""
    def write(path, cache):
        torch.save({key: changes[key](entry) if key in changes else entry for key, entry in cache.items()
                    if changes.get(key, entry) is not None}, path)
    return write


def other_content(content):
    return lambda path, cache: torch.save(content, path)


FAULTS = {
    'truncated': truncated, 'empty': lambda path, cache: path.touch(), 'text': text, 'directory': directory,
    'pickled code': pickled_code, 'bare pickled code': bare_pickled_code,
    'a tensor': other_content(torch.zeros(3)), 'a list': other_content([1, 2]),
    'no entries': other_content({}), 'no images': saved(images=None), 'no labels': saved(labels=None),
    'no classes': saved(classes=None), 'float images': saved(images=torch.Tensor.float),
    'images as a list': saved(images=lambda x: [1]),
    'channels first': saved(images=lambda x: x.permute(0, 3, 1, 2)),
    'flat images': saved(images=lambda x: x.flatten(1)), 'one image': saved(images=lambda x: x[0]),
    'no image': saved(images=lambda x: x[:0], labels=lambda x: x[:0]),
    'int32 labels': saved(labels=torch.Tensor.int), 'labels as a list': saved(labels=torch.Tensor.tolist),
    'a label too few': saved(labels=lambda x: x[1:]),
    'one-hot labels': saved(labels=lambda x: torch.eye(10)[x].long()),
    'label 10': saved(labels=lambda x: x + 1), 'label -1': saved(labels=lambda x: x - 1),
    'nine classes': saved(classes=lambda x: x[1:]), 'one class': saved(classes=lambda x: 3),
    'numbers as classes': saved(classes=lambda x: [*range(10)]),
    'classes in one word': saved(classes=lambda x: 'abcdefghij')}


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('fault', FAULTS)
def test_faulty_cache_is_refused_and_its_code_not_run(call, data, data_dir, tmp_path, fault, split):
    folder = tmp_path / 'data'
    shutil.copytree(data_dir, folder)
    path = folder / f'{split}.pt'
    path.unlink()
    FAULTS[fault](path, data[split])
    result = call('--data-dir', folder, *NARROW_ARGS)
    assert_refused(result)
    assert str(path) in result.err and 'delete it' in result.err
    assert os.listdir(tmp_path) == ['data']  # no log, no marker


@pytest.mark.parametrize('fault', ['bare pickled code', 'a tensor'])
def test_torchs_warnings_do_not_stand_beside_the_one_line(baseline, data, data_dir, tmp_path, fault, recwarn):
    FAULTS[fault](tmp_path / 'train.pt', data['train'])
    with pytest.raises(baseline.UserError):
        baseline.read_cache(tmp_path / 'train.pt', 'cpu')
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_not_blamed_on_a_good_cache(call, data_dir, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, 'load', load)
    result = call('--data-dir', data_dir, *NARROW_ARGS)
    assert_refused(result)
    assert 'delete it' not in result.err and 'memory' in result.err


# ---------------------------------------- The download ----------------------------------------

def add(tar, name, content):
    """Add a pickle to the archive, in CIFAR-10's folder; returns its name and MD5."""
    info, content = tarfile.TarInfo(f'cifar-10-batches-py/{name}'), pickle.dumps(content, protocol=2)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    return name, hashlib.md5(content).hexdigest()


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """An archive in CIFAR-10's layout: its path, its content as of `load_data`, CIFAR10's attributes."""
    path, rng = tmp_path_factory.mktemp('served') / ARCHIVE, np.random.default_rng(0)
    images = rng.integers(256, size=(6 * 4, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(10, size=6 * 4)
    names = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
    with tarfile.open(path, 'w:gz') as tar:
        entries = [add(tar, name, {'batch_label': name, 'labels': labels[4 * i:4 * i + 4].tolist(),
                                   'data': images[4 * i:4 * i + 4].reshape(4, -1),
                                   'filenames': [f'{k}.png' for k in range(4)]})
                   for i, name in enumerate(names)]
        meta, md5 = add(tar, 'batches.meta', {'label_names': NAMES, 'num_cases_per_batch': 4})
    content = {split: {'images': torch.from_numpy(images[part]).permute(0, 2, 3, 1),
                       'labels': torch.from_numpy(labels[part]), 'classes': NAMES}
               for split, part in (('train', slice(20)), ('test', slice(20, None)))}
    attributes = {'tgz_md5': hashlib.md5(path.read_bytes()).hexdigest(), 'train_list': entries[:5],
                  'test_list': entries[5:], 'meta': {'filename': meta, 'key': 'label_names', 'md5': md5}}
    return SimpleNamespace(path=path, content=content, attributes=attributes)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        self.server.requests.append(self.path)


@pytest.fixture
def server(cifar):
    """A local HTTP server of the archive: its url, the requests it got."""
    handler = type('FreshHandler', (Handler,), {})
    with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(handler, directory=cifar.path.parent)) as server:
        server.requests, server.handler = [], handler
        server.handle_error = lambda *args: None  # torchvision hangs up after it has asked for redirects
        server.url = f'http://127.0.0.1:{server.server_port}/{ARCHIVE}'
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def closed_port():
    with socket.socket() as port:
        port.bind(('127.0.0.1', 0))  # bound, but nobody listens
        yield port.getsockname()[1]


@pytest.fixture
def patched(cifar, monkeypatch):
    """patched(url=..., ...): torchvision's CIFAR10 for the archive, with other attributes on top."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    def patched(**attributes):
        for key, value in {**cifar.attributes, **attributes}.items():
            monkeypatch.setattr(torchvision.datasets.CIFAR10, key, value)
    return patched


@pytest.fixture
def downloaded(baseline, patched, server, tmp_path):
    """A data directory, not there before, that the archive was downloaded to; and what was loaded."""
    patched(url=server.url)
    folder = tmp_path / 'some' / 'where'
    return folder, baseline.load_data(folder, 'cpu')


def test_download_gives_the_archives_images_labels_and_names(downloaded, cifar):
    assert_same(downloaded[1], cifar.content)


def test_download_leaves_the_two_caches_alone(downloaded):
    assert sorted(os.listdir(downloaded[0])) == ['test.pt', 'train.pt']


def test_download_is_one_request_for_both_splits(downloaded, server):
    assert 0 < len(server.requests) <= 2  # torchvision asks for redirects, then for the file


def test_second_load_needs_no_server(baseline, downloaded, server, cifar):
    server.requests.clear()
    assert_same(baseline.load_data(downloaded[0], 'cpu'), cifar.content)
    assert not server.requests


def test_missing_half_of_a_cache_is_downloaded_and_the_other_kept(
        baseline, patched, server, cifar, data_dir, data, tmp_path):
    patched(url=server.url)
    shutil.copy(data_dir / 'train.pt', tmp_path)
    assert_same(baseline.load_data(tmp_path, 'cpu'), {'train': data['train'], 'test': cifar.content['test']})


def test_archive_that_the_user_put_there_needs_no_network(baseline, patched, cifar, closed_port, tmp_path):
    patched(url=f'http://127.0.0.1:{closed_port}/{ARCHIVE}')
    shutil.copy(cifar.path, tmp_path)
    assert_same(baseline.load_data(tmp_path, 'cpu'), cifar.content)
    assert sorted(os.listdir(tmp_path)) == [ARCHIVE, 'test.pt', 'train.pt']


def assert_download_failed(result, folder):
    """Status 2 and one line (after torchvision's progress bar) that says which files to put where."""
    *progress, line = result.err.splitlines()
    assert_refused(SimpleNamespace(status=result.status, err=line + '\n'))
    assert not [text for text in progress if 'Traceback' in text or 'Error' in text]
    assert all(word in line for word in (str(folder), 'train.pt', 'test.pt', ARCHIVE)), line


def assert_empty(folder):
    assert os.listdir(folder.parent) == [folder.name] and not os.listdir(folder)


def test_without_network_the_message_says_which_files_go_where(call, patched, closed_port, tmp_path):
    patched(url=f'http://127.0.0.1:{closed_port}/{ARCHIVE}')
    assert_download_failed(call('--data-dir', 'here', *NARROW_ARGS), 'here')
    assert_empty(tmp_path / 'here')


def test_failed_download_keeps_what_the_user_has(baseline, patched, closed_port, data_dir, tmp_path):
    patched(url=f'http://127.0.0.1:{closed_port}/{ARCHIVE}')
    shutil.copy(data_dir / 'train.pt', tmp_path)
    with pytest.raises(baseline.UserError):
        baseline.load_data(tmp_path, 'cpu')
    assert os.listdir(tmp_path) == ['train.pt']


def test_ctrl_c_in_a_download_leaves_no_file(call, monkeypatch, tmp_path):
    class Interrupted(torchvision.datasets.CIFAR10):
        def __init__(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Interrupted)
    assert_refused(call('--data-dir', 'here', *NARROW_ARGS), 130)
    assert_empty(tmp_path / 'here')


def test_unwritable_data_directory_is_refused(call, tmp_path):
    result = call('--data-dir', '/dev/null/x', *NARROW_ARGS)
    assert_refused(result)
    assert '/dev/null/x' in result.err and not os.listdir(tmp_path)


# ---------------------------------------- Synthetic images ----------------------------------------

@pytest.fixture(scope='module')
def synthetic(baseline):
    return baseline.synthetic_data('cpu', train=3000, test=500)


@pytest.fixture(scope='module')
def images_to_test(synthetic):
    return synthetic['test']['images'].float().flatten(1)


@pytest.fixture(scope='module')
def class_means(synthetic):
    """The mean training image of each class."""
    images, labels = synthetic['train']['images'].float().flatten(1), synthetic['train']['labels']
    return torch.stack([images[labels == k].mean(0) for k in range(10)])


def test_synthetic_data_has_the_form_of_cifar(synthetic):
    for split, n in (('train', 3000), ('test', 500)):
        content = synthetic[split]
        assert content['images'].dtype == torch.uint8 and content['images'].shape == (n, 32, 32, 3)
        assert content['labels'].dtype == torch.int64 and content['labels'].shape == (n,)
        assert set(content['labels'].tolist()) == set(range(10))
        assert [type(name) for name in content['classes']] == [str] * 10


def test_synthetic_data_is_the_size_of_cifar_by_default(baseline):
    parameters = inspect.signature(baseline.synthetic_data).parameters
    assert [parameters[split].default for split in ('train', 'test')] == [50000, 10000]


def test_synthetic_data_is_the_same_every_time(baseline, synthetic):
    torch.manual_seed(1)
    assert_same(baseline.synthetic_data('cpu', train=3000, test=500), synthetic)


def test_synthetic_data_leaves_the_random_stream_alone(baseline):
    before = torch.get_rng_state()
    baseline.synthetic_data('cpu', train=10, test=10)
    assert torch.equal(torch.get_rng_state(), before)


def test_synthetic_classes_can_be_learned(synthetic, images_to_test, class_means):
    nearest = torch.cdist(images_to_test, class_means).argmin(1)
    assert (nearest == synthetic['test']['labels']).float().mean() > 0.5


def test_some_synthetic_images_are_too_faint_to_classify(synthetic, images_to_test, class_means):
    center = class_means.mean(0)
    directions = torch.nn.functional.normalize(class_means - center)
    best = ((images_to_test - center) @ directions.T).argmax(1)  # with no more to know than the patterns
    assert 0.9 < (best == synthetic['test']['labels']).float().mean() < 0.99
