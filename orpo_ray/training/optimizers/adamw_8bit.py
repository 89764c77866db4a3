"""AdamW with moments in 8 bits, by torchao; in training workers."""

from typing import Any

import torch
import torchao.optim
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim.subclass_8bit import OptimState8bit

from orpo_ray.training.optimizers.memory import block_size

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(torchao.optim.AdamW8bit):  # type: ignore[misc]
    """torchao's AdamW, whose moments have a code of 8 bits and, for up to 256 of them, a scale.

    torchao decides by a worker's shard whether its moments are in 8 bits; here the whole weight
    decides, and a checkpoint fits any number of workers.
    """

    def step(self, closure: None = None) -> None:
        """Update all weights that have a gradient; on GPUs by code that is compiled once."""
        on_host = all(p.device.type == "cpu" for g in self.param_groups for p in g["params"])
        with torch.compiler.set_stance("force_eager" if on_host else "default"):
            super().step()

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """Moments of a weight that are all zero; torchao's step calls it before the first update.

        Args:
            p: the weight.
            signed: whether moments may be negative.
        """
        local = _local(p)
        block = block_size(p.shape)
        if block and local.numel():
            zeros = OptimState8bit.zeros(local.shape, signed, block, local.device, local.dtype)
        else:
            zeros = torch.zeros_like(local)
        return _like(p, zeros, p.shape)

    @staticmethod
    def plain_state(state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer state dict with codes and scales as tensors of their own.

        They share their memory with the moments, and are sharded by rows as the weights are:
        torch.distributed.checkpoint can save them, and load other shards.

        Args:
            state: of `get_state_dict`.
        """
        parts = {
            weight: {
                name: _parts(value) if name in _MOMENTS and block_size(value.shape) else value
                for name, value in values.items()
            }
            for weight, values in state["state"].items()
        }
        return state | {"state": parts}


def _parts(moment: Tensor) -> dict[str, Tensor]:
    local, n_rows = _local(moment), moment.shape[0]
    blocks = moment.numel() // n_rows // block_size(moment.shape)
    if isinstance(local, OptimState8bit):
        codes, scale = local.codes, local.scale.view(-1, blocks)
    else:  # a worker without a row of this weight
        codes = local.to(torch.uint8)
        scale = torch.zeros(0, blocks, device=local.device)
    return {
        "codes": _like(moment, codes, moment.shape),
        "scale": _like(moment, scale, torch.Size((n_rows, blocks))),
    }


def _like(tensor: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape with these values on this rank, sharded as another one is."""
    if not isinstance(tensor, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )


@torch.no_grad()
def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
