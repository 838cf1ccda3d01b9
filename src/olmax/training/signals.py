"""Stopping a run from outside: SIGTERM and Ctrl-C ask for a checkpoint first."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(SystemExit):
    """Training was asked to stop and has written a checkpoint.

    The exit status is 128 + the signal's number, as shells report it: 143 for SIGTERM, 130 for
    Ctrl-C.
    """

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)


class StopRequest:
    """Whether a signal has arrived, and which."""

    def __init__(self):
        self.signal_number: int | None = None


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or SIGINT is only noted; a second one acts as usual.

    Outside the main thread, where Python has no signal handlers, nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        del frame
        request.signal_number = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
