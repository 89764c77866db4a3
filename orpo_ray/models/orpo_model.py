"""A decoder with the ORPO objective as its output: the module that a training worker shards."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_ray.models.attention.interface import PACKED_ATTENTION, prepare
from orpo_ray.models.attention.kernels import Kernel, sliding_windows
from orpo_ray.models.microbatch import Microbatch, pad_rows
from orpo_ray.objective.head import HeadOutput, LossScale, orpo_head
from orpo_ray.objective.metrics import N_SUMS, batch_sums
from orpo_ray.objective.router import router_loss

AttentionPath = Literal["packed", "padded"]


class OrpoOutput(NamedTuple):
    """Output of a forward pass: the scaled loss, sums for metrics, and log-probabilities per pair.

    A named tuple, since every version of FSDP finds the tensors with gradients in it.

    Args:
        loss: scaled by the divisors of the global batch; carries the gradient.
        sums: of `batch_sums`, unscaled.
        chosen_log_probs: mean log-probability per token of each chosen answer, in nats.
        rejected_log_probs: likewise of each rejected answer.
    """

    loss: Float[Tensor, ""]
    sums: Float[Tensor, "10"]
    chosen_log_probs: Float[Tensor, " pairs"]
    rejected_log_probs: Float[Tensor, " pairs"]


class OrpoModel(nn.Module):
    """A causal language model whose forward pass is the ORPO loss of a packed row.

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
        self.has_liger = False
        config = causal_lm.config.get_text_config()
        self.windows = sliding_windows(causal_lm.config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.experts_per_token: int = getattr(config, "num_experts_per_tok", 0) or 0
        # As in transformers and TRL, the router loss is on when the model's own config says so.
        self.has_router: bool = bool(getattr(config, "output_router_logits", False))
        own_coef: float = getattr(config, "router_aux_loss_coef", 0.0) if self.has_router else 0.0
        self.router_coef = own_coef if router_coef is None else router_coef * self.has_router
        self.use_attention(attention)

    def use_attention(self, attention: AttentionPath) -> None:
        """Choose between packed and padded rows, which compute the same."""
        self.attention = attention
        packed, implementation = attention == "packed", PACKED_ATTENTION
        if not packed:
            # SDPA has no logit soft-capping.
            config = self.causal_lm.config.get_text_config()
            capped = getattr(config, "attn_logit_softcapping", None) is not None
            sdpa = getattr(self.causal_lm, "_supports_sdpa", False) and not capped
            implementation = "sdpa" if sdpa else "eager"
        self.attention_text = f"{attention} ({self.kernel if packed else implementation})"
        self.causal_lm.set_attn_implementation(implementation)

    def forward(self, batch: Microbatch, scale: LossScale) -> OrpoOutput:
        """The ORPO loss of one packed row, divided by the global batch's counts."""
        hidden, router_logits = self._decode(batch)
        head = self.causal_lm.get_output_embeddings()
        output = orpo_head(hidden, head.weight, head.bias, batch.targets, scale, self.softcap)
        return self._finish(output, router_logits, batch, scale)

    def _decode(self, batch: Microbatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states (tokens, width) and each layer's router logits."""
        options = {"output_router_logits": True} if self.has_router else {}
        decoder = self.causal_lm.base_model
        if self.attention == "packed":
            prepare(batch.layout, self.kernel, self.windows)
            result = decoder(
                input_ids=batch.token_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                packed_layout=batch.layout,
                packed_kernel=self.kernel,
                **options,
            )
            hidden = result.last_hidden_state[0]
            router_logits = tuple(result.router_logits) if self.has_router else ()
            return hidden, router_logits
        padded = pad_rows(batch)
        result = decoder(
            input_ids=padded.token_ids,
            attention_mask=padded.attention_mask,
            use_cache=False,
            **options,
        )
        hidden = result.last_hidden_state.flatten(0, 1)[padded.where]
        router_logits = tuple(result.router_logits) if self.has_router else ()
        return hidden, tuple(logits[padded.where] for logits in router_logits)

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
            sums = batch_sums(output.nll_sum, batch.n_nll_tokens, chosen, rejected, aux)
        else:
            sums = loss.new_zeros(N_SUMS, dtype=torch.float64)
        return OrpoOutput(loss, sums, chosen, rejected)
