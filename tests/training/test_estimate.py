"""What a dry run says beside its numbers."""

import pytest

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.training.estimate import bf16_hint

AMX = {"amx_bf16": True, "avx512_bf16": True, "avx2": True}


def test_a_cpu_with_units_for_bfloat16_is_named_where_bf16_is_not_set():
    (line,) = bf16_hint(ORPOConfig(), AMX)
    assert line.startswith("hint: bf16 is off on CPUs")
    assert "amx_bf16" in line
    assert "bf16=true" in line


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": False}, {"use_gpu": True}])
def test_what_is_set_is_not_hinted_at(settings):
    assert bf16_hint(ORPOConfig(**settings), AMX) == []


@pytest.mark.parametrize("cpu", [{}, {"avx2": True}, {"amx_bf16": False, "avx512_bf16": True}])
def test_nor_is_what_the_cpu_lacks(cpu):
    assert bf16_hint(ORPOConfig(), cpu) == []
