"""A script pasted into one cell of a real Jupyter kernel, and a user's cells after it."""

import asyncio
import re
import shutil
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT, environment, runs_in_table
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

SMALLER = """hyp['opt'] |= {'batch_size': 64, 'train_epochs': 2.0}
hyp['net']['widths'] = dict.fromkeys(hyp['net']['widths'], 8)


"""
FINISHED_RUN = re.compile(r'\n +1 +1 +2 .*%.*%.*%')  # the row that ends run 1 of trial 1


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


def text_of(cell, stream='stdout'):
    return ''.join(output.text for output in cell.outputs if output.get('name') == stream)


@pytest.fixture(scope='module')
def notebook(data_dir, tmp_path_factory):
    """A kernel in which a script was the first cell, made smaller: five runs of a second.
    run(source, interrupt=None): runs a cell; its out, err, errors and result (as text)."""
    settings, folder = tmp_path_factory.mktemp('ipython'), tmp_path_factory.mktemp('notebook')
    shutil.copytree(data_dir, folder / 'cifar10')
    book = nbformat.v4.new_notebook()
    this_python = KernelSpecManager(kernel_dirs=[])  # and no kernel that a user has registered
    kernel = AsyncKernelManager(kernel_spec_manager=this_python)
    client = Client(book, kernel, store_widget_state=False, timeout=None, allow_errors=True)

    def run(source, interrupt=None):
        cell = nbformat.v4.new_code_cell(source)
        book.cells.append(cell)
        client.interrupt = interrupt
        client.execute_cell(cell, len(book.cells) - 1)
        errors = [output for output in cell.outputs if output.output_type == 'error']
        result = ''.join(output.data['text/plain'] for output in cell.outputs if 'data' in output)
        out, err = text_of(cell), text_of(cell, 'stderr')
        return SimpleNamespace(out=out, err=err, errors=errors, result=result)

    body, mark, end = (ROOT / 'airbench94_modified.py').read_text().partition('if __name__')
    source = body + SMALLER + mark + end
    env = environment(IPYTHONDIR=str(settings))
    with client.setup_kernel(cleanup_kc=True, cwd=str(folder), env=env):
        yield SimpleNamespace(run=run, folder=folder, source=source, first=run(source))


def code_of(notebook, out):
    return (notebook.folder / re.search(r'^Log: (.*)$', out, re.M)[1] / 'code.py').read_text()


def test_pasted_cell_makes_five_runs_and_logs_itself(notebook):
    first = notebook.first
    assert not first.errors and not first.err and first.out.startswith('airbench94_modified')
    assert FINISHED_RUN.search(first.out) and runs_in_table(first.out) == 5
    assert code_of(notebook, first.out) == notebook.source.rstrip()  # as IPython keeps it


def test_later_cells_are_in_the_log_and_in_the_training(notebook):
    """A convolution is redefined, then main is called: code.py holds every cell that ran."""
    edit = 'class Conv(Conv):\n    pass'
    call = "main(['--trials', '1', '--seed', '1', '--hyp', 'opt.lr=10'])"
    assert not notebook.run(edit).errors
    later = notebook.run(call)
    assert not later.errors and runs_in_table(later.out) == 1
    code = code_of(notebook, later.out)
    cells = [code.index(cell) for cell in (notebook.source.rstrip(), edit, call)]
    assert cells == sorted(cells)
    compile(code, 'code.py', 'exec')
    assert '\n' not in later.result and len(later.result) < 80  # no dump of all records
    assert notebook.run("hyp['opt']['lr']").result != '10.0'


def test_main_raises_nothing_on_an_error_or_for_help(notebook):
    wrong, shown = notebook.run("main(['--hyp', 'opt.lr=x']);"), notebook.run("main(['--help']);")
    assert not wrong.errors and not wrong.out
    assert wrong.err.count('\n') == 1 and 'opt.lr=x' in wrong.err
    assert not shown.errors and not shown.err and '--trials' in shown.out


def test_interrupt_prints_the_table_and_one_line_and_the_kernel_lives(notebook):
    stopped = notebook.run("runs = main(['--trials', '1000'])", interrupt=FINISHED_RUN)
    assert not stopped.errors
    assert stopped.err.count('\n') == 1 and 'stopped' in stopped.err
    n = int(notebook.run('len(runs)').result)
    assert 0 < n < 1000 and runs_in_table(stopped.out) == n and 'Log: ' in stopped.out


def test_interrupted_training_leaves_the_kernel_alive(notebook):
    source = """
def on_epoch(row):
    if row['epoch'] == 3:
        print('begun', flush=True)

data, endless = load_data('cifar10', 'cpu'), changed_hyp(['opt.train_epochs=1e7'])
train(data, 1, endless, quiet=True, on_epoch=on_epoch)"""
    (error,) = notebook.run(source, interrupt=re.compile('begun')).errors
    assert error.ename == 'KeyboardInterrupt'
    assert notebook.run('1 + 1').result == '2'
