"""The exception raised for data that a run cannot start with."""

from collections.abc import Sequence


class DataError(ValueError):
    """Files or settings of the data cannot be used; single bad rows are a `Refusal` instead.

    Args:
        lines: one finding each: the setting, file or row, what is wrong, and the fix.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)

    def __reduce__(self) -> tuple[type["DataError"], tuple[tuple[str, ...]]]:
        """Keep `lines` when the error is pickled from a data task to the driver."""
        return (DataError, (self.lines,))
