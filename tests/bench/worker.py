"""The process of an arm. No other process runs code of its script.

So nothing that a script changes in its process (patched functions, settings of torch, environment
variables) reaches another arm. The process is started once; it loads its script and the data,
counts, warms up, and trains when it is told to. It ends when the one that started it has ended.
"""

import codecs
import contextlib
import dataclasses
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the package bench is

from bench import contract, records
from bench.errors import ScriptError, UserError, describe, one_line

POLL_SECONDS = 0.2
# Variables of torchrun: a script that finds them would believe that torchrun started it.
OF_TORCHRUN = {'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK'}
OF_TORCHRUN |= {'GROUP_WORLD_SIZE', 'ROLE_RANK', 'ROLE_NAME', 'ROLE_WORLD_SIZE'}
OF_TORCHRUN |= {'MASTER_ADDR', 'MASTER_PORT'}


def dumps(value: object) -> bytes:
    return json.dumps(value, default=records.plain_number).encode()


# ---------------------------------------- From outside ----------------------------------------


class Worker:
    """The process of an arm, as the one that started it sees it."""

    def __init__(self, path: str, data_file: int):
        """Start the process, which begins to load the script; `answer` returns its facts.

        data_file: descriptor of the file that `data` writes and reads.
        """
        if os.name == 'nt':
            raise UserError('run and speed need Linux or macOS; on Windows use WSL')
        self.label = ''  # the arm's name, in front of what is wrong with it
        self.connection, theirs = Pipe()
        files = (theirs.fileno(), data_file)
        environment = {}
        for name, value in os.environ.items():
            if name not in OF_TORCHRUN and not name.startswith('TORCHELASTIC_'):
                environment[name] = value
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, files)],
            pass_fds=files,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C is for the one that started it
        )
        theirs.close()
        self.send('load', path)

    def send(self, command: str, *arguments):
        with contextlib.suppress(OSError):  # it has ended, as `answer` will find
            self.connection.send_bytes(dumps([command, arguments]))

    def answer(self, on_epoch: Callable = None, meanwhile: Callable = None) -> object:
        """Return what the last command gave.

        on_epoch(row) is called after each epoch, while the process waits; meanwhile() several times
        a second. Raises UserError for what the script says to its user, ScriptError for its bugs.
        """
        while True:
            kind, value = self.receive(meanwhile)
            if kind == 'done':
                return value
            if kind == 'print':
                self.print(*value)
            elif kind == 'epoch':
                if on_epoch is not None:
                    on_epoch(value)
                self.send('go on')
            elif kind == 'refused':
                raise UserError(self.labelled(value))
            else:
                message, details = value
                raise ScriptError(self.labelled(message), details)

    def call(self, command: str, *arguments, **callbacks) -> object:
        """Send a command and return its answer."""
        self.send(command, *arguments)
        return self.answer(**callbacks)

    def receive(self, meanwhile: Callable | None) -> list:
        """Return the next message. Raises UserError where the process has ended."""
        while True:
            try:
                if self.connection.poll(POLL_SECONDS):
                    return json.loads(self.connection.recv_bytes())
                if self.process.poll() is not None:
                    raise EOFError
            except (EOFError, ConnectionError):
                raise UserError(self.labelled(self.how_it_ended())) from None
            if meanwhile is not None:
                meanwhile()

    def how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        status = self.process.returncode
        if status is None or status >= 0:
            return f'its process ended (status {status})'
        name = signal.Signals(-status).name
        hint = ', as when memory runs out' if name == 'SIGKILL' else ''
        return f'its process was killed ({name}{hint})'

    def labelled(self, message: str) -> str:
        return f'{self.label}: {message}' if self.label else message

    def print(self, stream: str, text: str):
        """Print what the script printed: here, as a table may stand in the terminal."""
        file = getattr(sys, stream)
        file.write(text)
        file.flush()

    def close(self):
        """End the process, and those that it started."""
        if self.connection.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


# ---------------------------------------- Inside ----------------------------------------


def pick_device(name: str, local_rank: int = 0):
    """Return a device: 'auto' and 'cuda' are the GPU of this process of torchrun.

    Returns a torch.device, or the text 'cpu' where the script has not imported torch.
    """
    torch = sys.modules.get('torch')
    if torch is None:
        if name not in ('auto', 'cpu'):
            raise UserError(f'--device {name}: the script does not import torch')
        return contract.cpu()
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name == 'cuda':
        name = f'cuda:{local_rank}'
    count = torch.cuda.device_count()
    if name not in ('cpu', *(f'cuda:{i}' for i in range(count))):
        raise UserError(f'--device {name}: torch finds {count} CUDA devices and cpu')
    return torch.device(name)


class Forward(io.RawIOBase):
    """The bytes of a script's standard output or error: sends what is written."""

    def __init__(self, name: str, send: Callable):
        self.name = name
        self.send = send
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # keeps half a character

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast('B')
        text = self.decoder.decode(view)
        if text:
            self.send('print', [self.name, text])
        return view.nbytes

    def fileno(self) -> int:
        return {'stdout': 1, 'stderr': 2}[self.name]


