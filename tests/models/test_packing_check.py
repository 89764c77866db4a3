"""Models of families that nobody tried: packed where that is exact, padded where it is not."""

import re
from pathlib import Path

import pytest
import torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.packing import pack
from orpo_ray.models.attention.interface import PackingNotSupportedError, packed_attention
from orpo_ray.models.attention.layout import PackedLayout
from orpo_ray.models.build import build_model
from orpo_ray.models.packing_check import COMPARED, check_packing
from tests.equivalence.test_packed_equals_padded import FAMILIES
from tests.reference.models import odd_groups, tiny_model
from tests.reference.small_run import make_inputs, token_stream


def settled(folder: Path, name: str) -> tuple[str, list[str]]:
    """Which way a model is computed, and what is said of it; on this rank."""
    import torch.distributed as dist

    notices: list[str] = []
    device = torch.device("cpu")
    model = build_model(ORPOConfig(), str(folder / name), device)
    stream = token_stream(folder, dist.get_rank(), dist.get_world_size())
    check_packing(model, stream, device, False, notices.append)
    return model.attention, notices


def settled_models(folder: Path, names: list[str]) -> list[tuple[str, list[str]]]:
    return [settled(folder, name) for name in names]


@pytest.fixture(scope="module")
def answers(run_ranks, tmp_path_factory) -> dict[str, tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("models")
    make_inputs(folder)
    names = ["smollm3", "lfm2", "falcon", "gpt-oss", "llama"]
    for name in names:
        tiny_model(name, torch.float32).save_pretrained(folder / name)
    found = run_ranks(2, settled_models, folder, names)
    assert found[0] == found[1]
    return dict(zip(names, found[0], strict=True))


def test_an_unknown_family_that_agrees_goes_on_packed(answers):
    attention, (notice,) = answers["smollm3"]
    assert attention == "packed"
    assert notice == "smollm3: packed rows equal rows alone, token by token"


def test_convolutions_take_padded_rows_and_that_is_said(answers):
    attention, (notice,) = answers["lfm2"]
    assert attention == "packed"
    assert re.fullmatch(
        "lfm2: packed rows equal rows alone, token by token; its convolutions and recurrences are "
        r"given padded rows, with [1-9]\.\d times the tokens",
        notice,
    )


def test_attention_of_a_models_own_is_found_by_its_kind(answers):
    attention, (notice,) = answers["falcon"]
    assert attention == "padded"
    assert notice.startswith("warning: falcon: padded rows with ")
    assert notice.endswith(" packed ones: it does not use transformers' attention interface")


def test_an_option_that_is_not_known_is_not_ignored():
    """As a score function of a model's own would be."""
    row = pack(odd_groups(1), chunk_tokens=16, prompt_counts=True)
    layout = PackedLayout(row.spans, torch.device("cpu"))
    heads = torch.randn(1, 2, len(row.token_ids), 8)
    options = {"packed_layout": layout, "sliding_window": 4, "position_bias": torch.ones(1)}
    with pytest.raises(PackingNotSupportedError, match=r"options: \['position_bias'\]"):
        packed_attention(torch.nn.Identity(), heads, heads, heads, None, **options)


def test_attention_sinks_are_packed(answers):
    assert answers["gpt-oss"] == (
        "packed",
        ["gpt_oss: packed rows equal rows alone, token by token"],
    )


def test_a_family_that_was_compared_is_not_checked_again(answers):
    assert answers["llama"] == ("packed", [])


def test_compared_are_the_families_of_the_equivalence_tests():
    assert {tiny_model(name, torch.float32).config.model_type for name in FAMILIES} == COMPARED
