"""Scoring pairs with a model on one device: the packed engine without gradients or sharding.

Runs in data tasks and anywhere else; it needs no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import xxhash
from transformers import AutoModelForCausalLM

from orpo_ray.config import ORPOConfig
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.odds_ratio import log_odds
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.preference.packing import PackedRow, balanced_bins, pack
from orpo_ray.training.microbatch import Microbatch
from orpo_ray.training.model import OrpoModel
from orpo_ray.training.sharding import attention_path, refuse_unknown_heads, use_bf16
from orpo_ray.training.verify import COMPARED, disagreement

SCHEMA = pa.schema(
    [
        ("source", pa.int32()),
        ("row", pa.int64()),
        ("prompt_key", pa.uint64()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("logps_chosen", pa.float64()),
        ("logps_rejected", pa.float64()),
        ("log_odds", pa.float64()),
        ("margin", pa.float64()),
    ]
)
_SAMPLE_GROUPS = 4


@dataclass(frozen=True)
class PairScorer:
    """A model that says how likely both answers of a pair are.

    Args:
        config: the run; its attention path, precision and microbatch budget count.
        model: on its device, in evaluation mode.
        device: of the model.
        problem: why it computes padded rows, where it does so without being asked.
    """

    config: ORPOConfig
    model: OrpoModel
    device: torch.device
    problem: str | None = None

    @staticmethod
    def load(
        config: ORPOConfig, path: str, device: torch.device, sample: Sequence[PromptGroup]
    ) -> "PairScorer":
        """Load a model in fp32, or in bfloat16 where the run computes in it.

        Args:
            config: the run.
            path: folder or hub id; a folder of adapters brings its base model.
            device: where it goes.
            sample: pairs on which a model of an unknown family is compared with padded rows.

        Raises:
            UnsupportedModelError: for heads that are more than a matrix product.
        """
        bf16 = use_bf16(config, device)
        causal_lm = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.model.model_revision,
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        refuse_unknown_heads(causal_lm.config)
        attention = attention_path(config, causal_lm)
        model = OrpoModel(causal_lm.to(device), attention, config.orpo.router_aux_loss_coef).eval()
        problem = None
        if model.attention == "packed" and causal_lm.config.model_type not in COMPARED:
            row = pack(list(sample[:_SAMPLE_GROUPS]), config.train.head_chunk_tokens, True)
            problem = disagreement(model, row, device, bf16)
            model.use_attention("packed" if problem is None else "padded")
        return PairScorer(config, model, device, problem)

    @torch.no_grad()
    def score(self, groups: Sequence[PromptGroup]) -> pa.Table:
        """Score every pair of some groups.

        Returns:
            A table of `SCHEMA` in the order of the groups: mean log-probabilities a token of both
            answers in nats, their log odds, and the margin between the two means.
        """
        config = self.config
        sizes = [group.n_tokens for group in groups]
        (bins,) = balanced_bins(sizes, 1, config.eval_microbatch_tokens)
        parts: list[tuple[int, pa.Table]] = []
        for members in bins:
            row = pack([groups[i] for i in members], config.train.head_chunk_tokens, True)
            table = self._score_row(row, [groups[i] for i in members])
            first = 0
            for i in members:
                n_pairs = len(groups[i].pairs)
                parts.append((i, table.slice(first, n_pairs)))
                first += n_pairs
        tables = [table for _, table in sorted(parts, key=lambda part: part[0])]
        return pa.concat_tables([SCHEMA.empty_table(), *tables])

    def _score_row(self, row: PackedRow, groups: Sequence[PromptGroup]) -> pa.Table:
        """The pairs of one microbatch, in its order."""
        if not groups:
            return SCHEMA.empty_table()
        scale = LossScale(nll=1.0, pair=1.0, beta=self.config.orpo.beta)
        output = self.model(Microbatch(row, self.device), scale)
        chosen, rejected = output.chosen_log_probs.double(), output.rejected_log_probs.double()
        odds = log_odds(chosen, rejected)
        lengths = row.completion_lengths
        keys = [xxhash.xxh3_64_intdigest(g.prompt.tobytes()) for g in groups for _ in g.pairs]
        columns = [
            np.array([row_id.source for row_id in row.row_ids], np.int32),
            np.array([row_id.row for row_id in row.row_ids], np.int64),
            np.array(keys, np.uint64),
            lengths[row.chosen].astype(np.int32),
            lengths[row.rejected].astype(np.int32),
            *(tensor.cpu().numpy() for tensor in (chosen, rejected, odds, chosen - rejected)),
        ]
        return pa.table(columns, schema=SCHEMA)
