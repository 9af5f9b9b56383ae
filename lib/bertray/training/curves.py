"""Learning curves for the model card: losses by step and scores by epoch, as one self-contained SVG.

The same input gives the same bytes under the same version of matplotlib. What is not finite is left out, and counted.

Legend: T steps, E epochs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bertray.training.tracking import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A mean is over this share of the steps, so that it follows the curve however long the run was.
_WINDOW_FRACTION = 1 / 30
# Scores of the history, single-label and multi-label, as far as an entry has them.
_SCORES = {
    "accuracy": "accuracy",
    "subset_accuracy": "subset accuracy",
    "f1_micro": "micro-F1",
    "f1_macro": "macro-F1",
}
# Okabe and Ito's colours, which people who are colour-blind can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"
_SCORE_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bertray",  # of the names that the file gives its parts; random otherwise
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}


def learning_curves(
    records: Sequence[StepRecord], history: Sequence[Mapping[str, float]], kept_epoch: int | None
) -> str:
    """The text of the SVG.

    Args:
        records: of two of the same step, as after a restart, the later one counts.
        history: one entry an epoch: `epoch`, `loss` on validation and scores.
        kept_epoch: to be marked; None: there is none.
    """
    # Here, not above: half a second. Figure alone, without pyplot, keeps no state outside.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what a matplotlibrc of the user's says
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        loss_axes, score_axes = figure.subplots(1, 2)
        num_left_out = _draw_losses(loss_axes, records)
        num_left_out += _draw_epochs(loss_axes, history, {"loss": "validation"}, (_ORANGE,))
        _finish(loss_axes, "loss", kept_epoch, num_left_out)
        num_left_out = _draw_epochs(score_axes, history, _SCORES, _SCORE_COLOURS)
        _finish(score_axes, "score on validation", kept_epoch, num_left_out)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": "Learning curves", "Date": None, "Creator": None})
    return file.getvalue()


def _draw_losses(axes: Axes, records: Sequence[StepRecord]) -> int:
    """Every step, and their mean; returns how many are not finite."""
    import pandas as pd

    columns = {name: [float(getattr(one, name)) for one in records] for name in ("step", "epoch", "loss")}
    losses = pd.DataFrame(columns, dtype=float)
    losses = losses.drop_duplicates("step", keep="last").sort_values("step")
    finite = losses[np.isfinite(losses["loss"])]
    if len(finite):
        window = max(1, round(len(finite) * _WINDOW_FRACTION))
        means_T = finite["loss"].rolling(window, center=True, min_periods=1).mean()
        axes.plot(finite["epoch"], finite["loss"], color=_BLUE, alpha=0.3, linewidth=0.8, label="train, every step")
        if window > 1:
            axes.plot(finite["epoch"], means_T, color=_BLUE, linewidth=1.4, label=f"train, mean of {window} steps")
        # A few wild steps must not press all else to the bottom; they are cut off.
        axes.set_ylim(0, 1.05 * max(means_T.max(), finite["loss"].quantile(0.99), 1e-6))
    return len(losses) - len(finite)


def _draw_epochs(
    axes: Axes, history: Sequence[Mapping[str, float]], labels: Mapping[str, str], colours: Sequence[str]
) -> int:
    """Metrics of the history, as far as it has them; returns how many values are not finite."""
    num_left_out = 0
    named = [name for name in labels if any(name in entry for entry in history)]
    for name, colour in zip(named, colours, strict=False):
        points = [(entry["epoch"], entry[name]) for entry in history if np.isfinite(entry.get(name, np.nan))]
        num_left_out += len(history) - len(points)
        if points:
            epochs_E, values_E = zip(*points, strict=True)
            axes.plot(epochs_E, values_E, color=colour, linewidth=1.4, marker="o", markersize=4, label=labels[name])
            if name == "loss":
                axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * max(values_E)))
    return num_left_out


def _finish(axes: Axes, what: str, kept_epoch: int | None, num_left_out: int) -> None:
    """What the panels share: labels, the kept epoch marked, the legend above, where it covers no curve."""
    axes.set_ylabel(what)
    axes.set_xlabel(f"epoch ({num_left_out} values are not finite, and left out)" if num_left_out else "epoch")
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing recorded", color=_GREY, ha="center", va="center", transform=axes.transAxes)
        return
    axes.set_xlim(left=0)
    if kept_epoch is not None:
        axes.axvline(kept_epoch, color=_GREY, linestyle="--", linewidth=1.0, label=f"kept: epoch {kept_epoch}")
    axes.legend(fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
