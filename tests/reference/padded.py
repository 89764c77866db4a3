"""ORPO over padded rows in float64, written from DESIGN section 2 and sharing no product code."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from orpo_ray.preference.groups import PromptGroup


@dataclass(frozen=True)
class Reference:
    """The loss with its graph, and every metric under its exact name."""

    loss: Tensor
    metrics: dict[str, float]


def reference_orpo(
    model: PreTrainedModel,
    groups: Sequence[PromptGroup],
    beta: float,
    nll_scope: str = "all",
    router_coef: float = 0.0,
) -> Reference:
    """Two padded rows a pair (prompt + chosen, prompt + rejected), full logits, plain loops.

    Args:
        model: a causal LM, in float64 where its family computes in it throughout.
        groups: expanded to their pairs, in order.
        beta: weight of the odds-ratio term.
        nll_scope: "all" (prompt and chosen answer) or "completion".
        router_coef: weight of the router loss, for models that have one.
    """
    pairs = [
        (group.prompt.tolist(), group.completions[chosen].tolist(), group.completions[bad].tolist())
        for group in groups
        for chosen, bad in group.pairs
    ]
    rows = [prompt + chosen for prompt, chosen, _ in pairs]
    rows += [prompt + rejected for prompt, _, rejected in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    options = {"output_router_logits": True} if router_coef else {}
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    log_probs = torch.log_softmax(output.logits, dim=-1)

    nll_terms, w, v = [], [], []
    for index, (prompt, chosen, rejected) in enumerate(pairs):
        for answer, means, row in ((chosen, w, index), (rejected, v, len(pairs) + index)):
            first = max(len(prompt), 1)  # a token with nothing before it is not predicted
            predicted = range(first, len(prompt) + len(answer))
            scores = torch.stack([log_probs[row, at - 1, ids[row, at]] for at in predicted])
            means.append(scores.mean())
            if answer is chosen:
                nll_terms += list(-scores)
                if nll_scope == "all":
                    inside = range(1, len(prompt))
                    nll_terms += [-log_probs[row, at - 1, ids[row, at]] for at in inside]
    chosen_means, rejected_means = torch.stack(w), torch.stack(v)
    # log(p / (1 - p)) of both sides, with 1 - p = -expm1(log p).
    log_odds = (chosen_means - torch.log(-torch.expm1(chosen_means))) - (
        rejected_means - torch.log(-torch.expm1(rejected_means))
    )
    ratio = torch.log(torch.sigmoid(log_odds))
    nll = torch.stack(nll_terms).mean()
    loss = nll - beta * ratio.mean()
    metrics = {
        "rewards/chosen": beta * chosen_means.mean(),
        "rewards/rejected": beta * rejected_means.mean(),
        "rewards/accuracies": (chosen_means > rejected_means).double().mean(),
        "rewards/margins": beta * (chosen_means - rejected_means).mean(),
        "log_odds_chosen": log_odds.mean(),
        "log_odds_ratio": ratio.mean(),
        "nll_loss": nll,
        "logps/chosen": chosen_means.mean(),
        "logps/rejected": rejected_means.mean(),
    }
    if router_coef:
        aux = load_balancing_loss_func(
            tuple(output.router_logits),
            getattr(model.config, "num_local_experts", None) or model.config.num_experts,
            model.config.num_experts_per_tok,
            mask,
        )
        metrics["aux_loss"] = aux
        loss = loss + router_coef * aux
    metrics["loss"] = loss
    return Reference(loss, {name: value.item() for name, value in metrics.items()})
