"""Scores of pairs, against padded rows in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.training.evaluation import SCHEMA
from orpo_ray.training.scoring import PairScorer
from tests.reference.models import odd_groups, tiny_model
from tests.reference.padded import reference_orpo


def single_pairs(groups: list[PromptGroup]) -> list[PromptGroup]:
    """Every pair as a group of its own, in order."""
    return [
        PromptGroup(
            group.prompt, (group.completions[a], group.completions[b]), ((0, 1),), (row_id,)
        )
        for group in groups
        for (a, b), row_id in zip(group.pairs, group.row_ids, strict=True)
    ]


@pytest.mark.parametrize(("name", "attention"), [("llama", "packed"), ("lfm2", "padded")])
@pytest.mark.parametrize("budget", [30, 1000])
def test_every_pair_has_its_own_score(
    name: str, attention: str, budget: int, tmp_path: Path
) -> None:
    """In the order of the groups, whatever microbatch it was in; LFM2 falls back and says so."""
    tiny_model(name, torch.float32).save_pretrained(tmp_path)
    groups = [group for group in odd_groups(3) if len(group.prompt)]
    config = ORPOConfig(max_tokens_per_microbatch=budget, bf16=False)
    scorer = PairScorer.load(config, str(tmp_path), torch.device("cpu"), groups)
    assert scorer.model.attention == attention
    assert (scorer.problem is None) == (attention == "packed")
    table = scorer.score(groups)
    assert table.schema == SCHEMA
    pairs = single_pairs(groups)
    rows = [pair.row_ids[0] for pair in pairs]
    assert table["row"].to_pylist() == [row.row for row in rows]
    model = tiny_model(name, torch.float64)
    for index, pair in enumerate(pairs):
        with torch.no_grad():
            expected = reference_orpo(model, [pair], beta=0.1).metrics
        for column, metric in (
            ("logps_chosen", "logps/chosen"),
            ("logps_rejected", "logps/rejected"),
            ("log_odds", "log_odds_chosen"),
        ):
            assert table[column][index].as_py() == pytest.approx(expected[metric], abs=2e-4)
        lengths = [len(completion) for completion in pair.completions]
        assert [table[f"{s}_tokens"][index].as_py() for s in ("chosen", "rejected")] == lengths
    margin = table["logps_chosen"].to_numpy() - table["logps_rejected"].to_numpy()
    assert np.array_equal(table["margin"].to_numpy(), margin)
    keys = dict(zip(table["prompt_key"].to_pylist(), rows, strict=True))
    assert len(keys) == len(groups)
    assert scorer.score([]).num_rows == 0
