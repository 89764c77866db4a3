"""LM head and ORPO loss fused over chunks of positions; full logits are never materialised."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from orpo_ray.objective.objectives import Answers, Objective


@dataclass(frozen=True)
class Part:
    """Positions of a long pair whose logits are computed at once.

    Args:
        positions: their (start, stop) range in the chunk.
        targets: what they predict, as indices into the targets of the chunk.
    """

    positions: tuple[int, int]
    targets: Int[Tensor, " targets"]


@dataclass(frozen=True)
class Chunk:
    """Positions whose loss is computed at once; contains whole pairs only.

    Args:
        positions: (start, stop) range in the arrays of `Targets`, as are the next three.
        targets: see there.
        completions: see there.
        pairs: see there.
        parts: of a chunk whose logits are too many to be computed at once.
    """

    positions: tuple[int, int]
    targets: tuple[int, int]
    completions: tuple[int, int]
    pairs: tuple[int, int]
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Targets:
    """The tokens that a packed row predicts, and the positions that predict them.

    A position may have several targets: the last one of a prompt predicts the first token of every
    completion.

    Args:
        positions: positions of the row that have a target, ordered by chunk.
        predicted_at: where each target is predicted, an index into `positions`.
        token_ids: token id of each target.
        nll_weights: number of pairs whose NLL includes the target.
        completion: index of the target's completion; the number of completions for prompt tokens.
        completion_lengths: number of targets of each completion, at least 1.
        chosen: index of the chosen completion of each pair.
        rejected: index of the rejected completion of each pair.
        chunks: ranges whose loss is computed at once; they cover all arrays in order.
    """

    positions: Int[Tensor, " positions"]
    predicted_at: Int[Tensor, " targets"]
    token_ids: Int[Tensor, " targets"]
    nll_weights: Float[Tensor, " targets"]
    completion: Int[Tensor, " targets"]
    completion_lengths: Float[Tensor, " completions"]
    chosen: Int[Tensor, " pairs"]
    rejected: Int[Tensor, " pairs"]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class LossScale:
    """Factors that turn the sums over a packed row into its share of the global batch's loss.

    Args:
        nll: 1 / number of NLL tokens of the global batch; times the number of workers where
            gradients are averaged over them.
        pair: 1 / number of pairs of the global batch; times the same.
        objective: what is minimised.
    """

    nll: float
    pair: float
    objective: Objective


@dataclass(frozen=True)
class HeadOutput:
    """Loss of a packed row, scaled by `LossScale`, and unscaled values without gradient.

    Args:
        loss: scaled loss; backward may run once.
        nll_sum: NLL weighted by `nll_weights` and summed, in nats.
        term_sum: the objective's terms of all pairs, summed; without the weight in front of them.
        completion_log_probs: mean log-probability per token of each completion, in nats.
    """

    loss: Float[Tensor, ""]
    nll_sum: Float[Tensor, ""]
    term_sum: Float[Tensor, ""]
    completion_log_probs: Float[Tensor, " completions"]


def orpo_head(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Targets,
    scale: LossScale,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> HeadOutput:
    """Compute the loss of a packed row from its last hidden states.

    Only positions that have a target are projected. The gradient is computed in the forward pass,
    chunk by chunk while the logits exist, so backward may run only once. Log-probabilities are
    computed and summed in fp32 (fp64 for fp64 inputs).

    Args:
        hidden: last hidden states of a packed row.
        weight: weight of the LM head, in the dtype of `hidden`.
        bias: bias of the LM head, if it has one.
        targets: predictions of the row.
        scale: factors that the returned loss is multiplied by.
        softcap: logit soft-capping, `softcap * tanh(logits / softcap)` (Gemma 2).
        logit_scale: factor of the logits, before soft-capping (Granite, Cohere).
    """
    loss, nll_sum, term_sum, log_probs = _OrpoHead.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, scale, softcap, logit_scale
    )
    return HeadOutput(loss, nll_sum, term_sum, log_probs)


class _OrpoHead(torch.autograd.Function):
    """Loss and gradient of a packed row, both computed in one pass over the chunks."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, logit_scale):  # type: ignore[no-untyped-def]
        chunked = _ChunkedPass(hidden, weight, bias, targets, scale, softcap, logit_scale)
        chunked.needs_grad = any(ctx.needs_input_grad)
        chunked.weight_is_trained = ctx.needs_input_grad[1]
        for chunk in targets.chunks:
            chunked.run(chunk)
        ctx.save_for_backward(chunked.grad_hidden, chunked.grad_weight, chunked.grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        unscaled = chunked.nll_sum, chunked.term_sum, chunked.completion_log_probs
        ctx.mark_non_differentiable(*unscaled)
        ctx.set_materialize_grads(False)  # their gradients would be zeros, filled in anew each time
        return chunked.loss, *unscaled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            (grad_hidden * grad_loss).to(hidden_dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(weight_dtype),
            *(None,) * 4,
        )


class _ChunkedPass:
    """Accumulators of one pass over the chunks of a packed row."""

    def __init__(  # same arguments as orpo_head
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        scale: LossScale,
        softcap: float | None,
        logit_scale: float,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.targets, self.scale, self.softcap = targets, scale, softcap
        self.logit_scale = logit_scale
        self.needs_grad = self.weight_is_trained = False
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.loss = hidden.new_zeros((), dtype=self.dtype)
        self.nll_sum = hidden.new_zeros((), dtype=self.dtype)
        self.term_sum = hidden.new_zeros((), dtype=self.dtype)
        self.completion_log_probs = torch.zeros_like(targets.completion_lengths, dtype=self.dtype)
        self._grads: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def _gradients(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradient accumulators, allocated on first use, so that evaluation allocates none."""
        if self._grads is None:
            weight = bias = None
            if self.weight_is_trained:
                weight = torch.zeros_like(self.weight, dtype=self.dtype)
                bias = None if self.bias is None else torch.zeros_like(self.bias, dtype=self.dtype)
            self._grads = (torch.zeros_like(self.hidden), weight, bias)
        return self._grads

    @property
    def grad_hidden(self) -> Tensor | None:
        return self._gradients()[0] if self.needs_grad else None

    @property
    def grad_weight(self) -> Tensor | None:
        return self._gradients()[1] if self.needs_grad else None

    @property
    def grad_bias(self) -> Tensor | None:
        return self._gradients()[2] if self.needs_grad else None

    def run(self, chunk: Chunk) -> None:
        """Project one chunk, and add its loss and, if needed, its gradient.

        The gradient needs the log-probabilities of whole answers: a chunk in parts is projected
        for those first, and then again.
        """
        first, last = chunk.positions
        at = self.targets.predicted_at[slice(*chunk.targets)] - first
        token_ids = self.targets.token_ids[slice(*chunk.targets)]
        if not chunk.parts:
            whole = self._project(range(first, last), at, token_ids)
            slopes = self._add_loss(chunk, whole.log_probs)
            if self.needs_grad:
                self._add_gradient(whole, slopes)
            return

        def project(part: Part) -> _Projection:
            start, stop = part.positions
            own = at[part.targets] - start
            return self._project(range(first + start, first + stop), own, token_ids[part.targets])

        log_probs = torch.zeros_like(at, dtype=self.dtype)
        for part in chunk.parts:
            log_probs[part.targets] = project(part).log_probs
        slopes = self._add_loss(chunk, log_probs)
        if self.needs_grad:
            for part in chunk.parts:
                self._add_gradient(project(part), slopes[part.targets])

    def _project(self, positions: range, at: Tensor, token_ids: Tensor) -> "_Projection":
        """Compute the logits of some positions and the log-probabilities of their targets."""
        where = self.targets.positions[positions.start : positions.stop]
        hidden = self.hidden[where]
        logits = functional.linear(hidden, self.weight, self.bias).to(self.dtype)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        target_logits = logits[at, token_ids]
        capped = logits / self.softcap if self.softcap is not None and self.needs_grad else None
        # The exponentials are used by log-sum-exp and by the gradient; computed once, in place.
        largest = logits.amax(dim=-1)
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = exponentials.sum(dim=-1)
        log_probs = target_logits - (largest + total.log())[at]
        return _Projection(where, hidden, at, token_ids, log_probs, exponentials, total, capped)

    def _add_loss(self, chunk: Chunk, token_log_probs: Tensor) -> Tensor:
        """Add the chunk's loss; return its derivative by the log-probability of each target."""
        targets, scale = self.targets, self.scale
        first, last = chunk.completions
        lengths = targets.completion_lengths[first:last]
        # Prompt targets have an index past the last completion: they go to an extra, unused slot.
        slot = (targets.completion[slice(*chunk.targets)] - first).clamp(max=last - first)
        weights = targets.nll_weights[slice(*chunk.targets)].to(self.dtype)
        sums = token_log_probs.new_zeros(last - first + 1).index_add_(0, slot, token_log_probs)
        means = sums[:-1] / lengths
        nll, nll_scale = -(weights * token_log_probs).sum(), scale.nll * scale.objective.nll_weight
        self.nll_sum += nll
        self.completion_log_probs[first:last] = means
        if scale.objective.terms is None:
            self.loss += nll_scale * nll
            return weights * -nll_scale
        of_pairs = slice(*chunk.pairs)
        pairs = torch.stack([targets.chosen[of_pairs], targets.rejected[of_pairs]]) - first
        terms = scale.objective.terms(Answers(means[pairs], lengths[pairs]))
        pair_scale, term_sum = scale.pair * scale.objective.pair_weight, terms.values.sum()
        self.loss += nll_scale * nll - pair_scale * term_sum
        self.term_sum += term_sum
        slopes = torch.cat([terms.chosen_slopes, terms.rejected_slopes])
        by_completion = torch.zeros_like(sums).index_add_(0, pairs.view(-1), slopes)
        by_completion[:-1].div_(lengths).mul_(-pair_scale)
        return by_completion[slot].sub_(weights, alpha=nll_scale)

    def _add_gradient(self, part: "_Projection", slopes: Tensor) -> None:
        """Backpropagate to hidden states, weight and bias; consumes the exponentials.

        Args:
            part: what was projected.
            slopes: derivative of the loss by the log-probability of each of its targets.
        """
        # d loss / d logits = sum over targets of slope * (one-hot - softmax).
        position_slopes = torch.zeros_like(part.total).index_add_(0, part.at, slopes)
        grad_logits = part.exponentials.mul_((-position_slopes / part.total)[:, None])
        index = part.at * grad_logits.shape[1] + part.token_ids
        grad_logits.view(-1).scatter_add_(0, index, slopes)
        if part.capped is not None:
            grad_logits.mul_(1 - part.capped.square_())
        if self.logit_scale != 1:
            grad_logits.mul_(self.logit_scale)
        grad_hidden, grad_weight, grad_bias = self._gradients()
        if grad_bias is not None:
            grad_bias += grad_logits.sum(dim=0)
        narrow: Any = grad_logits.to(self.weight.dtype)
        grad_hidden[part.where] = narrow @ self.weight
        if grad_weight is None:
            return
        if narrow.dtype == grad_weight.dtype:
            grad_weight.addmm_(narrow.T, part.hidden)
        else:
            grad_weight += narrow.T @ part.hidden


@dataclass
class _Projection:
    """Logits of some positions, as exponentials.

    Args:
        where: the positions in the row.
        hidden: their hidden states.
        at: the position that predicts each target, an index into `where`.
        token_ids: of the targets.
        log_probs: of the targets.
        exponentials: (positions, vocab) of each logit less the position's largest.
        total: their sum over the vocabulary.
        capped: (positions, vocab) the hyperbolic tangent in soft-capped logits, for the gradient.
    """

    where: Tensor
    hidden: Tensor
    at: Tensor
    token_ids: Tensor
    log_probs: Tensor
    exponentials: Tensor
    total: Tensor
    capped: Tensor | None
