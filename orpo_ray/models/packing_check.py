"""Whether a model computes the same with packed rows, padded rows and rows alone, and its head.

Packing is exact for every decoder whose layers mix tokens by attention alone, through
transformers' attention interface, at the positions they are given. It is looked at before every
run: on a small copy of the model in fp32, by its kinds of layers and token by token, on rows that
are longer than its windows. The model itself is then compared with what was found. On the driver,
before workers start, and in training workers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from orpo_ray.dataset.packing import PackedRow, pack
from orpo_ray.dataset.stream import TokenStream
from orpo_ray.models.attention.interface import PackingNotSupportedError
from orpo_ray.models.lm_head import LMHead, confirms, find_head, probe_ids, refusing
from orpo_ray.models.microbatch import Microbatch, pad_rows
from orpo_ray.models.mixers import MIXED, find_mixers, is_convolution
from orpo_ray.models.orpo_model import ASKED, AttentionPath, OrpoModel
from orpo_ray.models.small_copy import WINDOW, decoder_layers, small_copy
from orpo_ray.models.whole_root import whole_root
from orpo_ray.objective.router import router_loss
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.pretrained import UnsupportedModelError

# Families whose kernels for packed rows the project's own tests and benchmarks compare on GPUs.
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
# Tokens of a prompt and of its completions: longer than a small copy's windows, several segments,
# one of a single token, and no prompt.
_LONG = ((20, (30, 5)), (1, (1, 40)), (0, (9, 2)), (12, (1, 1)), (33, (17, 3, 25)))
_PAIRS = _LONG[:4]
_SHORT = ((3, (2, 4)), (1, (1, 5)), (0, (6, 2)))
_N_GROUPS = 16
# By what transformers calls them: kinds of layers in which a segment sees more than its own tokens.
_WITH_STATE = ("linear", "conv", "mamba", "recurrent")
_KINDS = (*_WITH_STATE, "chunked", "compressed", "indexed", "sparse")


@dataclass(frozen=True)
class Tolerance:
    """Differences of a token's last hidden state from that of a row alone, over its norm.

    Args:
        packed: of packed rows; at least twice those of padded rows, which round otherwise, too.
        padded: of padded rows.
        quantile: which of the tokens it is of; 1 for the largest difference.
    """

    packed: float
    padded: float
    quantile: float = 1.0


# Attention and dense layers round to 1e-6, recurrences to 2e-4 at most.
_EXACT = Tolerance(packed=1e-4, padded=1e-3)
# bfloat16, in which rounding also sends some tokens to other experts: not in half of them.
_ROUGH = Tolerance(packed=5e-2, padded=float("inf"), quantile=0.5)
_ROUTER = 1e-3


@dataclass(frozen=True)
class Verdict:
    """How a model is computed.

    Args:
        head: what stands between its hidden states and its logits.
        path: the fastest rows that are exact.
        reason: why not packed ones; None for packed rows.
    """

    head: LMHead
    path: AttentionPath
    reason: str | None


def examine(small: PreTrainedModel, device: torch.device) -> Verdict:
    """Find the head of a small copy, and the rows that it computes as it does rows alone.

    Raises:
        UnsupportedModelError: for logits that the head cannot compute; see `find_head`.
    """
    head = find_head(small, device)
    model = OrpoModel(small, "alone", None)
    model.head = head
    model.eval()
    verdict = _examined(model, device, _EXACT)
    if model.has_router:
        _check_router(model, verdict.path, device)
    _try_training(model, verdict.path, device)
    return verdict


def refuse_unknown(causal_lm: PreTrainedModel) -> None:
    """Refuse a model whose logits cannot be computed, from a small copy of it on this CPU.

    A model of which none is small enough is left to the workers.

    Args:
        causal_lm: the model, also on the meta device.

    Raises:
        UnsupportedModelError: in one line; see `find_head`.
    """
    device = torch.device("cpu")
    small = small_copy(causal_lm, device)
    if small is not None:
        examine(small, device)


def check_packing(
    model: OrpoModel,
    stream: TokenStream,
    device: torch.device,
    bf16: bool,
    notice: Callable[[str], None],
) -> None:
    """Set a model's head, and fall back to padded rows where packed ones are not exact.

    Args:
        model: sharded; every rank calls this.
        stream: its first groups show what padding costs.
        device: of this rank.
        bf16: whether matrix products are in bfloat16.
        notice: receives a line with the result.

    Raises:
        UnsupportedModelError: for a head that is not the model's; see `find_head`.
    """
    family = model.causal_lm.config.model_type
    asked = model.attention
    small = small_copy(model.causal_lm, device)
    verdict = None if small is None else examine(small, device)
    del small
    if verdict is not None:
        model.head = verdict.head
    with refusing(model.causal_lm), whole_root(model, device):
        model.use_attention("padded")
        if verdict is None or not confirms(model.causal_lm, model.head, device):
            model.head = find_head(model.causal_lm, device)
        own = None
        if verdict is None or (verdict.path == asked == "packed" and family not in COMPARED):
            own = _examined(model, device, _ROUGH if bf16 else _EXACT)
    found = [verdict for verdict in (verdict, own) if verdict is not None]
    path, reason = _slowest(found, asked, model.padded_because)
    path = _on_all_ranks(path, device)
    model.use_attention(path)
    if path == asked == "padded" and model.padded_because == ASKED:
        return
    costs = _times_the_tokens(stream.sample(_N_GROUPS)) if path != "packed" or model.mixers else 1.0
    if path != "packed":
        rows = "padded rows" if path == "padded" else "rows one by one, without padding,"
        notice(
            f"warning: {family}: {rows} with {costs:.1f} times the tokens of packed ones: "
            f"{reason or 'another worker found packed ones to differ'}"
        )
    elif family not in COMPARED:
        text = f"{family}: packed rows equal rows alone, token by token"
        if model.mixers:
            text += f"; {MIXED}, with {costs:.1f} times the tokens"
        notice(text)


def _slowest(
    found: list[Verdict], asked: AttentionPath, because: str | None
) -> tuple[AttentionPath, str | None]:
    """The path that all findings and the setting allow, with its reason."""
    paths: list[tuple[AttentionPath, str | None]] = [(asked, because)]
    paths += [(verdict.path, verdict.reason) for verdict in found]
    return max(paths, key=lambda part: _ORDER.index(part[0]))


_ORDER: tuple[AttentionPath, ...] = ("packed", "padded", "alone")


def _on_all_ranks(path: AttentionPath, device: torch.device) -> AttentionPath:
    """One rank that falls back must not do so alone."""
    worst = torch.tensor([_ORDER.index(path)], dtype=torch.int32, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return _ORDER[int(worst.item())]


@torch.no_grad()
def _examined(model: OrpoModel, device: torch.device, tolerance: Tolerance) -> Verdict:
    """Compare packed rows and padded rows with rows alone, token by token.

    Args:
        model: in evaluation mode; its path is changed.
        device: of its weights.
        tolerance: of the differences.
    """
    batch = Microbatch(_row(model.causal_lm, _LONG), device)
    with refusing(model.causal_lm):
        alone = _hidden(model, "alone", batch)
        of_padded = _difference(_hidden(model, "padded", batch), alone, tolerance)
    if not of_padded <= tolerance.padded:
        changed = f"padding changes what it computes (by {of_padded:.2g} of a hidden state)"
        return Verdict(model.head, "alone", changed)
    reason = unpackable(model.causal_lm)
    if reason is None:
        try:
            packed = _hidden(model, "packed", batch)
        except (PackingNotSupportedError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
        else:
            of_packed = _difference(packed, alone, tolerance)
            if not of_packed <= max(tolerance.packed, 2 * of_padded):
                reason = _why(model, device, of_packed, tolerance)
    return Verdict(model.head, "packed" if reason is None else "padded", reason)


def _try_training(model: OrpoModel, path: AttentionPath, device: torch.device) -> None:
    """Run one pass in training mode, in which some models compute otherwise or not at all.

    Raises:
        UnsupportedModelError: where they raise an error.
    """
    batch = Microbatch(_row(model.causal_lm, _SHORT), device)
    model.use_attention(path)
    model.train()
    with refusing(model.causal_lm):
        model.decode(batch)[0].sum().backward()
    model.zero_grad(set_to_none=True)
    model.eval()


@torch.no_grad()
def _check_router(model: OrpoModel, path: AttentionPath, device: torch.device) -> None:
    """Compare the router loss of a small copy with its own, of padded rows; some have none.

    Raises:
        UnsupportedModelError: where they differ.
    """
    batch = Microbatch(_row(model.causal_lm, _PAIRS), device)
    rows = pad_rows(batch)
    with refusing(model.causal_lm):
        model.use_attention("padded")
        result = model.causal_lm(
            input_ids=rows.token_ids,
            attention_mask=rows.attention_mask,
            use_cache=False,
            output_router_logits=True,
        )
        own = getattr(result, "aux_loss", None)
        if own is None:
            return
        model.use_attention(path)
        router_logits = model.decode(batch)[1]
        ours = router_loss(router_logits, batch.multiplicity, model.experts_per_token)
        if not abs(float(own - ours)) <= _ROUTER * abs(float(own)):
            raise UnsupportedModelError(
                f"its router loss is {float(own):.4g} where the load-balancing loss is "
                f"{float(ours):.4g}: set output_router_logits=false in its config.json"
            )


def _why(model: OrpoModel, device: torch.device, difference: float, tolerance: Tolerance) -> str:
    """What a difference between packed rows and rows alone comes from, as far as short rows say."""
    text = f"packed rows change what it computes (by {difference:.2g} of a hidden state)"
    short = Microbatch(_row(model.causal_lm, _SHORT), device)
    alone, packed = (_hidden(model, path, short) for path in ("alone", "packed"))
    if _difference(packed, alone, tolerance) <= tolerance.packed:
        return f"{text} beyond {WINDOW} tokens: a window that only its own attention masks have"
    return text


def unpackable(causal_lm: PreTrainedModel) -> str | None:
    """Why no numbers could show that a model's layers keep to a segment; None if they might.

    Layers with a state do where a convolution shows which module it is in, see `mixers`.
    """
    layers = decoder_layers(causal_lm)
    with_mixers = [bool(find_mixers(layer)) for layer in layers]
    has_mixers = any(with_mixers)
    if getattr(causal_lm, "_is_stateful", False) and not has_mixers:
        return "its layers carry a recurrent state from token to token"
    kinds = getattr(causal_lm.config.get_text_config(), "layer_types", None) or ()
    if len(with_mixers) != len(kinds):  # which layer a kind is of is not known
        with_mixers = [False] * len(kinds)
    for kind, has_mixer in zip(kinds, with_mixers, strict=True):
        if any(part in kind for part in _KINDS) and not (
            has_mixer and any(part in kind for part in _WITH_STATE)
        ):
            return f"it has layers of the kind {kind}"
    for layer in layers:
        inside = {id(child) for mixer in find_mixers(layer) for child in mixer.children()}
        if any(is_convolution(m) and id(m) not in inside for m in layer.modules()):
            return "its convolutions reach over several tokens"
    if not has_mixers and not getattr(causal_lm, "_supports_attention_backend", False):
        return "it does not use transformers' attention interface"
    return None


def _hidden(model: OrpoModel, path: AttentionPath, batch: Microbatch) -> Tensor:
    model.use_attention(path)
    return model.decode(batch)[0].double()


def _difference(one: Tensor, other: Tensor, tolerance: Tolerance) -> float:
    """The difference of tokens' hidden states, over the states' norms."""
    apart = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)
    return float(apart.quantile(tolerance.quantile).item())


def _row(causal_lm: PreTrainedModel, shapes: tuple[tuple[int, tuple[int, ...]], ...]) -> PackedRow:
    """A packed row of random tokens; the same on every rank."""
    n_tokens = sum(prompt + sum(completions) for prompt, completions in shapes)
    ids = iter(probe_ids(causal_lm, (n_tokens,), seed=2).numpy().astype(np.int32))

    def some(length: int) -> np.ndarray:
        return np.array([next(ids) for _ in range(length)], dtype=np.int32)

    groups = [
        PromptGroup(some(prompt), tuple(map(some, completions)), ((0, 1),), (RowId(0, index),))
        for index, (prompt, completions) in enumerate(shapes)
    ]
    return pack(groups, chunk_tokens=64, prompt_counts=True)


def _times_the_tokens(sample: PackedRow) -> float:
    """Tokens of padded rows, over those of the packed row."""
    lengths = [span.prompt + length for span in sample.spans for length in span.completions]
    return len(lengths) * max(lengths, default=0) / max(1, len(sample.token_ids))
