"""Mixed precision on one rank, where there is nothing to shard; in training workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable


@dataclass(frozen=True)
class _Weight:
    """A weight, its copy in the dtype of computation, and where the model has it.

    Args:
        own: the parameter that the optimizer updates and checkpoints hold.
        copy: what the model computes with.
        places: modules and names; tied weights have several.
    """

    own: nn.Parameter
    copy: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]


class MixedPrecision:
    """Lets a model compute with copies of its fp32 weights, as FSDP's mixed precision does.

    Without FSDP's buffers and DTensors, which on one GPU take the host a third of a step
    (benchmarks/RESULTS.md); values and gradients are the same. Copies are in the weights' places
    from the beginning of a forward pass to the end of its backward pass, or to its own end where
    there is no gradient. In between, and for whoever lists the parameters, the weights are there.

    Args:
        model: of fp32 weights; its output has the loss as `loss`.
        dtype: of computation.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._weights: tuple[_Weight, ...] | None = None
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after, always_call=True)

    def place_copies(self) -> None:
        """Copy the weights, and let the model compute with the copies."""
        # Not earlier: weights get their memory after the model is built.
        self._weights = self._weights or self._found()
        _copy([w.copy for w in self._weights], [w.own for w in self._weights])
        for weight in self._weights:
            weight.copy.grad = None  # of a backward pass that failed on its way
            for module, name in weight.places:
                module._parameters[name] = weight.copy

    def place_weights(self) -> None:
        """Give the model its own weights back."""
        for weight in self._weights or ():
            for module, name in weight.places:
                module._parameters[name] = weight.own

    def _found(self) -> tuple[_Weight, ...]:
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in self._model.modules():
            for name, own in module._parameters.items():
                if own is not None and own.dtype == torch.float32:
                    places.setdefault(own, []).append((module, name))
        return tuple(
            _Weight(
                own,
                nn.Parameter(torch.empty_like(own, dtype=self._dtype), own.requires_grad),
                tuple(where),
            )
            for own, where in places.items()
        )

    def _before(self, *_: Any) -> None:
        self.place_copies()

    def _after(self, _model: nn.Module, _inputs: Any, output: Any) -> None:
        """Keep the copies until the backward pass has ended, if there will be one."""
        loss: Tensor | None = getattr(output, "loss", None)
        if loss is None or not loss.requires_grad:  # None: the pass failed
            self.place_weights()
        else:
            loss.register_hook(self._queue_gradients)

    def _queue_gradients(self, _: Tensor) -> None:
        engine: Any = Variable._execution_engine  # as FSDP and DDP learn of a backward pass's end
        engine.queue_callback(self._move_gradients)

    @torch.no_grad()
    def _move_gradients(self) -> None:
        """Add the copies' gradients to those of the weights, in the weights' dtype."""
        self.place_weights()
        given = [(w.own, w.copy.grad) for w in self._weights or () if w.copy.grad is not None]
        sums = [(own.grad, gradient) for own, gradient in given if own.grad is not None]
        if sums:
            torch._foreach_add_([total for total, _ in sums], [gradient for _, gradient in sums])
        first = [(own, gradient) for own, gradient in given if own.grad is None]
        gradients = [torch.empty_like(own) for own, _ in first]
        _copy(gradients, [gradient for _, gradient in first])
        for (own, _), gradient in zip(first, gradients, strict=True):
            own.grad = gradient
        for weight in self._weights or ():
            weight.copy.grad = None


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors of one dtype to tensors of another, in few launches."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
