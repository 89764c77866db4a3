"""Scoring pairs with a model on one device: the packed engine without gradients or sharding.

Runs in data tasks and anywhere else; it needs no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.packing import balanced_bins, pack
from orpo_ray.models.build import attention_path, packed_kernel, refuse_unknown_heads, use_bf16
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.models.packing_check import COMPARED, disagreement
from orpo_ray.objective.head import LossScale
from orpo_ray.preference.groups import PromptGroup
from orpo_ray.pretrained import ModelSource, load_model
from orpo_ray.training.budget import head_chunk
from orpo_ray.training.evaluation import PairScores

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
            UnsupportedModelError: for heads that are more than a matrix product, code of the
                model's own, and weights that are no safetensors.
        """
        bf16 = use_bf16(config, device)
        source = ModelSource.from_config(config.model, path)
        causal_lm = load_model(source, torch.bfloat16 if bf16 else torch.float32)
        refuse_unknown_heads(causal_lm.config)
        attention = attention_path(config, causal_lm)
        kernel = packed_kernel(config, causal_lm.config, device)
        coef = config.orpo.router_aux_loss_coef
        model = OrpoModel(causal_lm.to(device), attention, coef, kernel).eval()
        chunk_tokens = head_chunk(config, model, device)
        problem = None
        if model.attention == "packed" and causal_lm.config.model_type not in COMPARED:
            row = pack(list(sample[:_SAMPLE_GROUPS]), chunk_tokens, True)
            problem = disagreement(model, row, device, bf16)
            model.use_attention("packed" if problem is None else "padded")
        return PairScorer(config, model, device, problem)

    @torch.no_grad()
    def score(self, groups: Sequence[PromptGroup]) -> pa.Table:
        """Score every pair of some groups.

        Returns:
            A table of `evaluation.SCHEMA` in the order of the groups.
        """
        config = self.config
        chunk_tokens = head_chunk(config, self.model, self.device)
        scale = LossScale(nll=1.0, pair=1.0, beta=config.orpo.beta)
        sizes = [group.n_tokens for group in groups]
        (bins,) = balanced_bins(sizes, 1, config.eval_microbatch_tokens)
        scores = PairScores()
        groups_of_pairs: list[int] = []
        for members in bins:
            row = pack([groups[i] for i in members], chunk_tokens, True)
            scores.add(row, self.model(Microbatch(row, self.device), scale))
            groups_of_pairs += [i for i in members for _ in groups[i].pairs]
        return scores.table().take(np.argsort(groups_of_pairs, kind="stable"))
