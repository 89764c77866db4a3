"""Bytes of the state of an optimizer; in training workers and for `--dry-run`."""

import math
from collections.abc import Sequence

# Moments that share a scale: as many as in torchao and bitsandbytes, or fewer for other rows.
_BLOCK, _LEAST_BLOCK = 256, 32
_LEAST_IN_8_BITS = 4096
_VALUE_BYTES = 4


def block_size(shape: Sequence[int]) -> int:
    """How many moments of a weight share a scale in 8 bits; 0: its moments are in float32.

    It depends on the whole weight, and each row has blocks of its own, so that shards of any number
    of workers are made of the same blocks. Vectors and small weights have moments in float32.
    """
    block = math.gcd(math.prod(shape[1:]), _BLOCK)
    is_small = len(shape) < 2 or block < _LEAST_BLOCK or math.prod(shape) < _LEAST_IN_8_BITS
    return 0 if is_small else block


def state_bytes(optim: str, shape: Sequence[int]) -> float:
    """Bytes of an optimizer's state of one whole weight.

    Args:
        optim: the setting.
        shape: of the weight.
    """
    n_values = math.prod(shape)
    if optim == "adafactor" and len(shape) > 1:
        return _VALUE_BYTES * (n_values / shape[-1] + n_values / shape[-2])
    if optim == "adafactor":
        return _VALUE_BYTES * n_values
    if optim == "adamw_8bit" and (block := block_size(shape)):
        return 2 * n_values * (1 + _VALUE_BYTES / block)
    return 2 * _VALUE_BYTES * n_values


def is_whole_everywhere(optim: str) -> bool:
    """Whether every worker holds the whole state, where others hold that of their shards."""
    return optim == "adafactor"
