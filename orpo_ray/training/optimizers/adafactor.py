"""Adafactor over the shards of FSDP2; in training workers."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Adafactor(transformers.Adafactor):  # type: ignore[misc]
    """transformers' Adafactor, for weights that are sharded.

    An update takes means over rows and columns of a whole weight. Weights and gradients are
    gathered one at a time, every rank computes the same update, and keeps its shard. The factors
    are whole on every rank: a row and a column of each weight.

    As in transformers' Trainer and in TRL the learning rate is that of the update
    (`scale_parameter` and `relative_step` are off), and there is no first moment.
    torch.optim.Adafactor multiplies it by the RMS of the weight and bounds it by 1 / sqrt(step), so
    that the same rate is another one; it does not take shards.

    Args:
        groups: of parameters, with their weight decay.
        learning_rate: of the first step.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], learning_rate: float) -> None:
        super().__init__(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
        self._settings = tuple(self.defaults)  # torch adds its own to them when it loads a state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            settings = {name: group[name] for name in self._settings}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                whole = nn.Parameter(_gathered(parameter))
                whole.grad = _gathered(parameter.grad)
                update = transformers.Adafactor([whole], **settings)
                update.state[whole] = self.state[parameter]
                update.step()
                if isinstance(parameter, DTensor):
                    parameter.copy_(_sharded(whole.detach(), parameter))


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _sharded(whole: Tensor, like: DTensor) -> DTensor:
    """The shard of this rank, of a tensor that is the same on all: nothing is sent."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
