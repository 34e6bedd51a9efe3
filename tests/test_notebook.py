"""The scripts pasted into cells of a real Jupyter kernel, and a user's cells after them."""

import asyncio
import re
import shutil
from types import SimpleNamespace

import nbformat
import pytest
from conftest import FILES, SCRIPTS, environment, runs_in_table
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

# The kernel's arguments and a cell's __file__ as in VS Code's interactive window.
VS_CODE = f"""import sys
sys.path[:0] = {[str(path.parent) for path in FILES.values()]!r}
sys.argv[1:] = ['--f=/run/kernel.json']
__file__ = '/home/user/cell.py'
"""
SMALLER = """hyp['opt']['batch_size'] = 64
hyp['opt']['train_epochs'] = 1.0
hyp['net']['widths'] = dict.fromkeys(hyp['net']['widths'], 8)


"""
FINISHED_RUN = re.compile(r'\n +1 +1 +end .*%.*%.*%')  # the row that ends run 1 of trial 1


class Client(NotebookClient):
    """Interrupt the kernel when a cell's output matches `interrupt`."""

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
    """Start a kernel. Returns its folder and run(source, interrupt=None).

    run gives a cell's out, err, errors and result (as text).
    """
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

    env = environment(IPYTHONDIR=str(settings))
    with client.setup_kernel(cleanup_kc=True, cwd=str(folder), env=env):
        run(VS_CODE)
        yield SimpleNamespace(run=run, folder=folder)


def pasted(name):
    """Return the source of a script, made smaller."""
    body, mark, end = FILES[name].read_text().partition('if __name__')
    return body + SMALLER + mark + end


def code_of(notebook, out):
    return (notebook.folder / re.search(r'^Log: (.*)$', out, re.M)[1] / 'code.py').read_text()


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_pasted_script_makes_five_runs_and_the_next_cell_one(name, notebook):
    """code.py has every cell that ran."""
    source = pasted(name)
    first = notebook.run(source)
    assert not first.errors and not first.err and first.out.startswith(f'{name} on ')
    assert FINISHED_RUN.search(first.out) and runs_in_table(first.out) == 5
    call = "runs = main(['--trials', '1', '--quiet', '--hyp', 'opt.lr=7'])"
    later = notebook.run(call)
    assert not later.errors and runs_in_table(later.out) == 1
    code = code_of(notebook, later.out)
    assert code.endswith(f'{source.rstrip()}\n\n# %%\n{call}')  # as IPython keeps it
    compile(code, 'code.py', 'exec')
    assert notebook.run("hyp['opt']['lr'] == 7, len(runs)").result == '(False, 1)'


def test_a_script_that_is_imported_runs_and_logs_its_own_source(notebook):
    call = "import airbench94_modified as script\nruns = script.main('--trials 1 --quiet"
    widths = ' '.join(f'net.widths.block{i}=8' for i in (1, 2, 3))
    cell = notebook.run(f"{call} --hyp opt.batch_size=64 opt.train_epochs=1 {widths}')")
    assert not cell.errors and runs_in_table(cell.out) == 1
    assert code_of(notebook, cell.out) == FILES['airbench94_modified'].read_text()


def test_main_raises_nothing_on_a_mistake(notebook):
    wrong = notebook.run("main(['--hyp', 'opt.lr=x']);")
    assert not wrong.errors and not wrong.out
    assert wrong.err.count('\n') == 1 and 'opt.lr=x' in wrong.err


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

data = load_data('cifar10', 'cpu')
endless = changed_hyp(['opt.train_epochs=1e6'])
train(data, 1, endless, quiet=True, on_epoch=on_epoch)"""
    (error,) = notebook.run(source, interrupt=re.compile('begun')).errors
    assert error.ename == 'KeyboardInterrupt'
    assert notebook.run('1 + 1').result == '2'
