"""A script pasted into one cell of a real Jupyter kernel, and the cells that a user runs after it."""
import asyncio
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT, SCRIPTS, environment

SMALLER = {  # patterns in the source -> what makes a run of a second of them
    r"('train_epochs'): [\d.]+": r'\1: 2.0', r"('batch_size'): \d+": r'\1: 64',
    r"('block[123]'): \d+": r'\1: 8'}
FINISHED_RUN = re.compile(r'^ +1 +1 +2 .*%.*%.*%', re.M)  # the row that ends run 1 of trial 1
AVERAGE = re.compile(r'^Average +(\d+) .*%', re.M)  # the table's last row: of how many runs


class Client(NotebookClient):
    """Interrupts the kernel when a cell's output matches `interrupt`."""
    interrupt = None

    def process_message(self, msg, cell, cell_index):
        super().process_message(msg, cell, cell_index)
        if self.interrupt and self.interrupt.search(text_of(cell)):
            self.interrupt = None
            asyncio.ensure_future(self.km.interrupt_kernel())


def text_of(cell, name='stdout'):
    return ''.join(output.text for output in cell.outputs
                   if output.output_type == 'stream' and output.name == name)


def pasted(name):
    """A script's source with smaller defaults: five runs of seconds in place of hours."""
    source = (ROOT / f'{name}.py').read_text()
    head, mark, rest = source.partition('RECIPES')
    for pattern, smaller in SMALLER.items():
        head, count = re.subn(pattern, smaller, head)
        assert count == (3 if 'block' in pattern else 1), pattern
    return head + mark + rest


@pytest.fixture(scope='module', params=SCRIPTS)
def notebook(request, data_dir, tmp_path_factory):
    """run(source, interrupt=None): runs a cell; gives out, err, errors, result. folder: the kernel's."""
    jupyter, folder = tmp_path_factory.mktemp('jupyter'), tmp_path_factory.mktemp('notebook')
    spec = {'argv': [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
            'display_name': 'this Python', 'language': 'python'}
    (jupyter / 'kernels' / 'this').mkdir(parents=True)
    (jupyter / 'kernels' / 'this' / 'kernel.json').write_text(json.dumps(spec))
    shutil.copytree(data_dir, folder / 'cifar10')
    book = nbformat.v4.new_notebook()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JUPYTER_PATH', str(jupyter))
        client = Client(book, timeout=120, kernel_name='this', allow_errors=True, store_widget_state=False)
        with client.setup_kernel(cwd=str(folder), env=environment(IPYTHONDIR=str(jupyter))):
            def run(source, interrupt=None):
                cell = nbformat.v4.new_code_cell(source)
                book.cells.append(cell)
                client.interrupt = interrupt
                client.execute_cell(cell, len(book.cells) - 1)
                return SimpleNamespace(
                    out=text_of(cell), err=text_of(cell, 'stderr'),
                    errors=[output.evalue for output in cell.outputs if output.output_type == 'error'],
                    result=''.join(output.data['text/plain'] for output in cell.outputs
                                   if output.output_type == 'execute_result'))
            source = pasted(request.param)
            yield SimpleNamespace(run=run, folder=folder, source=source, first=run(source))


def test_pasted_cell_runs_the_defaults(notebook):
    first = notebook.first
    assert not first.errors and not first.err
    assert FINISHED_RUN.search(first.out)
    assert AVERAGE.findall(first.out) == ['5'] and re.search(r'^Log: logs/', first.out, re.M)


def test_kernel_had_arguments_of_its_own(notebook):
    assert 'True' in notebook.run('import sys; len(sys.argv) > 1 and "__file__" not in globals()').result


def test_logged_code_is_the_pasted_cell(notebook):
    first_log = re.search(r'^Log: (.*)$', notebook.first.out, re.M)[1]
    assert (Path(notebook.folder) / first_log / 'code.py').read_text() == notebook.source


def test_overrides_of_a_later_cell_are_undone(notebook):
    default = notebook.run("before = json.dumps(hyp); hyp['opt']['lr']").result
    later = notebook.run("runs = main(['--trials', '1', '--hyp', 'opt.lr=10']); len(runs)")
    assert not later.errors and later.result == '1' and AVERAGE.findall(later.out) == ['1']
    log = notebook.folder / re.search(r'^Log: (.*)$', later.out, re.M)[1]
    arm, = json.loads((log / 'experiment.json').read_text())['arms']
    assert arm['hyp']['opt.lr'] == 10
    assert notebook.run("hyp['opt']['lr']").result == default != '10.0'
    assert notebook.run('json.dumps(hyp) == before').result == 'True'


def test_main_runs_the_defaults_again(notebook):
    again = notebook.run('len(main())')
    assert not again.errors and again.result == '5' and AVERAGE.findall(again.out) == ['5']


def test_error_is_one_line_and_raises_nothing(notebook):
    wrong = notebook.run("main(['--hyp', 'opt.lr=x']);")
    assert not wrong.errors and (wrong.out + wrong.err).count('\n') == 1
    assert 'opt.lr=x' in wrong.out + wrong.err


def test_help_raises_nothing(notebook):
    shown = notebook.run("main(['--help']);")
    assert not shown.errors and not shown.err and '--trials' in shown.out


def test_trained_network_can_be_used(notebook):
    used = notebook.run("""
data = load_data('cifar10', 'cpu')
record, net = train(data, seed=0, device='cpu')
record['tta_acc'] == evaluate(net, CifarLoader('cifar10', train=False, device='cpu'), tta_level=2)""")
    assert not used.errors and used.result == 'True'


def test_interrupt_prints_the_table_and_one_line_and_the_kernel_lives(notebook):
    stopped = notebook.run("runs = main(['--trials', '1000'])", interrupt=FINISHED_RUN)
    assert not stopped.errors
    assert stopped.err.count('\n') == 1 and 'stopped' in stopped.err
    n = notebook.run('len(runs)').result
    assert AVERAGE.findall(stopped.out) == [n] and 'Log: ' in stopped.out
    assert 0 < int(n) < 1000
