"""The exception raised for data that a run cannot start with."""

from collections.abc import Sequence

from orpo_ray.storage.hiding import hide


class DataError(ValueError):
    """Files or settings of the data cannot be used; single bad rows are a `Refusal` instead.

    Args:
        lines: one finding each: the setting, file or row, what is wrong, and the fix. Secrets in
            them are hidden.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(map(hide, lines))
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type["DataError"], tuple[tuple[str, ...]]]:
        """Keep `lines` when the error is pickled from a data task to the driver."""
        return (DataError, (self.lines,))
