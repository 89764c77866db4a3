"""A decoder with the ORPO objective as its output: the module that a training worker shards."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from orpo_ray.models.attention.interface import PACKED_ATTENTION, prepare
from orpo_ray.models.attention.kernels import Kernel, sliding_windows
from orpo_ray.models.layer_config import setting
from orpo_ray.models.lm_head import LMHead, last_hidden_states
from orpo_ray.models.microbatch import Microbatch, PaddedRows, pad_rows
from orpo_ray.models.mixed_precision import MixedPrecision
from orpo_ray.models.mixers import Mixers
from orpo_ray.models.small_copy import decoder_layers
from orpo_ray.objective.head import HeadOutput, LossScale, orpo_head
from orpo_ray.objective.metrics import N_SUMS, batch_sums
from orpo_ray.objective.router import router_loss

# alone: every completion with its prompt by itself, where padding changes what a model computes.
AttentionPath = Literal["packed", "padded", "alone"]

ASKED = "attention=padded"  # why rows are padded where a setting says so


class OrpoOutput(NamedTuple):
    """Output of a forward pass: the scaled loss, sums for metrics, and log-probabilities per pair.

    A named tuple, since every version of FSDP finds the tensors with gradients in it.

    Args:
        loss: scaled by the divisors of the global batch; carries the gradient.
        sums: of `batch_sums`, unscaled.
        chosen_log_probs: mean log-probability per token of each chosen answer, in nats.
        rejected_log_probs: likewise of each rejected answer, or of the chosen one where the pair
            has no other.
    """

    loss: Float[Tensor, ""]
    sums: Float[Tensor, "12"]
    chosen_log_probs: Float[Tensor, " pairs"]
    rejected_log_probs: Float[Tensor, " pairs"]


class OrpoModel(nn.Module):
    """A causal language model whose forward pass is the loss of a packed row.

    The LM head and the loss are computed in `forward` of the FSDP root: the head's weights are
    unsharded there, and full logits never exist.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        attention: AttentionPath,
        router_coef: float | None,
        kernel: Kernel = "sdpa",
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.kernel = kernel
        self.has_liger = self.is_compiled = False
        self.mixed_precision: MixedPrecision | None = None  # on one rank
        config = causal_lm.config.get_text_config()
        self.windows = sliding_windows(causal_lm.config)
        self.mixers = Mixers(decoder_layers(causal_lm))
        # Until the model's own head is compared, see `packing_check`.
        self.head = LMHead(
            softcap=setting(config, "final_logit_softcapping"),
            has_layers=causal_lm.base_model is causal_lm,
        )
        self.padded_because: str | None = None
        of_experts = setting(config, "ffn_config")  # DBRX's
        self.experts_per_token: int = (
            setting(config, "num_experts_per_tok") or setting(of_experts, "moe_top_k") or 0
        )
        # As in transformers and TRL, the router loss is on when the model's own config says so.
        self.has_router: bool = bool(setting(config, "output_router_logits"))
        own_coefs = (
            *(setting(config, name) for name in ("router_aux_loss_coef", "aux_loss_coef")),
            setting(of_experts, "moe_loss_weight"),
        )
        own_coef = next((coef for coef in own_coefs if coef is not None), 0.0) * self.has_router
        self.router_coef = own_coef if router_coef is None else router_coef * self.has_router
        self.use_attention(attention)

    def use_attention(self, attention: AttentionPath) -> None:
        """Choose between packed and padded rows, and rows alone, which compute the same."""
        self.attention = attention
        packed, implementation = attention == "packed", PACKED_ATTENTION
        if not packed:
            # SDPA has no logit soft-capping.
            config = self.causal_lm.config.get_text_config()
            capped = setting(config, "attn_logit_softcapping") is not None
            sdpa = getattr(self.causal_lm, "_supports_sdpa", False) and not capped
            implementation = "sdpa" if sdpa else "eager"
        self.attention_text = f"{attention} ({self.kernel if packed else implementation})"
        self.causal_lm.set_attn_implementation(implementation)
        self.mixers.by_sequence(packed)

    def forward(self, batch: Microbatch, scale: LossScale) -> OrpoOutput:
        """The loss of one packed row, divided by the global batch's counts."""
        hidden, router_logits = self.decode(batch)
        matrix = self.causal_lm.get_output_embeddings()
        output = orpo_head(
            hidden,
            matrix.weight,
            getattr(matrix, "bias", None),
            batch.targets,
            scale,
            self.head.softcap,
            self.head.scale,
        )
        return self._finish(output, router_logits, batch, scale)

    def decode(self, batch: Microbatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states (tokens, width) and each layer's router logits.

        The hidden states are those that the head's matrix is applied to.
        """
        if self.attention == "packed":
            prepare(batch.layout, self.kernel, self.windows)
            self.mixers.rows = pad_rows(batch) if self.mixers else None
            hidden, router_logits = self._run(
                input_ids=batch.token_ids[None],
                position_ids=batch.position_ids[None],
                packed_layout=batch.layout,
                packed_kernel=self.kernel,
            )
            return hidden[0], router_logits
        padded = pad_rows(batch)
        if self.attention == "alone":
            return self._decode_alone(padded)
        hidden, router_logits = self._run(
            input_ids=padded.token_ids, attention_mask=padded.attention_mask
        )
        by_token = tuple(logits[padded.where] for logits in router_logits)
        return hidden.flatten(0, 1)[padded.where], by_token

    def _decode_alone(self, padded: PaddedRows) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Every row by itself, without padding."""
        width = padded.token_ids.shape[1]
        parts = []
        for ids, length in zip(padded.token_ids, padded.lengths, strict=True):
            hidden, router_logits = self._run(input_ids=ids[None, :length])
            rest = (0, 0, 0, width - length)
            parts.append([functional.pad(part, rest) for part in (hidden[0], *router_logits)])
        hidden, *by_layer = (torch.cat(part)[padded.where] for part in zip(*parts, strict=True))
        return hidden, tuple(by_layer)

    def _run(self, **inputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        options = {"output_router_logits": True} if self.has_router else {}
        hidden, result = last_hidden_states(
            self.causal_lm, self.head.has_layers, {**inputs, "use_cache": False, **options}
        )
        return hidden, tuple(result.router_logits) if self.has_router else ()

    def _finish(
        self,
        output: HeadOutput,
        router_logits: tuple[Tensor, ...],
        batch: Microbatch,
        scale: LossScale,
    ) -> OrpoOutput:
        """Add the router loss and sum up the metrics."""
        chosen = output.completion_log_probs[batch.targets.chosen]
        rejected = output.completion_log_probs[batch.targets.rejected]
        loss, aux = output.loss, None
        if router_logits and batch.n_pairs:
            aux = router_loss(router_logits, batch.multiplicity, self.experts_per_token)
            loss = loss + self.router_coef * aux * (batch.n_pairs * scale.pair)
        if batch.n_pairs:
            both = torch.stack([chosen, rejected])
            if batch.compared is not None:
                both = both[:, batch.compared]
            sums = batch_sums(output, batch.n_nll_tokens, both, batch.n_pairs, aux)
        else:
            sums = loss.new_zeros(N_SUMS, dtype=torch.float64)
        return OrpoOutput(loss, sums, chosen, rejected)
