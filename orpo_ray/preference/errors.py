"""The one exception for data that cannot be trained on."""

from collections.abc import Sequence


class DataError(ValueError):
    """Data that cannot be used; `lines` has one finding each, with the file or row and the fix."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)

    def __reduce__(self) -> tuple[type["DataError"], tuple[tuple[str, ...]]]:
        """Keep the lines when the error crosses from a data task to the driver."""
        return (DataError, (self.lines,))
