"""The chunked LM head against full logits: value and every gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_ray.dataset.packing import pack
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.objective.head import Chunk, LossScale, Part, Targets, orpo_head
from orpo_ray.objective.objectives import orpo
from orpo_ray.objective.odds_ratio import log_sigmoid_log_odds
from orpo_ray.preference.groups import PromptGroup, RowId

WIDTH, VOCABULARY = 8, 13
SCALE = LossScale(nll=0.11, pair=0.25, objective=orpo(0.7))

# Two pairs in two chunks. Chunk 1: position 0 predicts a prompt token; position 1 the first token
# of completions 0 and 1; position 2 completion 0's second. Chunk 2: positions 4 and 5, one
# completion each. Completion 4 stands for "none".
TARGETS = Targets(
    positions=torch.tensor([0, 1, 2, 4, 5]),
    predicted_at=torch.tensor([0, 1, 2, 1, 3, 4]),
    token_ids=torch.tensor([3, 5, 7, 2, 12, 0]),
    nll_weights=torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, 0.0]),
    completion=torch.tensor([4, 0, 0, 1, 2, 3]),
    completion_lengths=torch.tensor([2.0, 1.0, 1.0, 1.0]),
    chosen=torch.tensor([0, 2]),
    rejected=torch.tensor([1, 3]),
    chunks=(
        Chunk(positions=(0, 3), targets=(0, 4), completions=(0, 2), pairs=(0, 1)),
        Chunk(positions=(3, 5), targets=(4, 6), completions=(2, 4), pairs=(1, 2)),
    ),
)
WHOLE = replace(
    TARGETS,
    chunks=(Chunk(positions=(0, 5), targets=(0, 6), completions=(0, 4), pairs=(0, 2)),),
)


def in_parts(targets: Targets, size: int) -> Targets:
    """The same with so many positions projected at once."""
    chunks = []
    for chunk in targets.chunks:
        first, last = chunk.positions
        at = targets.predicted_at[slice(*chunk.targets)] - first
        starts = range(0, last - first, size)
        ends = [min(start + size, last - first) for start in starts]
        parts = [
            Part((start, end), ((start <= at) & (at < end)).nonzero()[:, 0])
            for start, end in zip(starts, ends, strict=True)
        ]
        chunks.append(replace(chunk, parts=tuple(parts)))
    return replace(targets, chunks=tuple(chunks))


def inputs(dtype, bias):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    tensors = [hidden, weight]
    if bias:
        tensors.append(torch.randn(VOCABULARY, generator=generator, dtype=torch.float64))
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def plain_loss(hidden, weight, bias, softcap, logit_scale=1.0):
    """The same loss from full logits in float64, by autograd."""
    logits = functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits, dim=-1)
    at = TARGETS.positions[TARGETS.predicted_at]
    scores = log_probs[at, TARGETS.token_ids]
    nll = -(TARGETS.nll_weights.double() * scores).sum()
    means = torch.stack([scores[TARGETS.completion == index].mean() for index in range(4)])
    ratio = log_sigmoid_log_odds(means[TARGETS.chosen], means[TARGETS.rejected]).sum()
    return SCALE.nll * nll - SCALE.pair * 0.7 * ratio, nll, means


@pytest.mark.parametrize(
    "targets",
    [TARGETS, WHOLE, in_parts(WHOLE, 2), in_parts(TARGETS, 1)],
    ids=["two chunks", "one chunk", "one in parts", "two in parts"],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("logit_scale", [1.0, 0.3])
def test_value_and_gradients_equal_full_logits(targets, bias, softcap, logit_scale):
    expected_inputs = inputs(torch.float64, bias)
    padded = [*expected_inputs, None][:3]
    loss, nll, means = plain_loss(*padded, softcap, logit_scale)
    loss.backward()
    tensors = inputs(torch.float64, bias)
    output = orpo_head(*[*tensors, None][:3], targets, SCALE, softcap, logit_scale)
    (3 * output.loss).backward()
    torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.nll_sum, nll.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.completion_log_probs, means.detach(), rtol=1e-12, atol=0)
    for tensor, expected in zip(tensors, expected_inputs, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * expected.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_rounds_and_no_more(dtype, tolerance):
    """fp32 has 24 bits and bf16 8: 1e-7 and 4e-3 a number, some tens of them in a sum."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs(dtype, bias=False)]
    loss, _, _ = plain_loss(*exact, None, None)
    loss.backward()
    tensors = inputs(dtype, bias=False)
    output = orpo_head(*tensors, None, TARGETS, SCALE)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    for tensor, expected in zip(tensors, exact, strict=True):
        largest = expected.grad.abs().max().item()
        torch.testing.assert_close(
            tensor.grad.double(), expected.grad, rtol=tolerance, atol=tolerance * largest
        )


class Largest(TorchDispatchMode):
    """Notes how many rows the largest tensor over the vocabulary has."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("n_answer", [50, 400])
def test_logits_are_of_as_many_positions_as_allowed_however_long_an_answer_is(n_answer):
    """A pair is passed over twice where it is longer; the weight itself has `WIDTH` columns."""
    rng = np.random.default_rng(0)
    answers = tuple(rng.integers(0, VOCABULARY, n) for n in (n_answer, n_answer // 2))
    group = PromptGroup(rng.integers(0, VOCABULARY, 5), answers, ((0, 1),), (RowId(0, 0),))
    row = pack([group], chunk_tokens=20, prompt_counts=True)
    targets = Microbatch(row, torch.device("cpu")).targets
    hidden = torch.randn(len(row.token_ids), WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    with Largest() as largest:
        orpo_head(hidden, weight, None, targets, SCALE, 2.5).loss.backward()
    assert 10 < largest.rows <= 20
    assert hidden.grad.isfinite().all()


def test_without_gradients_no_buffer_of_the_weight_is_made():
    tensors = inputs(torch.float32, bias=False)
    with torch.no_grad():
        output = orpo_head(*tensors, None, TARGETS, SCALE)
    assert not output.loss.requires_grad
    with_gradients = orpo_head(*tensors, None, TARGETS, SCALE)
    torch.testing.assert_close(output.loss, with_gradients.loss.detach(), rtol=0, atol=0)
