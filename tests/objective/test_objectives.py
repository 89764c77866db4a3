"""Every objective's term against TRL's formulas and by its derivative, and what settings decide."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from trl.experimental.cpo import CPOTrainer

from orpo_ray.config.train import OBJECTIVE_SETTINGS, OrpoSection
from orpo_ray.objective.objectives import OBJECTIVES, Answers, cpo, objective_of, simpo

LENGTHS = torch.tensor([[3.0, 11.0, 2.0, 40.0], [5.0, 7.0, 2.0, 1.0]], dtype=torch.float64)
MEANS = torch.tensor([[-0.4, -2.0, -1.0, -9.0], [-0.9, -1.5, -1.0, -0.1]], dtype=torch.float64)
# Settings of this project beside the `loss_type` that TRL has for them.
CASES = [
    ("sigmoid", {"objective": "cpo", "beta": 0.1}),
    ("sigmoid", {"objective": "cpo", "beta": 0.3, "label_smoothing": 0.2}),
    ("hinge", {"objective": "cpo", "beta": 0.2, "loss_type": "hinge"}),
    ("ipo", {"objective": "cpo", "beta": 0.7, "loss_type": "ipo"}),
    ("simpo", {"objective": "simpo", "beta": 2.5, "simpo_gamma": 1.4}),
    ("simpo", {"objective": "simpo", "beta": 2.0, "label_smoothing": 0.1}),
]


@pytest.mark.parametrize(("loss_type", "settings"), CASES)
def test_terms_and_slopes_are_those_of_trl(loss_type, settings):
    section = OrpoSection(**settings)
    means = MEANS.clone().requires_grad_()
    own = SimpleNamespace(
        loss_type=loss_type,
        alpha=0.0,
        beta=section.beta,
        simpo_gamma=section.simpo_gamma,
        label_smoothing=section.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    log_probs = means if loss_type in ("ipo", "simpo") else means * LENGTHS
    losses, *_ = CPOTrainer.cpo_loss(own, log_probs[0], log_probs[1])
    losses.sum().backward()
    terms = objective_of(section).terms(Answers(MEANS, LENGTHS))
    torch.testing.assert_close(-terms.values, losses.detach(), rtol=1e-12, atol=1e-13)
    slopes = torch.stack([terms.chosen_slopes, terms.rejected_slopes])
    torch.testing.assert_close(-slopes, means.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "objective",
    [simpo(10.0, 1.0, 0.0), cpo(1.0, 1.0, "sigmoid"), cpo(1.0, 1.0, "hinge"), cpo(0.5, 1.0, "ipo")],
)
def test_slopes_are_finite_for_every_log_prob(objective, dtype):
    values = torch.tensor([-1e4, -100.0, -1.0, -1e-6, -1e-30, 0.0], dtype=dtype)
    means = torch.cartesian_prod(values, values).T
    for part in objective.terms(Answers(means, torch.full_like(means, 512.0))):
        assert part.isfinite().all()


def test_settings_name_every_objective():
    assert set(get_args(OrpoSection.model_fields["objective"].annotation)) == set(OBJECTIVES)
    assert set(OBJECTIVE_SETTINGS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_settings_of_an_objective_are_those_that_change_its_loss(name):
    def loss(**settings):
        objective = objective_of(OrpoSection(objective=name, **settings))
        terms = objective.terms(Answers(MEANS, LENGTHS)).values.sum() if objective.terms else 0.0
        return objective.nll_weight * 3.0 - objective.pair_weight * terms

    others = {"beta": 0.9, "simpo_gamma": 0.1, "cpo_alpha": 0.3, "label_smoothing": 0.2}
    others["loss_type"] = "hinge"
    deciding = {key for key, value in others.items() if loss(**{key: value}) != loss()}
    assert deciding == OBJECTIVE_SETTINGS[name]
    for key, value in others.items():
        unused = OrpoSection(objective=name, **{key: value}).unused()
        assert unused == (() if key in deciding else (key,))
