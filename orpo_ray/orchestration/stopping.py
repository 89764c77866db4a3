"""What SIGINT, SIGTERM and SIGHUP do to a command and to a run; on the driver.

It imports nothing slow, as a command handles signals before it imports anything else.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Also those that Ray Tune handles.
_REPLACED = (*_SIGNALS, signal.SIGUSR1)
# A command that has not ended after this long is ended; sooner after another Ctrl-C.
_ENDS_S, _ENDS_SOON_S = 30.0, 5.0
_SHOW_CURSOR = "\x1b[?25h"


class SignalInterrupt(KeyboardInterrupt):
    """A signal ended what was going on.

    Args:
        number: of the signal.
        message: how far it came.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 of Ctrl-C, 143 of the others, which all ask a process to terminate."""
        return _exit_code(self.number)

    @property
    def line(self) -> str:
        """What the user is told."""
        return _line(self.number)


class _Signals:
    """What was received, and what is done about it.

    Args:
        of_command: whether the process ends with what handles its signals.
    """

    def __init__(self, of_command: bool) -> None:
        self.of_command = of_command
        self.received: list[int] = []
        self.request: Callable[[], bool] | None = None
        self.is_ending = False

    def handle(self, number: int, frame: object) -> None:
        """Make a request of the first signal if one can be made; else end at once."""
        again = bool(self.received)
        self.received.append(number)
        if again and number != signal.SIGINT:
            return  # a service manager or a terminal that is closed sends two or three
        if not again and self.request is not None and self.request():
            return
        if self.of_command:
            _thread.start_new_thread(_exit_after, (_ENDS_SOON_S if again else _ENDS_S, number))
        if self.is_ending:
            return
        self.is_ending = self.of_command
        raise SignalInterrupt(number)


_handling: _Signals | None = None


@contextmanager
def command_signals() -> Iterator[None]:
    """Handle the signals of a command, whose process ends afterwards.

    Inside, a signal raises `SignalInterrupt`, unless `requests` has a better answer. Once that was
    raised, further signals do not disturb the end; a second Ctrl-C only limits its time.
    """
    signals = _Signals(of_command=True)
    with _handled_by(signals):
        yield
    if signals.received:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def requests(request: Callable[[], bool]) -> Iterator[None]:
    """Let the first signal make a request, and wait for what comes of it.

    A second Ctrl-C raises `SignalInterrupt`. Outside the main thread signals cannot be handled, and
    nothing is done. In a process that is no command's, a signal that came too late to stop anything
    is sent again at the end, to the handler of before.

    Args:
        request: called in the signal handler; False if there is nothing to wait for.

    Raises:
        SignalInterrupt: for a signal that cannot be answered by a request, and for a
            `StoppedError` that a Ctrl-C requested.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _handling is not None:
        with _requesting(_handling, request):
            yield
        return
    signals = _Signals(of_command=False)
    with _handled_by(signals), _requesting(signals, request):
        yield
    if signals.received:
        signal.raise_signal(signals.received[0])


@contextmanager
def _requesting(signals: _Signals, request: Callable[[], bool]) -> Iterator[None]:
    from orpo_ray.training.errors import StoppedError

    before, signals.request = signals.request, request
    try:
        yield
    except StoppedError as error:
        if signals.received and signals.received[0] == signal.SIGINT:
            raise SignalInterrupt(signal.SIGINT, str(error)) from error
        raise
    finally:
        signals.request = before


@contextmanager
def _handled_by(signals: _Signals) -> Iterator[None]:
    """Install the handlers, and give back those of before."""
    global _handling
    handler = signals.handle
    with kept_handlers():
        for number in _SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (ignored and number == signal.SIGHUP):  # nohup asks for that
                signal.signal(number, handler)
        before, _handling = _handling, signals
        try:
            yield
        finally:
            _handling = before


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Give back the handlers of before, whatever was installed inside.

    SIGINT that is ignored, as in what a shell script starts in the background, has Python's handler
    afterwards: whoever sends it means it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _REPLACED}
    if before[signal.SIGINT] is signal.SIG_IGN:
        before[signal.SIGINT] = signal.default_int_handler
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that Python did not install
                signal.signal(number, handler)


@contextmanager
def ending() -> Iterator[None]:
    """Let signals not disturb the end of a command; a second Ctrl-C limits its time."""
    if _handling is None or not _handling.of_command:
        yield
        return
    before, _handling.is_ending = _handling.is_ending, True
    try:
        yield
    finally:
        _handling.is_ending = before


def received() -> int | None:
    """The first signal that this process received while its signals were handled here."""
    return _handling.received[0] if _handling is not None and _handling.received else None


def interrupted_by(number: int) -> SignalInterrupt:
    """The exception of a signal that was received where another handler was installed."""
    if _handling is not None:
        _handling.received.append(number)
        _handling.is_ending = _handling.of_command
    return SignalInterrupt(number)


def _exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else TERMINATED


def _line(number: int) -> str:
    what = "interrupted" if number == signal.SIGINT else "terminated"
    return f"{what}; the same command with the same run_name goes on"


def _exit_after(seconds: float, number: int) -> NoReturn:
    """End the process, whatever its threads wait for; a Ray that it started ends with it."""
    time.sleep(seconds)
    _write(sys.__stdout__, _SHOW_CURSOR, only_terminal=True)
    _write(sys.__stderr__, f"{_line(number)}\n")
    os._exit(_exit_code(number))


def _write(stream: Any, text: str, only_terminal: bool = False) -> None:
    """Write past what another thread may hold."""
    try:
        if stream is not None and (stream.isatty() or not only_terminal):
            os.write(stream.fileno(), text.encode())
    except (OSError, ValueError):
        return
