"""Errors that another attempt would meet again: they are answers, not failures of a worker."""

from collections.abc import Sequence

from orpo_ray.preference.groups import RowId


class EvaluationError(ValueError):
    """The config asks of the run's evaluations what they do not have."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not a number; raised on all ranks before the optimizer moves.

    Args:
        message: with step and rows.
        rows: where the figures were not finite; the same on every rank.
    """

    def __init__(self, message: str, rows: Sequence[RowId] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class StoppedError(RuntimeError):
    """The run was asked to stop, and has saved a checkpoint; raised on all ranks."""


class MicrobatchTooLargeError(MemoryError):
    """A microbatch does not fit; the message names the token budget to set."""
