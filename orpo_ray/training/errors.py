"""Errors that another attempt would meet again: they are answers, not failures of a worker."""


class UnsupportedModelError(ValueError):
    """A model whose loss this project would compute wrongly, or cannot compute at all."""


class ResumeError(ValueError):
    """The run directory's checkpoint does not fit the config it is to go on with."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not a number; raised on all ranks before the optimizer moves."""


class MicrobatchTooLargeError(MemoryError):
    """A microbatch does not fit; the message names the token budget to set."""
