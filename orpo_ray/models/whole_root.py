"""Run parts of a sharded model outside of its forward pass; in training workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from orpo_ray.dataset.packing import pack
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import orpo


@contextmanager
def whole_root(model: OrpoModel, device: torch.device) -> Iterator[None]:
    """Unshard embeddings and head, which belong to FSDP's root; in evaluation mode, a collective.

    Nothing is compiled for what runs here, which are a few tokens, or answers that grow.

    The model's mode and its way of computing rows are as before afterwards.
    """
    attention, was_training = model.attention, model.training
    model.use_attention("padded")
    model.eval()
    if isinstance(model, FSDPModule):
        # The root has to run forward once before its submodules (lazy init); an empty row does.
        nothing = Microbatch(pack([], chunk_tokens=1, prompt_counts=True), device)
        with torch.no_grad():
            model(nothing, LossScale(nll=0.0, pair=0.0, objective=orpo(0.0)))
        model.unshard()
    elif model.mixed_precision is not None:
        model.mixed_precision.place_copies()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()
        elif model.mixed_precision is not None:
            model.mixed_precision.place_weights()
        model.train(was_training)
        model.use_attention(attention)
