"""Files that may be anybody's, the download by torchvision's own code, the synthetic images."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import random
import shutil
import socket
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
import torchvision
from conftest import NARROW_ARGS, ROOT, assert_refused, environment, live, times

resource = pytest.importorskip('resource', reason='file-size limits and /proc: Linux')

NAMES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
ARCHIVE = 'cifar-10-python.tar.gz'
MARKER = 'code-of-a-pickle-ran'


def assert_same(loaded, expected):
    for split, content in expected.items():
        assert list(loaded[split]['classes']) == list(content['classes'])
        assert loaded[split]['labels'].dtype == torch.int64
        for key in ('images', 'labels'):
            assert torch.equal(loaded[split][key], content[key].to(loaded[split][key].dtype))


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
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------- Files that are there ------------------------------------
def test_good_files_are_read_as_they_are_without_torchvision(script, data, data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.setitem(sys.modules, 'torchvision.datasets', None)
    before = content_of(data_dir)
    assert_same(script.load_data(data_dir, 'cpu'), data)
    assert content_of(data_dir) == before


def changed(**changes):
    """The content with some entries changed, or without them (None)."""

    def change(content):
        content = dict(content)
        for key, function in changes.items():
            if function is None:
                del content[key]
            else:
                content[key] = function(content[key])
        return content

    return change


def sampled(n):
    return lambda labels: [f'name {i}' for i in range(n)]


ACCEPTED = {
    'int32 labels': changed(labels=torch.Tensor.int),
    'uint8 labels': changed(labels=torch.Tensor.byte),
    'a hundred classes': changed(classes=sampled(100)),
    'classes as a tuple': changed(classes=tuple),
    'more entries': lambda content: {**content, 'source': 'a camera'},
}


@pytest.mark.parametrize('kind', ACCEPTED)
def test_own_data_may_look_so(kind, baseline, data, tmp_path):
    content = ACCEPTED[kind](data['train'])
    torch.save(content, tmp_path / 'train.pt')
    assert_same({'train': baseline.read_split(tmp_path / 'train.pt', 'cpu')}, {'train': content})


REFUSED = {  # and a word of what the line says
    'no images': (changed(images=None), 'images'),
    'no labels': (changed(labels=None), 'labels'),
    'no classes': (changed(classes=None), 'classes'),
    'float images': (changed(images=torch.Tensor.float), 'uint8'),
    'NCHW images': (changed(images=lambda x: x.permute(0, 3, 1, 2)), '32, 32, 3'),
    'flat images': (changed(images=lambda x: x.flatten(1)), '32, 32, 3'),
    'images as a list': (changed(images=lambda x: [1]), ''),
    'no image': (changed(images=lambda x: x[:0], labels=lambda x: x[:0]), ''),
    'float labels': (changed(labels=torch.Tensor.float), 'labels'),
    'labels as a list': (changed(labels=torch.Tensor.tolist), ''),
    'a label too few': (changed(labels=lambda x: x[1:]), 'labels'),
    'one-hot labels': (changed(labels=lambda x: torch.eye(10)[x].long()), 'labels'),
    'label 10': (changed(labels=lambda x: x + 1), 'labels'),
    'label -1': (changed(labels=lambda x: x - 1), 'labels'),
    'nine classes': (changed(classes=lambda x: x[1:]), 'labels'),
    'a number as classes': (changed(classes=lambda x: 10), ''),
    'a tensor': (lambda content: content['labels'].clone(), ''),
    'a list': (lambda content: [1, 2], ''),
}


@pytest.mark.parametrize('kind', REFUSED)
@pytest.mark.filterwarnings('ignore:Using a non-tuple')  # of a tensor's ["images"]
def test_other_content_is_refused_with_the_reason(kind, baseline, data, tmp_path):
    path, (change, word) = tmp_path / 'train.pt', REFUSED[kind]
    torch.save(change(data['train']), path)
    with pytest.raises(baseline.UserError) as error:
        baseline.read_split(path, 'cpu')
    line = str(error.value)
    assert line.startswith(f'{path}: ') and word in line and '\n' not in line, line
    assert 'If it is not your own, delete it' in line


@pytest.mark.parametrize('split', ['train', 'test'])
def test_the_command_ends_in_one_line_without_a_log(split, call, data_dir, tmp_path):
    folder = Path(shutil.copytree(data_dir, tmp_path / 'data'))
    (folder / f'{split}.pt').write_text('no data\n')
    result = call('--data-dir', folder, *NARROW_ARGS)
    assert_refused(result)
    assert str(folder / f'{split}.pt') in result.err and os.listdir(tmp_path) == ['data']


# ---------------------------------------- Hostile files ----------------------------------------
class Trap:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return open, (MARKER, 'w')


SYSTEM = f"cos\nsystem\n(S'touch {MARKER}'\ntR.".encode()  # a pickle that calls it


def saved(content, **kwargs):
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def saved_with(**changes):
    return lambda rng, good, content: saved({**content, **changes})


def truncated(rng, good, content):
    return good[: rng.randrange(len(good))]


def flipped(start, stop):
    """One bit flipped in a part: the pickle is at the start, the zip's directory at the end."""

    def mutate(rng, good, content):
        mutated = bytearray(good)
        mutated[rng.choice(range(len(good))[start:stop])] ^= 1 << rng.randrange(8)
        return bytes(mutated)

    return mutate


