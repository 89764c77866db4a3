"""Model FLOPs of packed rows, and model FLOPs utilization (MFU); in training workers.

MFU is that of Chowdhery et al. 2022 (arXiv:2204.02311, appendix B), here relative to the rate of a
matrix product that was timed in the same process.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from orpo_ray.dataset.packing import GroupSpan, PackedRow
from orpo_ray.models.layer_config import head_width, setting
from orpo_ray.models.quantized import n_weights
from orpo_ray.runs.formatting import format_duration

_CPU_SIZE, _CUDA_SIZE = 1024, 8192
_TRIES = 24
_LONG_S = 10.0
_LONG_FLOPS = 1e12  # fewer take no device so long
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Work:
    """FLOPs of one forward and backward pass, without recomputation and masked attention scores.

    A weight takes 6 per token: 2 forward and 4 backward, or 2 backward where it is frozen; the
    head's weights only at positions that have a target. Attention takes 12 per attended
    (query, key) pair and unit of head width.

    Args:
        per_token: of all decoder layers.
        per_position: of the head.
        per_seen_key: of attention.
    """

    per_token: float
    per_position: float
    per_seen_key: float

    @staticmethod
    def from_model(causal_lm: PreTrainedModel) -> "Work":
        """Count a model's weights; of experts, the share that each token is routed to."""
        config = causal_lm.config.get_text_config()
        head = causal_lm.get_output_embeddings()
        looked_up = [m for m in causal_lm.modules() if isinstance(m, torch.nn.Embedding)]
        apart = {id(p) for module in (head, *looked_up) for p in module.parameters()}
        used = setting(config, "num_experts_per_tok") or 1
        n_experts = next((n for name in _EXPERTS if (n := setting(config, name))), used)
        per_token = sum(
            _passes(parameter)
            * n_weights(parameter)
            * (used / n_experts if ".experts." in name else 1.0)
            for name, parameter in causal_lm.named_parameters()
            if parameter.dim() > 1 and id(parameter) not in apart
        )
        n_heads = setting(config, "num_attention_heads")
        n_layers = setting(config, "num_hidden_layers") or 0
        attention = n_layers * n_heads * head_width(config) if isinstance(n_heads, int) else 0
        return Work(per_token, _passes(head.weight) * head.weight.numel(), 12.0 * attention)

    def flops(self, row: PackedRow) -> float:
        """FLOPs of one row."""
        return (
            self.per_token * len(row.token_ids)
            + self.per_position * len(row.positions)
            + self.per_seen_key * sum(map(seen_keys, row.spans))
        )


class MfuMeter:
    """MFU of training steps between two reads.

    Args:
        causal_lm: the model that is trained.
        device: of this rank; its rate is timed here.
        dtype: of the matrix products.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._work = Work.from_model(causal_lm)
        self._peak_flops = dist.get_world_size() * matmul_rate(device, dtype)
        self._flops = 0.0

    def add(self, rows: Iterable[PackedRow]) -> None:
        """Count this rank's rows for all ranks, which carry about equal tokens."""
        self._flops += dist.get_world_size() * sum(map(self._work.flops, rows))

    def read(self, seconds: float) -> float:
        """MFU of the rows counted since the last read, which took `seconds`."""
        flops, self._flops = self._flops, 0.0
        return flops / seconds / self._peak_flops


def long_step_text(
    causal_lm: PreTrainedModel,
    rows: Sequence[PackedRow],
    device: torch.device,
    dtype: torch.dtype,
    least_s: float = _LONG_S,
) -> str | None:
    """What to say before a step that takes long by its FLOPs; None for any other.

    Attention on CPUs takes about four times as long as a product of as many FLOPs; sliding windows
    are ignored.

    Args:
        causal_lm: the model that is trained.
        rows: of this rank.
        device: of this rank, whose rate is timed if there is much to do.
        dtype: of the matrix products.
        least_s: seconds from which a step is long.
    """
    work = Work.from_model(causal_lm)
    flops = sum(map(work.flops, rows))
    if least_s and flops < _LONG_FLOPS:
        return None
    seconds = flops / matmul_rate(device, dtype)
    if seconds < least_s:
        return None
    slower = ", up to four times that with attention on a CPU" if device.type == "cpu" else ""
    spans = [span for row in rows for span in row.spans]
    attention = work.per_seen_key * sum(map(seen_keys, spans)) / flops
    return (
        f"the first step takes {format_duration(seconds)} by its FLOPs ({flops:.1e}, "
        f"{attention:.0%} of them attention){slower}; its longest prompt with its answers has "
        f"{max(span.n_tokens for span in spans):,} tokens"
    )


def _passes(weight: torch.nn.Parameter) -> float:
    return 6.0 if weight.requires_grad else 4.0


def seen_keys(span: GroupSpan) -> int:
    """Attended (query, key) pairs of one group; sliding windows are ignored."""
    prompt = span.prompt
    own = sum(n * (n + 1) // 2 for n in (prompt, *span.completions))
    return own + prompt * sum(span.completions)


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOPs per second of one large matrix product, the best of several.

    Args:
        device: the device to time.
        dtype: of the product.
        n: rows and columns. Default: as many as take less than a second.
    """
    is_cuda = device.type == "cuda"
    n = n or (_CUDA_SIZE if is_cuda else _CPU_SIZE)
    # Random: a GPU multiplies constant matrices faster than any that are trained on.
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
