"""Errors for the user, and the signals that stop the tool."""

import contextlib
import signal
import traceback

STOPPING = (signal.SIGINT, signal.SIGTERM)


class UserError(Exception):
    """An error that the user can fix, or should know of; printed without a traceback."""


class ScriptError(UserError):
    """A script failed in its own code; `details` is the traceback."""

    def __init__(self, message: str, details: str):
        super().__init__(message)
        self.details = details


def one_line(text: object) -> str:
    """Return the text without line breaks and control characters."""
    printable = (char if char.isprintable() else ' ' for char in str(text))
    return ' '.join(''.join(printable).split())


def describe(error: BaseException, path: str) -> str:
    """Return an exception's type and message, and the line of the script where it arose."""
    place = ''
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            place = f' (line {frame.lineno})'
    return f'{type(error).__name__}: {error}{place}'


def ignore_signals():
    """Let nothing interrupt what comes now, such as the report."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stopping_signals():
    """Let SIGTERM interrupt as Ctrl-C does. After the first signal further ones are ignored.

    The KeyboardInterrupt has the number of the signal as its argument.
    """

    def stop(number, _):
        ignore_signals()
        raise KeyboardInterrupt(number)

    previous = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
