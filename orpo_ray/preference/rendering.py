"""Calling a tokenizer's chat template, which is somebody else's code, within limits.

Jinja's sandbox keeps a template from the machine, but not from looping for ever or from filling
the memory. Time decides about no row, as a machine may be slow: a template beyond it ends the run.
"""

import ctypes
import inspect
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.records import Reason, Refusal

# Of one conversation. It usually takes well under a millisecond, and a few MB.
CPU_S, GIB = 60.0, 4.0
# After the limit of time the system ends the process: one call that never returns to Python, as
# `10 ** 10 ** 9`, can be ended by nothing else.
_GRACE_S = 30.0
_LOOK_S = 0.1
_STATM = Path("/proc/self/statm")


class TemplateLimitError(DataError):
    """A chat template took more time or memory for a conversation than any should."""

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[str, ...]]]:
        """As that of `DataError`."""
        return (TemplateLimitError, (self.lines,))


class TooManyCharactersError(Exception):
    """A conversation was rendered as more characters than a pair may have.

    Args:
        n_characters: their number.
    """

    def __init__(self, n_characters: int) -> None:
        super().__init__(n_characters)
        self.n_characters = n_characters


def apply_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    most_characters: int | None = None,
    /,  # a row may have arguments of these names for its template
    **options: Any,
) -> str:
    """Render one conversation.

    Args:
        tokenizer: with the chat template.
        messages: the conversation.
        most_characters: maximum length of the text; None for no limit.
        options: of `apply_chat_template`.

    Raises:
        TemplateLimitError: naming the tokenizer.
        TooManyCharactersError: for a longer text.
    """
    text: str | None = None
    rendering = _WATCH.begin()
    try:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        finally:
            _WATCH.end(rendering)
    except _Overrun:
        _WATCH.forget(rendering)
    if rendering.overrun or text is None:
        # Here, as the frames that an exception of the template keeps hold what it made.
        raise TemplateLimitError(
            [
                f"chat_template: that of {tokenizer.name_or_path or 'the tokenizer'} took more "
                f"than {rendering.overrun} for one conversation; read it, and give another one as "
                "chat_template if it has no end"
            ]
        )
    if most_characters is not None and len(text) > most_characters:
        raise TooManyCharactersError(len(text))
    return text


def reserved_argument(arguments: Mapping[str, Any], tokenizer: Any) -> Refusal | None:
    """Refuse a row whose template arguments are those that rendering itself sets."""
    reserved = _reserved_arguments(tokenizer)
    for name in arguments:
        if name != "tools" and (name in reserved or name in tokenizer.special_tokens_map):
            return Refusal(
                Reason.WRONG_TYPE,
                f"chat_template_kwargs may not set {name}, which is not the row's to decide",
            )
    return None


@lru_cache(maxsize=8)
def _reserved_arguments(tokenizer: Any) -> frozenset[str]:
    names = inspect.signature(tokenizer.apply_chat_template).parameters
    own = {"messages", "strftime_now", "raise_exception", "tojson"}
    return frozenset(own | set(names) - {"documents"})


class _Overrun(BaseException):
    """Raised inside a template, where it passes all `except Exception` of Jinja."""


class _Rendering:
    """A call of a template that has not returned.

    Args:
        thread: that runs it.
    """

    __slots__ = ("cpu_s", "overrun", "start_bytes", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.overrun = ""  # the limit that it went beyond
        self.cpu_s = -1.0  # of the process, when it was first looked at
        self.start_bytes = 0  # memory of the process at the look before


class _Watch:
    """A thread that looks at the renderings of this process, and ends those beyond a limit.

    The time is the processor's, so that a machine with much else to do makes no difference.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, _Rendering] = {}
        self._pid = 0
        self._is_armed = False
        self._bytes = 0  # memory at the last look

    def begin(self) -> _Rendering:
        """Look at what this thread does from here on."""
        if self._pid != os.getpid():
            self._start()
        rendering = _Rendering(threading.get_ident())
        self._running[rendering.thread] = rendering
        if not self._is_armed:
            self._arm()
        return rendering

    def end(self, rendering: _Rendering) -> None:
        """Look no longer."""
        with self._lock:
            del self._running[rendering.thread]
            if rendering.overrun:  # it returned just before it was to be ended
                _raise_in(rendering.thread, None)

    def forget(self, rendering: _Rendering) -> None:
        """As `end`, for one that was ended, perhaps before `end` was done."""
        self._running.pop(rendering.thread, None)

    def _start(self) -> None:
        """Start the thread, once in a process; a forked one has none."""
        with self._lock:
            if self._pid != os.getpid():
                self._running, self._is_armed, self._bytes = {}, False, _resident_bytes()
                threading.Thread(target=self._look, name="chat-template", daemon=True).start()
                self._pid = os.getpid()

    def _arm(self) -> None:
        """Have the system end this process a while after the limit of time, from now on."""
        self._is_armed = True
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S + _GRACE_S)

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            seen = list(self._running.values())
            if not seen and self._is_armed:
                self._is_armed = False
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            elif any(rendering.cpu_s < 0 for rendering in seen):
                self._arm()
            for rendering in seen:
                if rendering.cpu_s < 0:
                    rendering.cpu_s, rendering.start_bytes = time.process_time(), self._bytes
                overrun = _overrun(rendering)
                if overrun:
                    self._interrupt(rendering, overrun)
            self._bytes = _resident_bytes()

    def _interrupt(self, rendering: _Rendering, overrun: str) -> None:
        with self._lock:
            if self._running.get(rendering.thread) is rendering and not rendering.overrun:
                rendering.overrun = overrun
                _raise_in(rendering.thread, _Overrun)


def _overrun(rendering: _Rendering) -> str:
    """The limit that a rendering is beyond; empty for none."""
    if time.process_time() - rendering.cpu_s > CPU_S:
        return f"{CPU_S:g} s"
    if _resident_bytes() - rendering.start_bytes > GIB * 2**30:
        return f"{GIB:g} GiB"
    return ""


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread, at its next step in Python; None takes one back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


_WATCH = _Watch()
