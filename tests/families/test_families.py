"""Every family of transformers' causal mapping: exact, or refused by name, as the table says."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    FalconH1Config,
    GraniteConfig,
    LlamaConfig,
    MiniCPM3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from orpo_ray.models.lm_head import LMHead, find_head
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.models.packing_check import examine
from orpo_ray.models.small_copy import small_copy
from orpo_ray.pretrained import UnsupportedModelError
from tests.families.table import EXACT, FAMILIES, find, stored
from tests.families.training import save, tiny_family, trained
from tests.reference.small_run import make_inputs

CPU = torch.device("cpu")
# The most used ones, and one of every kind: heads, windows, sinks, convolutions, recurrences.
FAST = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2"),
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granite", "cohere2", "smollm3"),
    *("qwen3_next", "lfm2", "mamba2", "bert"),
)

# Those that have one, and whose config says whether it is computed.
ROUTERS = (
    *("mixtral", "dbrx", "jetmoe", "deepseek_v4", "ernie4_5_moe", "flex_olmo", "gpt_oss"),
    *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "jamba", "laguna"),
    *("mellum", "minimax", "minimax_m2", "minimax_m3_vl_text", "olmoe", "phimoe", "qwen2_moe"),
    *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text"),
)


def check(family: str) -> None:
    """Compare a family with the table, and its loss and gradient with transformers' own.

    In fp64 where the family computes in it; else, and for recurrences, to what transformers' own
    padded rows reach.
    """
    expected = stored().get(family)
    assert expected is not None, "not in docs/families.md: python -m tests.families.table NAME"
    row, difference, padded = find(family)
    assert row == expected
    assert difference <= max(EXACT, 2 * padded if padded == padded else 0)


@pytest.mark.long
@pytest.mark.parametrize("family", FAST)
def test_a_family_that_is_much_used_is_exact(family: str):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FAST])
def test_every_other_family_is_exact_or_refused(family: str):
    check(family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    make_inputs(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_three_steps_or_is_refused_by_name(run_ranks, folder, family: str):
    """Sharded over two ranks, with FLOPs counted and the model exported."""
    expected = stored()[family]
    if expected.rows == "not tried":
        pytest.skip(expected.why)
    if "only its text model" in expected.why:
        with pytest.raises(UnsupportedModelError, match=f"^model_name_or_path: {family}: "):
            save(family, folder)
        return
    save(family, folder)
    ends = run_ranks(2, trained, folder, family)
    if expected.rows == "refused":
        assert all(end.startswith(f"refused: model_name_or_path: {family}: ") for end in ends)
    else:
        assert ends == ["trained"] * 2


def check_router(family: str) -> None:
    """`examine` compares the router loss with the model's own; here it has to find one."""
    model = tiny_family(family, output_router_logits=True)
    small = small_copy(model, CPU)
    assert small is not None
    examine(small, CPU)
    assert OrpoModel(small, "padded", None).has_router
    ids = torch.randint(12, 60, (2, 9))
    assert small(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss is not None
    assert OrpoModel(model, "padded", None).router_coef > 0


@pytest.mark.parametrize("family", ROUTERS[:3])
def test_the_router_loss_is_transformers_own(family: str):
    check_router(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ROUTERS[3:])
def test_the_router_loss_of_every_other_family_is_transformers_own(family: str):
    check_router(family)


def test_a_router_loss_that_transformers_cannot_compute_is_refused():
    """Flint's, in transformers 5.23."""
    small = small_copy(tiny_family("flint", output_router_logits=True), CPU)
    assert small is not None
    with pytest.raises(UnsupportedModelError, match=r"^model_name_or_path: flint: "):
        examine(small, CPU)


SMALL = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}


def head_of(config: PreTrainedConfig) -> LMHead:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return find_head(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), CPU)


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (LlamaConfig(**SMALL), LMHead()),
        (GraniteConfig(**SMALL, logits_scaling=8.0), LMHead(scale=0.125)),
        (
            MiniCPM3Config(
                **SMALL | {"num_key_value_heads": 4}, **LATENT, v_head_dim=8, dim_model_base=8
            ),
            LMHead(has_layers=True),
        ),
        (
            FalconH1Config(
                **SMALL,
                **{"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
                lm_head_multiplier=0.3,
            ),
            LMHead(scale=0.3),
        ),
    ],
    ids=["llama", "granite", "minicpm3", "falcon_h1"],
)
def test_the_head_is_found_by_its_numbers(config: PreTrainedConfig, head: LMHead):
    """Factors as the config has them, to the last digit."""
    assert head_of(config) == head


def test_a_model_that_sees_what_follows_is_refused():
    """BERT without `is_decoder`."""
    sizes = {name: size for name, size in SMALL.items() if name != "num_key_value_heads"}
    with pytest.raises(UnsupportedModelError, match=r"^model_name_or_path: bert: it is not causal"):
        head_of(BertConfig(**sizes))


def test_a_head_of_its_own_kind_is_refused():
    """Logits squared, which is neither a factor nor a cap."""
    model = tiny_family("llama")
    forward = model.forward

    def squared(*args, **options):
        output = forward(*args, **options)
        output.logits = output.logits * output.logits.abs()
        return output

    model.forward = squared
    with pytest.raises(UnsupportedModelError, match="no multiple of the head's product"):
        find_head(model, CPU)


def test_a_window_that_is_in_the_mask_only_is_said():
    """Qwen2-MoE's, of 40 tokens here and of 4096 in a model: the small copy has 8."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen2MoeConfig(
        **SMALL,
        **experts,
        **{"shared_expert_intermediate_size": 24, "use_sliding_window": True},
        **{"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
    )
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    small = small_copy(model, CPU)
    assert small is not None
    verdict = examine(small, CPU)
    assert verdict.path == "padded"
    assert verdict.reason is not None
    assert verdict.reason.endswith("a window that only its own attention masks have")


def test_a_small_copy_has_every_kind_of_layer_and_leaves_random_numbers_alone():
    """Gemma 3's full attention comes after five windows."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    sizes = SMALL | {"num_hidden_layers": 30, "vocab_size": 50_000, "head_dim": 8}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**sizes, sliding_window=1024))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    small = small_copy(model, CPU)
    assert torch.equal(torch.rand(1), expected)
    assert small is not None
    config = small.config
    assert (config.num_hidden_layers, config.sliding_window, config.vocab_size) == (6, 8, 128)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
