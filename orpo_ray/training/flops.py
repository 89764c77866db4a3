"""What a packed row takes at least in floating-point operations, and what the device can do.

Their quotient is the MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), here of a matrix
product that was timed in the same process. Runs in training workers.
"""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from orpo_ray.dataset.packing import GroupSpan, PackedRow
from orpo_ray.models.quantized import n_weights

_CPU_SIZE, _CUDA_SIZE = 1024, 8192
_TRIES = 24
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Work:
    """Operations of one forward and backward pass, without what is computed again or for nothing.

    6 for a weight and a token it multiplies: 2 forward, 4 backward, of which a frozen weight takes
    2; the head's only where it predicts something. 12 for a query, a key that it sees and a unit
    of the heads' width.

    Args:
        per_token: of all decoder layers.
        per_position: of the head.
        per_seen_key: of attention.
    """

    per_token: float
    per_position: float
    per_seen_key: float

    @staticmethod
    def of(causal_lm: PreTrainedModel) -> "Work":
        """The work of a model; of experts it is the share that a token goes to."""
        config = causal_lm.config.get_text_config()
        head = causal_lm.get_output_embeddings()
        looked_up = [m for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)]
        apart = {id(p) for module in (head, *looked_up) for p in module.parameters()}
        used = getattr(config, "num_experts_per_tok", None) or 1
        n_experts = next(
            (n for name in _EXPERTS if (n := getattr(config, name, None)) is not None), used
        )
        per_token = sum(
            _passes(parameter)
            * n_weights(parameter)
            * (used / n_experts if ".experts." in name else 1.0)
            for name, parameter in causal_lm.named_parameters()
            if parameter.dim() > 1 and id(parameter) not in apart
        )
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        attention = config.num_hidden_layers * config.num_attention_heads * width
        return Work(per_token, _passes(head.weight) * head.weight.numel(), 12.0 * attention)

    def flops(self, row: PackedRow) -> float:
        """Operations that one row takes."""
        return (
            self.per_token * len(row.token_ids)
            + self.per_position * len(row.positions)
            + self.per_seen_key * sum(map(seen_keys, row.spans))
        )


def _passes(weight: torch.nn.Parameter) -> float:
    return 6.0 if weight.requires_grad else 4.0


def seen_keys(span: GroupSpan) -> int:
    """Pairs of a query and a key it sees in one group; windows are not looked at."""
    prompt = span.prompt
    own = sum(n * (n + 1) // 2 for n in (prompt, *span.completions))
    return own + prompt * sum(span.completions)


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """Operations a second of one large matrix product, the best of several.

    Args:
        device: to be timed.
        dtype: of the product.
        n: rows and columns; unset: as many as are done within a second.
    """
    is_cuda = device.type == "cuda"
    n = n or (_CUDA_SIZE if is_cuda else _CPU_SIZE)
    # Random: a GPU multiplies numbers that are all alike faster than any that are trained on.
    numbers = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(n, n, device=device, generator=numbers).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(_TRIES):
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best