def in_directory(offset, value):
    """Other bytes in what the zip's directory says about the images."""

    def mutate(rng, good, content):
        place = good.rindex(b'archive/data/0') - 46 + offset
        return good[:place] + value + good[place + len(value) :]

    return mutate


def rezipped(name, entry, compression=zipfile.ZIP_STORED):
    """The zip with another content of an entry."""

    def mutate(rng, good, content):
        old, file = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
        with zipfile.ZipFile(file, 'w', compression, compresslevel=1) as new:
            for info in old.namelist():
                new.writestr(info, entry if info == f'archive/{name}' else old.read(info))
        return file.getvalue()

    return mutate


def overlapping(rng, good, content):
    """Entries that all name the same bytes: sums over each would take for ever."""
    file = io.BytesIO(good)
    with zipfile.ZipFile(file, 'a') as old:
        images = next(entry for entry in old.infolist() if entry.filename == 'archive/data/0')
        old.filelist += [images] * 60_000
        old._didModify = True
    return file.getvalue()


IMAGE, LABEL = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
EXPANDED = {'images': IMAGE.expand(10**9, -1, -1, -1), 'labels': LABEL.expand(10**9)}
META = {'images': EXPANDED['images'].to('meta'), 'labels': EXPANDED['labels'].to('meta')}
MUTATIONS = {
    'empty': lambda rng, good, content: b'',
    'truncated': truncated,
    'bit flipped at the start': flipped(0, 1500),
    'bit flipped at the end': flipped(-1500, None),
    'bit flipped anywhere': flipped(0, None),
    'said to be a folder': in_directory(38, b'\x10'),
    'said to be larger': in_directory(24, b'\xff\xff\xff\x7f'),
    'zip bomb': rezipped('data/0', bytes(300 << 20), zipfile.ZIP_DEFLATED),
    'entries that overlap': overlapping,
    'more claimed than is there': saved_with(**EXPANDED),
    'images without content': saved_with(**META),
    'labels without content': saved_with(labels=META['labels'][:24]),
    'sparse images': saved_with(images=IMAGE.expand(24, -1, -1, -1).to_sparse()),
    'huge labels': saved_with(labels=LABEL.expand(24) + 2**62),
    'code among the classes': saved_with(classes=[Trap()]),
    'code beside the entries': saved_with(more=Trap()),
    'code alone': lambda rng, good, content: pickle.dumps(Trap()),
    'code in an old file': lambda rng, good, content: saved(
        Trap(), _use_new_zipfile_serialization=False
    ),
    'code in the pickle': rezipped('data.pkl', SYSTEM),
    'code in a tensor': rezipped('data/0', SYSTEM),
}


def wrong_with(baseline, path, content):
    """What is wrong with reading a file that has this content or is refused; None if nothing is."""
    start = time.process_time()
    try:
        with little_memory():
            loaded = baseline.read_split(path, 'cpu')
        assert_same({'train': loaded}, {'train': content})
    except AssertionError:
        return 'other content'
    except baseline.UserError as error:
        if '\n' in str(error) or not str(error).startswith(f'{path}: '):
            return repr(error)
    except Exception as error:
        return repr(error)
    if os.path.exists(MARKER):
        os.remove(MARKER)
        return 'its code was run'
    seconds = time.process_time() - start
    return f'{seconds} s of work' if seconds > 5 else None


