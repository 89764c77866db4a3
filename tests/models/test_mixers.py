"""Modules with a convolution or a recurrence, on packed rows."""

import copy

import pytest
import torch
from torch import Tensor

from orpo_ray.dataset.packing import pack
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.mixers import find_mixers
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.preference.groups import PromptGroup
from tests.families.training import tiny_family
from tests.reference.models import odd_groups

CPU = torch.device("cpu")
# A gated delta net, Mamba 2 with experts beside it, a short convolution, an RG-LRU.
FAMILIES = ("qwen3_next", "nemotron_h", "lfm2", "recurrent_gemma")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> OrpoModel:
    return packed(request.param)


def packed(family: str) -> OrpoModel:
    return OrpoModel(tiny_family(family), "packed", None).eval()


def batch_of(groups: list[PromptGroup]) -> Microbatch:
    return Microbatch(pack(groups, chunk_tokens=16, prompt_counts=True), CPU)


def hidden(model: OrpoModel, groups: list[PromptGroup]) -> Tensor:
    return model.decode(batch_of(groups))[0]


def in_range(groups: list[PromptGroup], vocabulary: int) -> list[PromptGroup]:
    """Tokens that every family's vocabulary has."""
    for group in groups:
        for part in (group.prompt, *group.completions):
            part %= vocabulary
    return groups


@pytest.mark.long
def test_a_group_does_not_see_the_others(model: OrpoModel):
    """To the bit: what leaks through a state is small, and is not hidden by a tolerance."""
    vocabulary = model.causal_lm.config.vocab_size
    groups = in_range(odd_groups(1), vocabulary)
    for kept in (1, 4):
        others = copy.deepcopy(groups)
        for index, group in enumerate(others):
            if index != kept:
                for part in (group.prompt, *group.completions):
                    part[:] = (part + 7) % vocabulary
        lengths = [len(g.prompt) + sum(map(len, g.completions)) for g in groups]
        own = slice(sum(lengths[:kept]), sum(lengths[: kept + 1]))
        with torch.no_grad():
            one, other = hidden(model, groups)[own], hidden(model, others)[own]
        assert torch.equal(one, other)


def gradients(model: OrpoModel, groups: list[PromptGroup]) -> list[Tensor]:
    model.zero_grad()
    hidden(model, groups).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.long
def test_layers_may_be_recomputed(model: OrpoModel):
    groups = in_range(odd_groups(2), model.causal_lm.config.vocab_size)
    expected = gradients(model, groups)
    model.causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    model.train()  # without dropout
    found = gradients(model, groups)
    model.causal_lm.activation_checkpointing_disable()
    model.eval()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's tracing asks for it
def test_layers_may_be_compiled_around_them():
    one, other = packed("lfm2"), packed("lfm2")
    for layer in other.causal_lm.base_model.layers:
        layer.compile(backend="eager", dynamic=True)
    for seed in (2, 3):
        groups = in_range(odd_groups(seed), one.causal_lm.config.vocab_size)
        pairs = zip(gradients(other, groups), gradients(one, groups), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_padded_rows_get_what_the_model_gives(model: OrpoModel):
    """Nothing of packed rows is left behind; and they compute the same."""
    groups = in_range(odd_groups(3), model.causal_lm.config.vocab_size)
    assert model.mixers
    assert all("forward" in vars(module) for module in find_mixers(model))
    with torch.no_grad():
        packed = hidden(model, groups)
        model.use_attention("padded")
        assert not any("forward" in vars(module) for module in find_mixers(model))
        padded = hidden(model, groups)
    model.use_attention("packed")
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
