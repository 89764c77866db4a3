"""The report of a sweep: one HTML file that needs no network; on the driver."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from orpo_ray.config.schema import SECTION_OF
from orpo_ray.reports.page import make_axes, render, svg_of
from orpo_ray.runs.evaluations import latest, read_evaluations
from orpo_ray.runs.files import SAMPLES
from orpo_ray.runs.formatting import format_metric, format_setting, format_settings
from orpo_ray.runs.metrics import BY_NAME, HEADLINE
from orpo_ray.runs.sweep import Goal, Trial, table_rows
from orpo_ray.storage.files import read_lines, write_atomic

REPORT = "sweep_report.html"
_LEAST_FOR_IMPORTANCE = 4
_SAME_FOR_ALL = {
    "length_controlled_accuracy": "length-controlled accuracy",
    "accuracy": "accuracy",
    "log_odds": "log odds",
    "nll": "NLL of chosen answers, nats/token",
    "logps_rejected": "log-probability of rejected answers",
}


def write_sweep_report(
    directory: Path, trials: Sequence[Trial], goal: Goal, beta_zero: Trial | None
) -> Path:
    """Write `sweep_report.html`.

    Args:
        directory: of the sweep.
        trials: the best first.
        goal: by which they were ranked.
        beta_zero: the best trial's settings without the odds-ratio term, if they were run.

    Returns:
        Its path.
    """
    best = goal.best(trials)
    rows = table_rows(trials, goal)
    hidden = {"failure"} if not any(row["failure"] for row in rows) else set()
    settings = [name for row in rows for name in row if name in SECTION_OF]
    shown = [goal.prefix + metric.name for metric in HEADLINE]
    over_seeds = ["mean", "spread"] if goal.repeats > 1 else []
    columns = [
        "trial",
        *settings,
        *over_seeds,
        goal.metric,
        *shown,
        "nll_increase",
        "steps",
        "status",
    ]
    columns = [name for name in dict.fromkeys([*columns, "failure"]) if name not in hidden]
    figures = [_curves(trials, goal)]
    figures += _heat_map(trials, goal)
    if best and beta_zero:
        figures.append(_log_probs(best, beta_zero, goal))
    figures += _importance(trials, goal)
    page = render(
        "sweep.html.j2",
        title=f"{directory.name}: sweep",
        cell=_cell,
        name=directory.name,
        headline=_headline(trials, best, goal),
        rows=rows,
        columns=columns,
        best=best.name if best else None,
        objectives=_objectives(trials, goal),
        figures=figures,
    )
    path = directory / REPORT
    write_atomic(path, page)
    return path


def _headline(trials: Sequence[Trial], best: Trial | None, goal: Goal) -> str:
    if best is None:
        return f"{len(trials)} trials; none is eligible."
    values = format_settings(best.values)
    start = best.evaluations(goal.metric)[0][1]
    return (
        f"{len(trials)} trials. Best: {best.name} ({values}), {goal.metric} "
        f"{format_metric(start, '.4g')} before and {format_metric(best.last(goal.metric), '.4g')} "
        "after training, NLL "
        f"{goal.nll_increase(best):+.3g} nats."
    )


def _objectives(trials: Sequence[Trial], goal: Goal) -> list[dict[str, str]]:
    """The best trial of every objective on figures that mean the same for all; none for one."""
    firsts: dict[str, Trial] = {}
    for trial in trials:
        firsts.setdefault(trial.objective, trial)
    if len(firsts) < 2:
        return []
    return [{"objective": name} | _same_figures(trial, goal) for name, trial in firsts.items()]


def _same_figures(trial: Trial, goal: Goal) -> dict[str, str]:
    """Figures of a trial's last evaluation, and the length of the answers that it sampled."""
    evaluation = latest(read_evaluations(trial.directory, trial.lines)).get(goal.prefix)
    estimates = evaluation.estimates if evaluation else {}
    row = {"trial": trial.name, "settings": format_settings(trial.values)}
    for name, label in _SAME_FOR_ALL.items():
        found = [figure for figure in estimates.get(name, ()) if figure is not None]
        shown = f"{found[0]:.4g}" if found else ""
        if len(found) == 3:
            shown += f" ({found[1]:.4g} to {found[2]:.4g})"
        row[label] = shown
    samples = list(read_lines(trial.directory / SAMPLES))
    lengths = [len(s["answer"]) for s in samples if s["step"] == samples[-1]["step"]]
    row["sampled answers, characters"] = f"{fmean(lengths):.0f}" if lengths else ""
    return row


def _cell(value: Any) -> str:
    """A setting or a metric in the table; empty where a trial has none."""
    if value is None:
        return ""
    return format_metric(value, ".4g") if isinstance(value, float) else format_setting(value)


def _curves(trials: Sequence[Trial], goal: Goal) -> tuple[str, str, str]:
    figure, axes = make_axes(len(HEADLINE), width=13.0)
    for axis, metric in zip(axes, HEADLINE, strict=True):
        for rank, trial in enumerate(trials):
            points = trial.evaluations(goal.prefix + metric.name)
            style = {"linewidth": 2.2, "zorder": 3} if rank == 0 else {"alpha": 0.55}
            label = f"{trial.name}{' (best)' if rank == 0 else ''}"
            axis.plot(*zip(*points, strict=True), label=label, **style) if points else None
        axis.set_title(goal.prefix + metric.name, fontsize=9)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=6)
    return ("Curves", "Held-out metrics at every evaluation, one line per trial.", svg_of(figure))


