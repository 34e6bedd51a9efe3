"""What ends the tool early: errors that the user can mend, and signals."""

import contextlib
import signal
import traceback


class UserError(Exception):
    """A message of one line for the user. `status` is 2 before the first run, 1 later."""

    status = 2


class ScriptError(UserError):
    """A script failed in its own code; `details` is the traceback."""

    details = ''


def one_line(text: object) -> str:
    """The text without line breaks and control characters."""
    printable = (char if char.isprintable() else ' ' for char in str(text))
    return ' '.join(''.join(printable).split())


def describe(error: BaseException, path: str) -> str:
    """The type and message of an exception, with the line of the script where it arose."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
    ]
    place = f' (line {frames[-1].lineno})' if frames else ''
    return f'{type(error).__name__}: {one_line(error)}{place}'


@contextlib.contextmanager
def stopping_signals():
    """Within it SIGTERM interrupts as Ctrl-C does; after the first signal more are ignored.

    Yields a list that gets the number of the signal: a script may replace the exception by its own.
    """
    received, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def stop(number, _):
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
