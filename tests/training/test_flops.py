"""Operations of a row, by torch's own count of what a forward and backward pass runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orpo_ray.dataset.packing import GroupSpan, pack
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import orpo
from orpo_ray.training.flops import MfuMeter, Work, long_step_text, matmul_rate, seen_keys
from tests.reference.models import odd_groups, tiny_model


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_the_work_of_a_row_is_what_torch_counts(family):
    """In the layers' and the head's products; attention's are others, with all keys of a mask.

    The gradient of the head's weight is added in place, by an operation that torch does not count.
    A chunk in parts would be projected twice, which is no work of the model.
    """
    causal_lm = tiny_model(family, torch.float32)
    model = OrpoModel(causal_lm, "packed", None)
    row = pack(odd_groups(0), chunk_tokens=200, prompt_counts=True)
    batch = Microbatch(row, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        model(batch, LossScale(nll=0.1, pair=0.1, objective=orpo(1.0))).loss.backward()
    products = ("aten.mm", "aten.addmm")
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in products)
    work = Work.from_model(causal_lm)
    expected = work.per_token * len(row.token_ids) + work.per_position * len(row.positions)
    assert counted + 2 * work.per_position / 6 * len(row.positions) == expected


def test_keys_that_are_seen():
    """Prompt of 3: 1 + 2 + 3. Answers of 2 and 1: 4 + 5, and 4; together 19."""
    assert seen_keys(GroupSpan(3, (2, 1))) == 6 + 9 + 4
    assert seen_keys(GroupSpan(0, (2,))) == 3


def test_attention_is_counted_by_query_key_and_width():
    """12 for a pair of a query and a key, and a unit of 4 heads of 8, in 2 layers."""
    assert Work.from_model(tiny_model("llama", torch.float32)).per_seen_key == 12 * 4 * 8 * 2


def test_frozen_weights_take_no_gradient_of_their_own():
    causal_lm = tiny_model("llama", torch.float32)
    trained = Work.from_model(causal_lm)
    causal_lm.requires_grad_(False)
    assert Work.from_model(causal_lm).per_token == pytest.approx(trained.per_token * 4 / 6)


def test_experts_count_by_the_share_that_a_token_goes_to():
    """2 of 4 experts: half of their weights."""
    causal_lm = tiny_model("mixtral", torch.float32)
    config = causal_lm.config
    assert (config.num_experts_per_tok, config.num_local_experts) == (2, 4)
    whole = {n: p.numel() for n, p in causal_lm.named_parameters() if p.dim() > 1}
    experts = sum(n for name, n in whole.items() if ".experts." in name)
    others = sum(n for name, n in whole.items() if ".layers." in name) - experts
    assert Work.from_model(causal_lm).per_token == 6 * (others + experts / 2)


def test_a_step_is_called_long_by_its_operations():
    causal_lm, row = tiny_model("llama", torch.float32), pack(odd_groups(0), 16, True)
    device, work = torch.device("cpu"), Work.from_model(causal_lm)
    assert long_step_text(causal_lm, [row], device, torch.float32) is None
    text = long_step_text(causal_lm, [row, row], device, torch.float32, least_s=0.0)
    attention = work.per_seen_key * sum(map(seen_keys, row.spans)) / work.flops(row)
    longest = max(span.n_tokens for span in row.spans)
    assert f" FLOPs ({2 * work.flops(row):.1e}, {attention:.0%} of them attention), up to " in text
    assert text.endswith(f" has {longest:,} tokens")


def utilization() -> tuple[float, float, float, float]:
    """MFU of one row in two seconds, of none, of two rows in two seconds; and the row's FLOPs."""
    causal_lm, device = tiny_model("llama", torch.float32), torch.device("cpu")
    meter, row = MfuMeter(causal_lm, device, torch.float32), pack(odd_groups(0), 16, True)
    found = []
    for n_rows in (1, 0, 2):
        meter.add([row] * n_rows)
        found.append(meter.read(2.0))
    return (*found, Work.from_model(causal_lm).flops(row))


def test_utilization_counts_the_rows_since_it_was_last_read(run_ranks):
    """The rate of this CPU, which it is divided by, is between 1e8 and 1e14 FLOPs per second."""
    for one, none, two, flops in run_ranks(2, utilization):
        assert (none, two) == (0.0, pytest.approx(2 * one))
        assert flops / 2.0 / 1e14 < one < flops / 2.0 / 1e8


def test_the_rate_of_this_machine_is_a_rate():
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8
