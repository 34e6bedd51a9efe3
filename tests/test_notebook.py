"""A script pasted into one cell of a real Jupyter kernel, and a user's cells after it."""

import asyncio
import json
import re
import shutil
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT, environment
from nbclient import NotebookClient

SMALLER = {  # patterns in the source -> what makes a run of a second of them
    r"('train_epochs'): [\d.]+": r'\1: 2.0',
    r"('batch_size'): \d+": r'\1: 64',
    r"('block[123]'): \d+": r'\1: 8',
}
FINISHED_RUN = re.compile(r'^[\r ]+1 +1 +2 .*%.*%.*%', re.M)  # the row that ends run 1 of trial 1
LAST_ROW = re.compile(r'^(?:Average|1) .*% .* \d+/(\d+) +\d+/\d+$', re.M)  # of how many runs


class Client(NotebookClient):
    """Interrupts the kernel when a cell's output matches `interrupt`."""

    interrupt = None

    def process_message(self, msg, cell, cell_index):
        super().process_message(msg, cell, cell_index)
        if self.interrupt and self.interrupt.search(text_of(cell)):
            self.interrupt = None
            asyncio.ensure_future(self.interrupt_soon())

    async def interrupt_soon(self):
        # Not while the kernel waits for its own output to be sent: there an interrupt can end in
        # 'RuntimeError: release unlocked lock' (threading.Condition, which is CPython's).
        await asyncio.sleep(0.2)
        await self.km.interrupt_kernel()


def text_of(cell, name='stdout'):
    outputs = [output for output in cell.outputs if output.output_type == 'stream']
    return ''.join(output.text for output in outputs if output.name == name)


def result_of(cell):
    outputs = [output for output in cell.outputs if output.output_type == 'execute_result']
    return ''.join(output.data['text/plain'] for output in outputs)


def pasted(name):
    """A script's source with smaller defaults: five runs of a second in place of hours."""
    head, mark, rest = (ROOT / f'{name}.py').read_text().partition('RECIPES')
    for pattern, smaller in SMALLER.items():
        head, count = re.subn(pattern, smaller, head)
        assert count == (3 if 'block' in pattern else 1), pattern
    return head + mark + rest


@pytest.fixture(scope='module')
def notebook(data_dir, tmp_path_factory):
    """run(source, interrupt=None): runs a cell; its out, err, errors, result. And the folder."""
    jupyter, folder = tmp_path_factory.mktemp('jupyter'), tmp_path_factory.mktemp('notebook')
    words = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    spec = {'argv': words, 'display_name': 'this Python', 'language': 'python'}
    (jupyter / 'kernels' / 'this').mkdir(parents=True)
    (jupyter / 'kernels' / 'this' / 'kernel.json').write_text(json.dumps(spec))
    shutil.copytree(data_dir, folder / 'cifar10')
    book = nbformat.v4.new_notebook()
    options = {'timeout': None, 'kernel_name': 'this', 'allow_errors': True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JUPYTER_PATH', str(jupyter))
        client = Client(book, store_widget_state=False, **options)
        with client.setup_kernel(cwd=str(folder), env=environment(IPYTHONDIR=str(jupyter))):

            def run(source, interrupt=None):
                cell = nbformat.v4.new_code_cell(source)
                book.cells.append(cell)
                client.interrupt = interrupt
                client.execute_cell(cell, len(book.cells) - 1)
                errors = [output for output in cell.outputs if output.output_type == 'error']
                return SimpleNamespace(
                    out=text_of(cell),
                    err=text_of(cell, 'stderr'),
                    errors=errors,
                    result=result_of(cell),
                )

            source = pasted('airbench94_modified')
            first = run(source)
            yield SimpleNamespace(run=run, folder=folder, source=source, first=first)


def code_of(notebook, out):
    return (notebook.folder / re.search(r'^Log: (.*)$', out, re.M)[1] / 'code.py').read_text()


def test_pasted_cell_makes_five_runs_and_logs_itself(notebook):
    first = notebook.first
    assert not first.errors and not first.err and first.out.startswith('airbench94_modified')
    assert FINISHED_RUN.search(first.out) and LAST_ROW.findall(first.out)[-1] == '5'
    assert code_of(notebook, first.out) == notebook.source.rstrip()  # as IPython keeps it


def test_later_cells_are_in_the_log_and_in_the_training(notebook):
    """A convolution is redefined, then main is called: code.py holds every cell that ran."""
    edit = 'class Conv(Conv):\n    pass'
    call = "main(['--trials', '1', '--seed', '1', '--hyp', 'opt.lr=10'])"
    assert not notebook.run(edit).errors
    later = notebook.run(call)
    assert not later.errors and LAST_ROW.findall(later.out) == ['1']
    code = code_of(notebook, later.out)
    cells = [code.index(cell) for cell in (notebook.source.rstrip(), edit, call)]
    assert cells == sorted(cells)
    compile(code, 'code.py', 'exec')
    assert '\n' not in later.result and len(later.result) < 80  # no dump of all records
    assert notebook.run("hyp['opt']['lr']").result != '10.0'


def test_error_is_one_line_and_raises_nothing(notebook):
    wrong = notebook.run("main(['--hyp', 'opt.lr=x']);")
    assert not wrong.errors and not wrong.out
    assert wrong.err.count('\n') == 1 and 'opt.lr=x' in wrong.err


def test_help_raises_nothing(notebook):
    shown = notebook.run("main(['--help']);")
    assert not shown.errors and not shown.err and '--trials' in shown.out


def test_missing_data_shows_one_line(notebook):
    """As the last line of a cell, where a file in the way makes the download fail."""
    (notebook.folder / 'file').touch()
    (error,) = notebook.run("load_data('file/cifar10', 'cpu')").errors
    assert error.ename == 'UserError'
    assert len(error.traceback) == 1 and '\n' not in error.traceback[0]


def test_trained_network_can_be_used(notebook):
    used = notebook.run(
        """
data = load_data('cifar10', 'cpu')
record, net = train(data, seed=0, device='cpu')
record['tta_acc'] == evaluate(net, CifarLoader('cifar10', train=False, device='cpu'), tta_level=2)
"""
    )
    assert not used.errors and used.result == 'True'


def test_interrupt_prints_the_table_and_one_line_and_the_kernel_lives(notebook):
    handler = 'import signal; signal.getsignal(signal.SIGINT)'
    before = notebook.run(handler).result
    stopped = notebook.run("runs = main(['--trials', '1000'])", interrupt=FINISHED_RUN)
    assert not stopped.errors
    assert stopped.err.count('\n') == 1 and 'stopped' in stopped.err
    n = notebook.run('len(runs)').result
    assert 0 < int(n) < 1000 and LAST_ROW.findall(stopped.out)[-1] == n and 'Log: ' in stopped.out
    assert notebook.run(handler).result == before


def test_interrupted_training_shows_few_frames(notebook):
    source = """
def on_step(step, total):
    if step == 10:
        print('begun', flush=True)

train(data, 1, changed_hyp(['opt.train_epochs=1e7']), quiet=True, on_step=on_step)"""
    (error,) = notebook.run(source, interrupt=re.compile('begun')).errors
    assert error.ename == 'KeyboardInterrupt' and len(error.traceback) < 7
    assert notebook.run('1 + 1').result == '2'
