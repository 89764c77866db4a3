"""The curves of the benchmark's own training runs, as one picture."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from orpo_ray.runs.files import read_metrics

_PANELS = (
    ("NLL of chosen answers, nats/token", {"nll_loss": "-"}),
    ("log odds of chosen over rejected", {"log_odds_chosen": "-"}),
    ("log-probability per token, nats", {"logps/chosen": "-", "logps/rejected": "--"}),
)
_COLOURS = (
    *("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:cyan", "tab:red", "tab:brown"),
    *("tab:pink", "tab:olive", "tab:gray"),
)


def write_curves(path: Path, runs: Mapping[str, Sequence[Path]]) -> None:
    """Draw what was logged of training batches, a line a seed; the first panel names the colours.

    Args:
        path: of the PNG.
        runs: run directories by kind of side.
    """
    figure = Figure(figsize=(11, 3))
    axes = figure.subplots(1, len(_PANELS))
    for (kind, folders), colour in zip(runs.items(), itertools.cycle(_COLOURS), strict=False):
        for index, folder in enumerate(folders):
            lines = [line for line in read_metrics(folder) if "loss" in line]
            for axis, (_, metrics) in zip(axes, _PANELS, strict=True):
                for metric, style in metrics.items():
                    points = [(one["step"], one[metric]) for one in lines if metric in one]
                    label = None if index or axis is not axes[0] else kind
                    if points:
                        steps, values = zip(*points, strict=True)
                        axis.plot(steps, values, style, color=colour, lw=1.1, label=label)
    for axis, (title, _) in zip(axes, _PANELS, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=6.5)
    styles = {name.removeprefix("logps/"): style for name, style in _PANELS[-1][1].items()}
    for name, style in styles.items():
        axes[-1].plot([], [], style, color="black", lw=1.1, label=name)
    axes[-1].legend(fontsize=6.5)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.17, top=0.89, wspace=0.2)
    figure.savefig(path, dpi=100)