def _heat_map(trials: Sequence[Trial], goal: Goal) -> list[tuple[str, str, str]]:
    """The metric over beta and learning rate, where both were searched."""
    points = [
        (float(t.values["beta"]), float(t.values["learning_rate"]), t.last(goal.metric))
        for t in trials
        if {"beta", "learning_rate"} <= t.values.keys() and t.evaluations(goal.metric)
    ]
    if not points:
        return []
    figure, (axis,) = make_axes(1, width=6.0, height=4.2)
    betas, rates, values = (list(column) for column in zip(*points, strict=True))
    if len({*zip(betas, rates, strict=True)}) >= 4:
        _shade(axis, betas, rates, values)
    drawn = axis.scatter(betas, rates, c=values, s=90, cmap="viridis", edgecolors="black", zorder=3)
    for beta, rate, value in points:
        place = {"textcoords": "offset points", "xytext": (7, 5), "fontsize": 8}
        axis.annotate(f"{value:.3g}", (beta, rate), **place)
    axis.set(xscale="log", yscale="log", xlabel="beta", ylabel="learning rate")
    axis.margins(0.15)
    figure.colorbar(drawn, label=goal.metric)
    text = "Last evaluation of every trial; shading is interpolated."
    return [("Beta and learning rate", text, svg_of(figure))]


def _shade(axis: Any, betas: list[float], rates: list[float], values: list[float]) -> None:
    """Interpolate between the trials on their triangulation in log space."""
    from matplotlib.tri import LinearTriInterpolator, Triangulation, UniformTriRefiner

    try:
        coarse = Triangulation([math.log(b) for b in betas], [math.log(r) for r in rates])
    except (RuntimeError, ValueError):  # on one line, or a value of 0
        return
    between = LinearTriInterpolator(coarse, values)
    fine, shades = UniformTriRefiner(coarse).refine_field(values, between, subdiv=4)
    corners = ([math.exp(x) for x in fine.x], [math.exp(y) for y in fine.y])
    triangles = Triangulation(*corners, fine.triangles)
    axis.tricontourf(triangles, shades, levels=12, cmap="viridis", alpha=0.45)


def _log_probs(best: Trial, beta_zero: Trial, goal: Goal) -> tuple[str, str, str]:
    """Chosen and rejected log-probabilities over steps; Hong et al. 2024, figure 3."""
    figure, axes = make_axes(2)
    for axis, trial, title in zip(axes, (beta_zero, best), ("beta = 0", "best"), strict=True):
        for side, colour in (("chosen", "tab:green"), ("rejected", "tab:red")):
            points = trial.evaluations(f"{goal.prefix}logps/{side}")
            axis.plot(*zip(*points, strict=True), label=side, color=colour, marker="o", ms=3)
        axis.set(title=title, xlabel="step", ylabel=BY_NAME[f"logps/{side}"].heading)
        axis.legend(fontsize=8)
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    text = (
        "Without the odds-ratio term rejected answers become more likely together with chosen "
        "ones; with it they diverge."
    )
    return ("Chosen and rejected answers", text, svg_of(figure))


def _importance(trials: Sequence[Trial], goal: Goal) -> list[tuple[str, str, str]]:
    """Importance of each searched setting, by Optuna's PED-ANOVA (Watanabe et al. 2023)."""
    evaluated = [trial for trial in trials if trial.evaluations(goal.metric)]
    settings = {
        name: {repr(trial.values[name]) for trial in evaluated}
        for name in (evaluated[0].values if evaluated else ())
    }
    varied = [name for name, values in settings.items() if len(values) > 1]
    outcomes = {trial.last(goal.metric) for trial in evaluated}
    if len(evaluated) < _LEAST_FOR_IMPORTANCE or not varied or len(outcomes) < 2:
        return []
    shares = _shares(evaluated, varied, goal)
    figure, (axis,) = make_axes(1, width=6.0, height=0.9 + 0.4 * len(varied))
    axis.barh(list(shares), list(shares.values()))
    axis.set_xlabel(f"share in {goal.metric}")
    text = f"PED-ANOVA over {len(evaluated)} trials; with few trials no more than a hint."
    return [("Importance", text, svg_of(figure))]


def _shares(trials: Sequence[Trial], names: Sequence[str], goal: Goal) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, BaseDistribution] = {}
    for name in names:
        values = [trial.values[name] for trial in trials]
        if all(isinstance(value, int | float) for value in values):
            low, high = float(min(values)), float(max(values))
            space[name] = FloatDistribution(low, high, log=low > 0)
        else:
            space[name] = CategoricalDistribution(sorted({str(value) for value in values}))
    study = optuna.create_study(direction="maximize" if goal.mode == "max" else "minimize")
    for trial in trials:
        given = {
            name: float(trial.values[name])
            if isinstance(space[name], FloatDistribution)
            else str(trial.values[name])
            for name in names
        }
        study.add_trial(
            optuna.trial.create_trial(
                params=given, distributions=space, value=trial.last(goal.metric)
            )
        )
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(found.get(name, 0.0)) for name in sorted(names, key=found.get)}