@times(60, 600)
@pytest.mark.filterwarnings('ignore')
def test_hostile_file_is_refused_or_as_it_was_and_its_code_not_run(
    n, baseline, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    content = baseline.synthetic_data('cpu', train=24, test=1)['train']
    path, good, rng, found = tmp_path / 'train.pt', saved(content), random.Random(n), []
    for i in range(n):
        kind = [*MUTATIONS][i % len(MUTATIONS)]
        path.write_bytes(MUTATIONS[kind](rng, good, content))
        wrong = wrong_with(baseline, path, content)
        if wrong:
            found.append(f'{kind}: {wrong}')
    assert not found


# ---------------------------------------- The download ----------------------------------------
def add(tar, name, content):
    """Add a pickle to the archive, in CIFAR-10's folder; returns its name and MD5."""
    info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
    content = pickle.dumps(content, protocol=2)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    return name, hashlib.md5(content).hexdigest()


def write_archive(path, images, labels, n_test):
    """Five training batches and a test batch in CIFAR-10's layout. Returns CIFAR10's attributes."""
    cuts = [*np.linspace(0, len(images) - n_test, 6).astype(int), len(images)]
    entries = []
    with tarfile.open(path, 'w:gz') as tar:
        for k, name in enumerate([*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']):
            part = slice(cuts[k], cuts[k + 1])
            batch = {'labels': labels[part].tolist(), 'data': images[part].reshape(-1, 3072)}
            entries.append(add(tar, name, batch))
        meta, md5 = add(tar, 'batches.meta', {'label_names': NAMES})
    return {
        'tgz_md5': hashlib.md5(path.read_bytes()).hexdigest(),
        'train_list': entries[:5],
        'test_list': entries[5:],
        'meta': {'filename': meta, 'key': 'label_names', 'md5': md5},
    }


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """A small archive: its path, its content as of `load_data`, CIFAR10's attributes for it."""
    path, rng = tmp_path_factory.mktemp('served') / ARCHIVE, np.random.default_rng(0)
    images = rng.integers(256, size=(24, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(10, size=24)
    attributes = write_archive(path, images, labels, n_test=4)
    content = {}
    for split, part in (('train', slice(20)), ('test', slice(20, None))):
        pixels = torch.from_numpy(images[part]).permute(0, 2, 3, 1)
        labels_of = torch.from_numpy(labels[part])
        content[split] = {'images': pixels, 'labels': labels_of, 'classes': NAMES}
    return SimpleNamespace(path=path, content=content, attributes=attributes)


@pytest.fixture
def server(cifar):
    """A local HTTP server of the archive: its url, the requests it got, its handler's class."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            self.server.requests.append(self.path)

    handler = functools.partial(Handler, directory=cifar.path.parent)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.requests, server.handler = [], Handler
        server.handle_error = lambda *args: None  # torchvision hangs up after the redirects
        server.url = f'http://127.0.0.1:{server.server_port}/{ARCHIVE}'
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def closed_port():
    with socket.socket() as port:
        port.bind(('127.0.0.1', 0))  # bound, but nobody listens
        yield f'http://127.0.0.1:{port.getsockname()[1]}/{ARCHIVE}'


@pytest.fixture
def patched(cifar, monkeypatch):
    """patched(url=..., ...): torchvision's CIFAR10 for the archive, other attributes on top."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    def patched(**attributes):
        for key, value in {**cifar.attributes, **attributes}.items():
            monkeypatch.setattr(torchvision.datasets.CIFAR10, key, value)

    return patched


def test_download_leaves_train_and_test_and_is_made_once(
    script, patched, server, cifar, tmp_path, capsys
):
    patched(url=server.url)
    folder = tmp_path / 'some' / 'where'
    assert_same(script.load_data(folder, 'cpu'), cifar.content)
    assert sorted(os.listdir(folder)) == ['test.pt', 'train.pt']
    assert 0 < len(server.requests) <= 2  # torchvision asks for redirects, then for the file
    assert str(folder.absolute()) in capsys.readouterr().out  # the full path, before 170 MB come
    server.requests.clear()
    assert_same(script.load_data(folder, 'cpu'), cifar.content)
    assert not server.requests


def test_missing_half_is_downloaded_and_the_other_kept(
    baseline, patched, server, cifar, data_dir, data, tmp_path
):
    patched(url=server.url)
    shutil.copy(data_dir / 'train.pt', tmp_path)
    expected = {'train': data['train'], 'test': cifar.content['test']}
    assert_same(baseline.load_data(tmp_path, 'cpu'), expected)


def test_archive_that_the_user_put_there_needs_no_network(
    baseline, patched, cifar, closed_port, tmp_path
):
    patched(url=closed_port)
    shutil.copy(cifar.path, tmp_path)
    assert_same(baseline.load_data(tmp_path, 'cpu'), cifar.content)
    assert {ARCHIVE, 'test.pt', 'train.pt'} <= {*os.listdir(tmp_path)}


def assert_download_failed(result, folder):
    """Status 2 and one line (after torchvision's progress) that says which files to put where."""
    *progress, line = result.err.splitlines()
    assert result.status == 2 and not [text for text in progress if 'Traceback' in text]
    for word in (folder, 'train.pt', 'test.pt', ARCHIVE, '--synthetic'):
        assert str(word) in line, line


@pytest.fixture
def download_fails(call, patched, server, data_dir, tmp_path):
    """download_fails(reply, **attributes): it ends in one line, and changes no file."""
    folder = tmp_path / 'data'
    folder.mkdir()
    shutil.copy(data_dir / 'train.pt', folder)
    before = content_of(folder)

    def download_fails(reply, **attributes):
        server.handler.do_GET = reply
        patched(url=server.url, **attributes)
        assert_download_failed(call('--data-dir', 'data', *NARROW_ARGS), folder)
        assert content_of(folder) == before

    return download_fails


def sending(content, claimed=None):
    def do_GET(self):  # noqa: N802 (the name that http.server calls)
        self.send_response(200)
        self.send_header('Content-Length', str(claimed or len(content)))
        self.end_headers()
        self.wfile.write(content)

    return do_GET


def redirect(self):
    self.send_response(302)
    self.send_header('Location', self.path)
    self.end_headers()


REPLIES = {
    'status 404': lambda self: self.send_error(404),
    'a redirect to itself': redirect,
    'nothing': lambda self: None,
    'garbage': lambda self: self.wfile.write(random.Random(0).randbytes(9999)),
}


@pytest.mark.parametrize('reply', REPLIES)
def test_server_without_the_archive(download_fails, reply):
    download_fails(REPLIES[reply])


def test_no_network(call, patched, closed_port, tmp_path):
    patched(url=closed_port)
    assert_download_failed(call('--data-dir', 'here', *NARROW_ARGS), tmp_path / 'here')
    assert os.listdir(tmp_path) == ['here'] and not os.listdir(tmp_path / 'here')


def test_archive_with_a_wrong_md5(download_fails, cifar):
    download_fails(sending(cifar.path.read_bytes()), tgz_md5='0' * 32)


@times(2, 20)
def test_download_cut_anywhere(n, download_fails, cifar):
    archive = cifar.path.read_bytes()
    for place in random.Random(0).sample(range(len(archive)), n):
        download_fails(sending(archive[:place], claimed=len(archive)))


CORRUPT = {
    'empty': lambda archive: b'',
    'half': lambda archive: archive[: len(archive) // 2],
    'no tar': gzip.compress,
    'no batches': lambda archive: gzip.compress(bytes(10240)),
}


@pytest.mark.parametrize('fault', CORRUPT)
def test_corrupt_archive(download_fails, cifar, fault):
    archive = CORRUPT[fault](cifar.path.read_bytes())
    md5 = hashlib.md5(archive).hexdigest()  # or it would not be opened
    download_fails(sending(archive), tgz_md5=md5)


def test_disk_that_the_download_fills(download_fails, cifar):
    with limited(resource.RLIMIT_FSIZE, 50_000):
        download_fails(sending(cifar.path.read_bytes()))


FULL = [(0, []), (300, []), (5_000, []), (40_000, []), (124_000, ['train.pt'])]


@pytest.mark.parametrize('size, made', FULL)
def test_full_disk_leaves_only_whole_files(size, made, call, patched, closed_port, tmp_path):
    """No file may grow over a size: that of nothing, a pickle, a batch, train.pt, test.pt."""
    here = tmp_path / 'here'
    here.mkdir()
    images, labels = np.zeros((60, 3, 32, 32), np.uint8), np.full(60, 3)
    patched(url=closed_port, **write_archive(here / ARCHIVE, images, labels, n_test=40))
    before = content_of(here)
    with limited(resource.RLIMIT_FSIZE, size):
        assert_download_failed(call('--data-dir', here, *NARROW_ARGS), here)
    left = content_of(here)
    assert {*left} == {ARCHIVE, *made} and left[ARCHIVE] == before[ARCHIVE]


def test_unwritable_folder(call, tmp_path):
    result = call('--data-dir', '/dev/null/x', *NARROW_ARGS)
    assert_refused(result)
    assert '/dev/null/x' in result.err and not os.listdir(tmp_path)


def test_ctrl_c_in_a_download_leaves_no_file(call, monkeypatch, tmp_path):
    class Interrupted(torchvision.datasets.CIFAR10):
        def __init__(self, *args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Interrupted)
    assert_refused(call('--data-dir', 'here', *NARROW_ARGS), 130)
    assert os.listdir(tmp_path) == ['here'] and not os.listdir(tmp_path / 'here')


# ---------------------------------------- Several processes ---------------------------------------
@contextlib.contextmanager
def started(folder, n, cifar, url):
    """n processes that begin to download from one server at once."""
    attributes = {'url': url, **cifar.attributes}
    code = f"""
import sys, zlib, torchvision
sys.path.insert(0, {str(ROOT)!r})
import airbench94_baseline as script
for pair in {attributes!r}.items():
    setattr(torchvision.datasets.CIFAR10, *pair)
print('ready', flush=True)
input()
data = script.load_data('here', 'cpu')
print(*(zlib.crc32(split[key].numpy().tobytes())
        for split in data.values() for key in ('images', 'labels')))
"""
    options = {'stdin': subprocess.PIPE, 'stderr': subprocess.PIPE}
    options['env'] = environment(no_proxy='127.0.0.1')
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(n):
            process = live(folder, [sys.executable, '-c', code], **options)
            processes.append(stack.enter_context(process))
        assert [process.stdout.readline() for process in processes] == ['ready\n'] * n
        for process in processes:
            process.stdin.write('\n')
            process.stdin.flush()
        yield processes


@times(2, 10)
def test_processes_on_an_empty_folder_all_end_well(n, cifar, server, tmp_path):
    tensors = [split[key] for split in cifar.content.values() for key in ('images', 'labels')]
    expected = ' '.join(str(zlib.crc32(x.numpy().tobytes())) for x in tensors)
    with started(tmp_path, n, cifar, server.url) as processes:
        for process in processes:
            out, err = process.communicate()
            assert process.returncode == 0 and out.splitlines()[-1] == expected, err
    assert sorted(os.listdir(tmp_path / 'here')) == ['test.pt', 'train.pt']


def test_killed_download_leaves_no_half_file_and_the_next_succeeds(
    baseline, cifar, patched, server, tmp_path
):
    here, hanging = tmp_path / 'here', threading.Event()

    def hang(self, source, output):
        output.write(source.read(50_000))
        hanging.wait(600)

    server.handler.copyfile = hang
    with started(tmp_path, 1, cifar, server.url) as [process]:
        while not any(path.stat().st_size for path in here.rglob('*.gz*')):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
    hanging.set()
    del server.handler.copyfile
    assert [name.split('-')[0] for name in os.listdir(here)] == ['.download']
    patched(url=server.url)
    assert_same(baseline.load_data(here, 'cpu'), cifar.content)


# ---------------------------------------- Synthetic images ----------------------------------------
def test_synthetic_data_has_the_form_of_cifar_and_is_always_the_same(baseline, modified):
    state = torch.get_rng_state()
    data = baseline.synthetic_data('cpu', train=300, test=50)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(modified.synthetic_data('cpu', train=300, test=50), data)
    for split, n in (('train', 300), ('test', 50)):
        images, labels = data[split]['images'], data[split]['labels']
        assert images.dtype == torch.uint8 and images.shape == (n, 32, 32, 3)
        assert labels.dtype == torch.int64 and {*labels.tolist()} == {*range(10)}
        assert len(data[split]['classes']) == 10
