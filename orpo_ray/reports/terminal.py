"""What is printed for people: it never ends a run, wherever it goes; on the driver."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orpo_ray.storage.hiding import hide, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class Output(io.TextIOBase):
    """Text that is written at once to what a stream writes to, or left out where that fails.

    A closed pipe and a full disk raise nothing, neither now nor when the interpreter flushes its
    streams; once there is room again, text is written again. Characters that the encoding lacks are
    replaced.

    Args:
        stream: with a file descriptor; None where the descriptor is closed.
    """

    def __init__(self, stream: Any) -> None:
        self._descriptor: int | None = None if stream is None else stream.fileno()
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has an attribute
        """Of the stream."""
        return str(self._encoding)

    def write(self, text: str) -> int:
        """Write all of a text, or what can be written of it."""
        rest = memoryview(text.encode(self._encoding, "replace"))
        try:
            while rest and self._descriptor is not None:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            pass
        return len(text)

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._descriptor is not None and os.isatty(self._descriptor)

    def fileno(self) -> int:
        """The descriptor of the stream.

        Raises:
            io.UnsupportedOperation: where that is closed.
        """
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Let nothing that is printed raise an error; streams of other kinds than files are left."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _unfailing(sys.stdout), _unfailing(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _unfailing(stream: Any) -> Any:
    try:
        if stream is not None:
            stream.flush()
        return Output(stream)
    except (OSError, ValueError, AttributeError):
        return stream


def as_text(value: object) -> "Text":
    """A cell or a line as it is: no markup, no control characters, no secrets."""
    from rich.text import Text

    return Text(printable(hide(str(value))))


def draws_in_place(console: "Console | None") -> bool:
    """Whether a view may draw over itself: on a terminal that can, and that is no log of a CI."""
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        return False
    if console.no_color or os.environ.get("CI"):
        return False
    return bool(console.file.isatty())  # FORCE_COLOR calls a file a terminal
