"""Layers that read the tokens before one whatever a mask says, on packed rows; in training workers.

Convolutions and recurrences have no mask. In a packed row the module around them is given every
completion with its own prompt as a padded row of its own, and its output is put back; all that is
around the module (dense layers, experts, attention, the head) has the packed row.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from orpo_ray.models.microbatch import PaddedRows

MIXED = "its convolutions and recurrences are given padded rows"
# What only packed attention takes; with it, attention inside of a mixer would be given another row.
_OF_PACKED_ROWS = ("packed_layout", "packed_kernel")


def find_mixers(module: nn.Module) -> list[nn.Module]:
    """The modules that own a convolution over several tokens: Mamba, gated delta nets, RG-LRU, ...

    Args:
        module: a layer of a decoder.
    """
    return [part for part in module.modules() if _has_convolution(part)]


def _has_convolution(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    return any(is_convolution(child) for child in module.children())


def is_convolution(module: nn.Module) -> bool:
    """Whether a module reaches over several tokens by a convolution."""
    return isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1


class Mixers:
    """The mixers of a decoder.

    Args:
        layers: that have them, or have none.

    Attributes:
        rows: the completions of the microbatch that is computed.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        found = (module for layer in layers for module in find_mixers(layer))
        self._modules = list(dict.fromkeys(found))  # layers may share one
        self.rows: PaddedRows | None = None

    def __bool__(self) -> bool:
        return bool(self._modules)

    def by_sequence(self, wanted: bool) -> None:
        """Give them every completion as a row of its own from now on, or what they are called with.

        Args:
            wanted: the former; `rows` is to be set before each forward pass.
        """
        for module in self._modules:
            vars(module).pop("forward", None)
            if wanted:
                module.forward = self._spread(module.forward)

    def _spread(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def by_sequence(*args: Any, **options: Any) -> Any:
            rows = self.rows
            assert rows is not None
            n_tokens, shape = len(rows.where), rows.source.shape

            def spread(value: Any) -> Any:
                if isinstance(value, Tensor) and value.shape[:2] == (1, n_tokens):
                    return value[0][rows.source]
                return value

            def put_back(value: Any) -> Any:
                if isinstance(value, Tensor) and value.shape[:2] == shape:
                    return value.flatten(0, 1)[rows.where][None]
                return value

            for name in _OF_PACKED_ROWS:
                options.pop(name, None)
            return tree_map(put_back, forward(*tree_map(spread, args), **tree_map(spread, options)))

        wrapped: Callable[..., Any] = torch.compiler.disable(by_sequence)
        return wrapped
