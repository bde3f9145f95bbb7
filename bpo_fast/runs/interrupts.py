"""Signals that ask a run to end: SIGTERM, as job schedulers send it before they kill, ends one as Ctrl-C does."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end.

    Attributes:
        signum: which one.
        where: where the run goes on, if it says so.
        status: what a shell expects as exit status.

    Example:

    >>> Interrupted(signal.SIGTERM).status
    143
    """

    def __init__(self, signum: int, where: str | None = None):
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.where = where
        self.status = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM raise `Interrupted` where it is.

    An exception out of a signal handler can be lost, in a destructor for one, or come out of an import as another
    error: the block still ends with `Interrupted`, at its end at the latest. The handlers that were there come back
    afterwards. Outside the main thread, which alone receives signals, the block runs as it is.

    Raises:
        Interrupted: one of the signals came.

    Example:

    >>> import os
    >>> try:
    ...     with interruptible():
    ...         os.kill(os.getpid(), signal.SIGTERM)
    ... except KeyboardInterrupt as stop:
    ...     print(stop, stop.status)
    interrupted by SIGTERM 143
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []

    def handle(signum, frame):
        received.append(signum)
        raise Interrupted(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        if received:
            raise Interrupted(received[0]) from error
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if received:
        raise Interrupted(received[0])
