"""ORPO of a tiny model by plain transformers, every sequence by itself, and by packed rows."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orpo_ray.dataset.packing import pack
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.models.packing_check import Verdict
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import orpo
from orpo_ray.preference.groups import PromptGroup

BETA = 0.3


@dataclass(frozen=True)
class Figures:
    """The loss, and the gradient by parameter."""

    loss: float
    gradient: dict[str, Tensor]

    def difference(self, other: "Figures") -> float:
        """The larger of the loss's relative difference and the gradient's, over its norm."""
        zeros = {name: torch.zeros_like(g) for name, g in (self.gradient | other.gradient).items()}
        one, two = (
            torch.cat([(zeros | figures.gradient)[name].double().flatten() for name in zeros])
            for figures in (self, other)
        )
        of_loss = abs(self.loss - other.loss) / abs(self.loss)
        return max(of_loss, float((one - two).norm() / one.norm()))


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients of a model, which are cleared."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain(model: PreTrainedModel, groups: list[PromptGroup], padded: bool) -> Figures:
    """From the model's own logits, each sequence by itself or all in padded rows."""
    pairs = [
        (group.prompt.tolist(), group.completions[chosen].tolist(), group.completions[bad].tolist())
        for group in groups
        for chosen, bad in group.pairs
    ]
    rows = [prompt + answer for prompt, *answers in pairs for answer in answers]
    scores = [
        logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row)[1:, None])[:, 0]
        for row, logits in zip(rows, _logits(model, rows, padded), strict=True)
    ]
    means = torch.stack(
        [
            scores[2 * index + side][len(prompt) - 1 :].mean()
            for side in (0, 1)
            for index, (prompt, *_) in enumerate(pairs)
        ]
    )
    chosen, rejected = means.chunk(2)
    odds = (chosen - torch.log(-torch.expm1(chosen))) - (
        rejected - torch.log(-torch.expm1(rejected))
    )
    nll = -torch.cat(scores[::2]).mean()
    loss = nll - BETA * torch.nn.functional.logsigmoid(odds).mean()
    loss.backward()
    return Figures(loss.item(), gradients(model))


def _logits(model: PreTrainedModel, rows: list[list[int]], padded: bool) -> list[Tensor]:
    """Of every row, in double precision."""
    if not padded:
        alone = (model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows)
        return [logits.double() for logits in alone]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [part[: len(row)].double() for part, row in zip(logits, rows, strict=True)]


def ours(model: PreTrainedModel, groups: list[PromptGroup], verdict: Verdict) -> Figures:
    """By the rows and the head that were found for the model."""
    packed = OrpoModel(model, verdict.path, None)
    packed.head = verdict.head
    packed.eval()
    row = pack(groups, chunk_tokens=16, prompt_counts=True)
    scale = LossScale(1 / row.n_nll_tokens, 1 / row.n_pairs, orpo(BETA))
    output = packed(Microbatch(row, torch.device("cpu")), scale)
    output.loss.backward()
    model.set_attn_implementation("eager")
    return Figures(output.loss.item(), gradients(model))
