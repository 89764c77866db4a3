"""Check that a model computes the same with packed as with padded rows; in training workers.

Packing is exact for every decoder whose layers mix tokens by attention alone, through
transformers' attention interface, at the positions they are given. A model of a family that the
tests do not cover is compared on the first pairs of a run.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from orpo_ray.dataset.packing import PackedRow
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.models.attention.interface import PackingNotSupportedError
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale

# Families that the project's own tests compare with a padded float64 reference.
COMPARED = frozenset(
    {
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "mixtral",
        "olmoe",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
    }
)
_N_GROUPS = 4
# The largest difference of a mean log-probability: rounding only, in fp32 and in bfloat16.
_TOLERANCE_NATS = {False: 1e-3, True: 5e-2}


def check_packing(
    model: OrpoModel,
    stream: TokenStream,
    device: torch.device,
    bf16: bool,
    notice: Callable[[str], None],
) -> None:
    """Compare packed with padded rows for an untested family; fall back to padded if they differ.

    Args:
        model: sharded; every rank calls this.
        stream: its first groups are compared.
        device: of this rank.
        bf16: whether matrix products are in bfloat16.
        notice: receives a line with the result.
    """
    family = model.causal_lm.config.model_type
    if model.attention == "padded" or family in COMPARED:
        return
    sample = stream.sample(_N_GROUPS)
    problem = disagreement(model, sample, device, bf16)
    # One rank that falls back must not do so alone.
    worst = torch.tensor([problem is not None], dtype=torch.int32, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if worst.item():
        model.use_attention("padded")
        notice(f"warning: {family} does not compute the same packed as padded: {problem}")
    else:
        notice(f"{family}: packed equals padded on the first {len(sample.row_ids)} pairs")


@torch.no_grad()
def disagreement(
    model: OrpoModel, sample: PackedRow, device: torch.device, bf16: bool
) -> str | None:
    """Describe how packed and padded differ on one row, or return None if they agree."""
    scale = LossScale(nll=1 / sample.n_nll_tokens, pair=1 / sample.n_pairs, beta=1.0)
    was_training = model.training
    model.eval()
    try:
        packed = model(Microbatch(sample, device), scale)
    except (PackingNotSupportedError, TypeError) as error:
        return str(error)
    finally:
        model.train(was_training)
    model.use_attention("padded")
    model.eval()
    padded = model(Microbatch(sample, device), scale)
    model.train(was_training)
    model.use_attention("packed")
    difference = max(
        (getattr(packed, name) - getattr(padded, name)).abs().max().item()
        for name in ("chosen_log_probs", "rejected_log_probs")
    )
    if difference <= _TOLERANCE_NATS[bf16]:
        return None
    return f"log-probabilities differ by {difference:.2g} nats"