class ArmProcess:
    """The state of an arm's process; its public methods are the commands."""

    def __init__(self, connection: Connection, data_file: int):
        self.connection = connection
        self.data_file = data_file
        self.lock = threading.Lock()  # a script may print in several threads
        self.commands = queue.SimpleQueue()
        self.compiled: dict = {}  # compiled network and its step, as arguments of train
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self):
        """Take commands, also while the script works: the end of the other process is the end."""
        while True:
            try:
                command = json.loads(self.connection.recv_bytes())
            except (EOFError, OSError):
                os.killpg(0, signal.SIGKILL)  # with all processes that the script started
            self.commands.put(command)

    def _send(self, kind: str, value: object):
        message = dumps([kind, value])
        with self.lock:
            self.connection.send_bytes(message)

    def _serve(self):
        while True:
            command, arguments = self.commands.get()
            self._send(*self._execute(command, arguments))

    def _execute(self, command: str, arguments: list) -> tuple[str, object]:
        """Return the answer to a command."""
        user_errors = UserError
        path = ''
        if command != 'load':
            user_errors = self.script.user_errors
            path = self.script.path
        try:
            value = getattr(self, command)(*arguments)
            dumps(value)
            return 'done', value
        except user_errors as error:
            return 'refused', one_line(error)
        except (Exception, SystemExit) as error:
            message = one_line(describe(error, path))
            if command == 'prepare' and arguments[1]:
                text = ''.join(traceback.format_exception_only(error))
                message = f'with compile=true it failed:\n{text.rstrip()}'
            return 'failed', [message, traceback.format_exc()]
        finally:
            for stream in (sys.stdout, sys.stderr):  # a script may have put others there,
                with contextlib.suppress(AttributeError, ValueError):  # none, or closed ones
                    stream.flush()

    def load(self, path: str) -> dict:
        """Load a script. Returns contract.Facts as a dict."""
        sys.argv = [path]
        self.script = contract.load_script(path)
        return dataclasses.asdict(self.script.facts())

    def check(self, hyp: dict, device: str, local_rank: int):
        """Check hyperparameters and device, before any work."""
        self.script.check_hyp(hyp)
        pick_device(device, local_rank)

    def make_data(self, data_dir: str | None, holdout: int | None) -> dict:
        """Load the data, or make them up, and write them for all. Returns facts and layout."""
        from bench import data  # here, as numpy takes longer to import than a small script to run

        loaded = self.script.load_data(data_dir)
        name = 'synthetic' if data_dir is None else data_dir
        extra = {}
        if holdout:
            loaded = data.hold_out(loaded, holdout)
            extra['holdout'] = holdout
        facts = {**data.describe(loaded, name), **extra}
        return {'facts': facts, 'layout': data.write(self.data_file, loaded)}

    def open_data(self, layout: dict, device: str, local_rank: int):
        """Take the data that a process has written, to a device."""
        from bench import data

        self.device = pick_device(device, local_rank)
        self.layout = layout
        self.data = data.read(self.data_file, layout, self.device)
        if self._on_gpu():
            sys.modules['torch'].cuda.set_device(self.device)

    def count_flop(self, hyp: dict) -> dict:
        """Return {'flop': FLOP of a run}, or {'reason': why they cannot be counted}."""
        if 'torch' not in sys.modules:
            return {'reason': 'the script does not import torch'}
        from bench import cost, data

        on_cpu = data.read(self.data_file, self.layout, 'cpu')
        try:
            return {'flop': cost.run_flop(self.script, hyp, on_cpu)}
        except UserError as error:
            return {'reason': str(error)}
        except (Exception, SystemExit) as error:  # a script may not train on so few images
            return {'reason': one_line(describe(error, self.script.path))}

    def prepare(self, hyp: dict, compiled: bool) -> float:
        """Compile and warm up. Returns the seconds."""
        start = time.perf_counter()
        self.hyp = hyp
        if compiled:
            classes = len(self.data['train']['classes'])
            self.compiled = self.script.compile(hyp, self.device, classes)
        self.script.warm_up(self.data, hyp, self.device, self.compiled)
        return time.perf_counter() - start

    def train(self, seed: int, quiet: bool) -> dict:
        """Make a run. Returns its record."""
        if self._on_gpu():  # the peak is that of the run, not of the process
            sys.modules['torch'].cuda.reset_peak_memory_stats(self.device)

        def on_epoch(row: dict):
            self._send('epoch', row)
            self.commands.get()  # nothing is drawn while a run's time is measured

        start = time.perf_counter()
        record = self.script.train(
            self.data,
            seed,
            self.hyp,
            self.device,
            quiet=quiet,
            on_epoch=on_epoch,
            **self.compiled,
        )
        seconds = time.perf_counter() - start
        return {**self._machine(), 'wall_seconds': seconds, **record}

    def speed(self, *arguments) -> dict:
        """Measure the parts of the script."""
        from bench import speed

        return speed.measure(self.script, *arguments)

    def _on_gpu(self) -> bool:
        return getattr(self.device, 'type', 'cpu') == 'cuda'

    def _machine(self) -> dict:
        """Return what the log says of the machine where the script does not."""
        torch = sys.modules.get('torch')
        if torch is None:
            return {'device': 'cpu', 'torch': None}
        name = f'cpu, threads: {torch.get_num_threads()}'
        if self._on_gpu():
            name = torch.cuda.get_device_name(self.device)
        return {'device': name, 'torch': str(torch.__version__)}


def main():
    connection, data_file = map(int, sys.argv[1:])
    arm = ArmProcess(Connection(connection), data_file)
    for name in ('stdout', 'stderr'):
        stream = io.TextIOWrapper(
            Forward(name, arm._send),
            encoding='utf-8',
            errors='backslashreplace',
            write_through=True,
        )
        setattr(sys, name, stream)
        setattr(sys, f'__{name}__', stream)  # it lives on where a script replaces the other
    arm._serve()


if __name__ == '__main__':
    main()
