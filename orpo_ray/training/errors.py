"""Errors after which a worker is not restarted: it would end the same way again."""

from collections.abc import Sequence

from orpo_ray.preference.groups import RowId


class EvaluationError(ValueError):
    """The config needs an evaluation set or a metric that the run does not have."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not a number; raised on all ranks before the optimizer moves.

    Args:
        message: with step and rows.
        rows: whose log-probabilities were not finite; the same on every rank.
    """

    def __init__(self, message: str, rows: Sequence[RowId] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class StoppedError(RuntimeError):
    """The run stopped on request, after saving a checkpoint; raised on all ranks."""


class NotSavedError(RuntimeError):
    """The run stopped on request, and its checkpoint could not be saved; raised on all ranks."""


class TrainingError(RuntimeError):
    """A run ended for a reason that the message says, in one line."""


class MicrobatchTooLargeError(MemoryError):
    """A microbatch does not fit; the message names the token budget to set."""
