"""The packed row against the padded float64 reference: value, gradient, every metric."""

import pytest
import torch

from orpo_ray.dataset.packing import pack
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.metrics import N_SUMS, LossWeights, metrics_from_sums
from orpo_ray.objective.objectives import orpo
from tests.reference.models import MIXTURES, odd_groups, tiny_model
from tests.reference.padded import Reference, reference_orpo

FAMILIES = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt-neox",
    "gpt2",
    *MIXTURES,
)
BETA = 0.3
ROUTER_COEF = 0.05
# fp32 against fp64: about 1e-7 relative a step, over two layers and sums of a few hundred terms.
TOLERANCE = 1e-5


def reference(name: str, nll_scope: str) -> tuple[Reference, dict[str, torch.Tensor]]:
    """The reference's figures and gradients, by parameter name."""
    # Gemma 2's capped scores need eager attention, which is NaN on padding in fp64: its fp32
    # softmax turns the fp64 minimum of the mask into minus infinity, on whole rows of padding.
    model = tiny_model(name, torch.float32 if name == "gemma2" else torch.float64)
    coef = ROUTER_COEF if name in MIXTURES else 0.0
    result = reference_orpo(model, odd_groups(1), BETA, nll_scope, coef)
    result.loss.backward()
    return result, {n: p.grad for n, p in model.named_parameters()}


def run(name, nll_scope="all", attention="packed", chunk_tokens=16, n_microbatches=1):
    """The product's figures and gradients, its groups spread over several microbatches."""
    causal_lm = tiny_model(name, torch.float32)
    model = OrpoModel(causal_lm, attention, ROUTER_COEF)
    groups = odd_groups(1)
    rows = [
        pack(groups[start::n_microbatches], chunk_tokens, nll_scope == "all")
        for start in range(n_microbatches)
    ]
    scale = LossScale(
        nll=1 / sum(row.n_nll_tokens for row in rows),
        pair=1 / sum(row.n_pairs for row in rows),
        objective=orpo(BETA),
    )
    sums = torch.zeros(N_SUMS, dtype=torch.float64)
    total = 0.0
    for row in rows:
        output = model(Microbatch(row, torch.device("cpu")), scale)
        output.loss.backward()
        total += output.loss.item()
        sums += output.sums
    metrics = metrics_from_sums(sums.tolist(), LossWeights(orpo(BETA), model.router_coef))
    return total, metrics, {n: p.grad for n, p in causal_lm.named_parameters()}


def assert_same(result, expected) -> None:
    loss, metrics, gradients = result
    figures, expected_gradients = expected
    assert loss == pytest.approx(figures.loss.item(), rel=TOLERANCE)
    assert metrics == pytest.approx(figures.metrics, rel=TOLERANCE, abs=TOLERANCE)
    largest = max(g.abs().max().item() for g in expected_gradients.values() if g is not None)
    for name, gradient in expected_gradients.items():
        if gradient is None:  # an expert that no token was sent to
            continue
        torch.testing.assert_close(
            gradients[name].double(),
            gradient.double(),
            rtol=1e-4,
            atol=TOLERANCE * largest,
            msg=name,
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_the_reference(name):
    assert_same(run(name), reference(name, "all"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_padded_rows_equal_the_reference(name):
    """The way of models that cannot attend over a packed row."""
    assert_same(run(name, attention="padded"), reference(name, "all"))


def test_nll_over_the_answer_only():
    assert_same(run("llama", nll_scope="completion"), reference("llama", "completion"))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 4096])
def test_chunks_of_the_head_change_nothing(chunk_tokens):
    assert_same(run("llama", chunk_tokens=chunk_tokens), reference("llama", "all"))


@pytest.mark.parametrize("n_microbatches", [2, 4, 8])
def test_accumulation_changes_nothing(n_microbatches):
    """1x8 = 2x4 = 4x2 = 8x1 groups: sums first, one division by the global counts."""
    assert_same(run("llama", n_microbatches=n_microbatches), reference("llama", "all"))


def test_a_ranking_equals_its_pairs_apart():
    """A group's figures are those of its pairs as groups of their own."""
    from dataclasses import replace

    model = OrpoModel(tiny_model("llama", torch.float64), "packed", None)
    groups = odd_groups(2)
    apart = [
        replace(
            group,
            completions=(group.completions[chosen], group.completions[rejected]),
            pairs=((0, 1),),
            row_ids=(row_id,),
        )
        for group in groups
        for (chosen, rejected), row_id in zip(group.pairs, group.row_ids, strict=True)
    ]
    together_row, apart_row = (pack(part, 64, prompt_counts=True) for part in (groups, apart))
    assert len(together_row.token_ids) < len(apart_row.token_ids)
    assert together_row.n_nll_tokens == apart_row.n_nll_tokens
    scale = LossScale(1 / apart_row.n_nll_tokens, 1 / apart_row.n_pairs, orpo(BETA))
    together, separate = (
        model(Microbatch(row, torch.device("cpu")), scale) for row in (together_row, apart_row)
    )
    assert together.loss.item() == pytest.approx(separate.loss.item(), rel=1e-12)
    torch.testing.assert_close(together.sums, separate.sums, rtol=1e-12, atol=0)


def test_a_row_without_groups_takes_part_with_nothing():
    causal_lm = tiny_model("llama", torch.float32)
    model = OrpoModel(causal_lm, "packed", None)
    row = pack([], 64, prompt_counts=True)
    output = model(Microbatch(row, torch.device("cpu")), LossScale(0.1, 0.1, orpo(BETA)))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(not p.grad.any() for p in causal_lm.parameters())
    assert not output.sums.any()
