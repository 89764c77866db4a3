"""The other objectives on whole models: loss and every gradient, to 1e-5.

CPO and SimPO against TRL 1.16's CPOTrainer, SFT against transformers' cross-entropy in float64.
"""

import copy
import warnings

import datasets
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.config.train import OrpoSection
from orpo_ray.dataset.packing import pack
from orpo_ray.demo.model import make_demo_model
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.metrics import LossWeights, metrics_from_sums
from orpo_ray.objective.objectives import objective_of
from orpo_ray.preference.groups import RowId, chosen_alone
from orpo_ray.preference.templates import PairText
from orpo_ray.preference.tokenization import Limits, PairTokenizer

PAIRS = [
    ("What is the sum?", " It is four.", " Two and two are four, I believe."),
    ("Name a color. ", "blue", "I would rather not name any color at all today."),
    ("And a town?", " Perhaps Lisbon, or another one by the sea.", " No."),
]
CASES = {
    "cpo": ({"loss_type": "sigmoid", "label_smoothing": 0.1}, {"objective": "cpo"}),
    "hinge": ({"loss_type": "hinge"}, {"objective": "cpo", "loss_type": "hinge"}),
    "ipo": ({"loss_type": "ipo", "cpo_alpha": 0.5}, {"objective": "cpo", "loss_type": "ipo"}),
    "simpo": ({"loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0}, {"objective": "simpo"}),
    "cpo-simpo": ({"loss_type": "simpo", "beta": 2.0}, {"objective": "simpo"}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_demo_model(str(folder), [text for pair in PAIRS for text in pair], 3)
    return folder


@pytest.fixture(scope="module")
def trl_trainer(base, tmp_path_factory):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows = dict(zip(("prompt", "chosen", "rejected"), zip(*PAIRS, strict=True), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own names
        return CPOTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64),
            CPOConfig(
                str(tmp_path_factory.mktemp("trl")),
                per_device_train_batch_size=len(PAIRS),
                report_to="none",
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
            ),
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
        )


def groups_of(base):
    tokenizer = PairTokenizer(AutoTokenizer.from_pretrained(base), Limits(1024))
    texts = [PairText(*pair) for pair in PAIRS]
    found = tokenizer.tokenize(texts, [RowId(0, row) for row in range(len(texts))])
    return [pair.group for pair in found]


def of_ours(base, section, groups):
    """Metrics and gradients of one packed row."""
    causal_lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = OrpoModel(causal_lm, "packed", None)
    row = pack(groups, 16, section.prompt_counts)
    objective = objective_of(section)
    scale = LossScale(1 / row.n_nll_tokens, 1 / row.n_pairs, objective)
    output = model(Microbatch(row, torch.device("cpu")), scale)
    output.loss.backward()
    metrics = metrics_from_sums(output.sums.tolist(), LossWeights(objective, 0.0))
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-9)
    return metrics, {name: p.grad for name, p in causal_lm.named_parameters()}


def assert_same_gradients(ours, theirs):
    largest = max(grad.abs().max().item() for grad in theirs.values())
    assert largest > 0
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_those_of_cpo_trainer(base, trl_trainer, case):
    theirs, ours = CASES[case]
    settings = {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "label_smoothing": 0.0} | theirs
    trainer = copy.copy(trl_trainer)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.model.zero_grad()
    (batch,) = trainer.get_train_dataloader()
    loss, their_metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    shared = {name: value for name, value in settings.items() if name != "loss_type"}
    metrics, gradients = of_ours(base, OrpoSection(**(shared | ours)), groups_of(base))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    if settings["cpo_alpha"]:
        assert metrics["nll_loss"] == pytest.approx(their_metrics["nll_loss"], rel=1e-5)
    if settings["loss_type"] in ("ipo", "simpo"):  # the others' are of sums of log-probabilities
        for name in ("rewards/margins", "rewards/chosen", "logps/rejected", "rewards/accuracies"):
            assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-5)
    assert_same_gradients(gradients, {n: p.grad for n, p in trainer.model.named_parameters()})


@pytest.mark.parametrize("scope", ["completion", "all"])
def test_sft_is_the_cross_entropy_of_the_chosen_answers(base, scope):
    groups = groups_of(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    rows, labels = [], []
    for group in groups:
        prompt, chosen = group.prompt.tolist(), group.completions[0].tolist()
        rows.append(prompt + chosen)
        labels.append((prompt if scope == "all" else [-100] * len(prompt)) + chosen)
    width = max(map(len, rows))
    logits = model(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
    ).logits
    targets = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    section = OrpoSection(objective="sft", nll_scope=scope)
    for kept in (list(map(chosen_alone, groups)), groups):
        metrics, gradients = of_ours(base, section, kept)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert_same_gradients(gradients, theirs)
    assert "rewards/accuracies" not in of_ours(base, section, [chosen_alone(groups[0])])[0]
