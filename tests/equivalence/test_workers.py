"""One worker, two workers, and bfloat16: the same training."""

import pytest

from tests.reference.small_run import make_inputs, metrics_without_times, train_small

STEPS = {"max_steps": 8, "logging_steps": 1, "eval_steps": 4, "save_steps": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def metrics(run_ranks, inputs, run, n_ranks, **changes):
    run_ranks(n_ranks, train_small, inputs, run, STEPS | changes)
    return metrics_without_times(run)


@pytest.fixture(scope="module")
def one_worker(run_ranks, inputs, tmp_path_factory):
    return metrics(run_ranks, inputs, tmp_path_factory.mktemp("one"), 1)


def test_two_workers_equal_one(run_ranks, inputs, one_worker, tmp_path):
    """FSDP over two ranks changes the order of additions: about 1e-6 after 8 steps of 1e-2."""
    for two, one in zip(metrics(run_ranks, inputs, tmp_path, 2), one_worker, strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_change_nothing(run_ranks, inputs, one_worker, tmp_path, every):
    recomputed = metrics(
        run_ranks,
        inputs,
        tmp_path,
        1,
        gradient_checkpointing=True,
        gradient_checkpointing_every=every,
    )
    for again, one in zip(recomputed, one_worker, strict=True):
        assert again == pytest.approx(one, rel=1e-6, abs=1e-7)


@pytest.mark.slow  # the compiler takes a minute
def test_compiled_layers_survive_changing_lengths(run_ranks, inputs, one_worker, tmp_path):
    """Every microbatch has another length; fused additions change the last bits only."""
    for compiled, one in zip(
        metrics(run_ranks, inputs, tmp_path, 1, torch_compile=True), one_worker, strict=True
    ):
        assert compiled == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_bfloat16_stays_close_and_counts_exactly(run_ranks, inputs, one_worker, tmp_path):
    """8 bits of mantissa: about 0.4 % a number; the learning rate and counts are not rounded."""
    for half, one in zip(
        metrics(run_ranks, inputs, tmp_path, 2, bf16=True), one_worker, strict=True
    ):
        for name in ("loss", "nll_loss", "eval_loss", "logps/chosen", "eval_logps/rejected"):
            if name in one:
                assert half[name] == pytest.approx(one[name], rel=1e-2)
        if "learning_rate" in one:
            assert half["learning_rate"] == one["learning_rate"]
        assert half != one
