"""Learning curves for the model card: losses by step and scores by epoch, as one self-contained SVG.

The same input gives the same bytes with the same version of matplotlib.

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

# The mean is taken over this share of the steps, so that it follows the curve of a short and of a long run.
_WINDOW_FRACTION = 1 / 30
# Metrics of an epoch, which has some of them, with Okabe and Ito's colours: colour-blind people can tell them apart.
_LOSS = {"loss": ("validation", "#D55E00")}
_SCORES = {
    "accuracy": ("accuracy", "#009E73"),
    "subset_accuracy": ("subset accuracy", "#009E73"),
    "f1_micro": ("micro-F1", "#E69F00"),
    "f1_macro": ("macro-F1", "#CC79A7"),
}
_BLUE, _GREY = "#0072B2", "#666666"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bertray",  # for the ids in the file, which are random otherwise
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}


def learning_curves(records: Sequence[StepRecord], history: Sequence[Mapping[str, float]], kept_epoch: int) -> str:
    """The text of the SVG.

    Args:
        records: steps in order, whose losses are finite.
        history: metrics of every epoch. A value that is not finite leaves a gap.
    """
    # Here, not above: half a second. Figure without pyplot keeps no global state.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        loss_axes, score_axes = figure.subplots(1, 2)
        top = max(_draw_losses(loss_axes, records), _draw_epochs(loss_axes, history, _LOSS))
        _draw_epochs(score_axes, history, _SCORES)
        for axes, name in ((loss_axes, "loss"), (score_axes, "score on validation")):
            axes.set_ylabel(name)
            axes.set_xlabel("epoch")
            axes.set_xlim(left=0)
            axes.axvline(kept_epoch, color=_GREY, linestyle="--", linewidth=1.0, label=f"kept: epoch {kept_epoch}")
            # Above, where it covers no curve.
            axes.legend(fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        loss_axes.set_ylim(0, 1.05 * top or None)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": "Learning curves", "Date": None, "Creator": None})
    return file.getvalue()


def _draw_losses(axes: Axes, records: Sequence[StepRecord]) -> float:
    """Draw every step and a running mean; returns the loss that must be visible: a few wild steps may be cut off."""
    if not records:
        return 0.0
    epochs_T, losses_T = (np.array([getattr(one, name) for one in records]) for name in ("epoch", "loss"))
    axes.plot(epochs_T, losses_T, color=_BLUE, alpha=0.3, linewidth=0.8, label="train, every step")
    means_T = losses_T
    if (window := round(len(records) * _WINDOW_FRACTION)) > 1:
        sums_T, counts_T = (
            np.convolve(values_T, np.ones(window), "same") for values_T in (losses_T, np.ones_like(losses_T))
        )
        means_T = sums_T / counts_T
        axes.plot(epochs_T, means_T, color=_BLUE, linewidth=1.4, label=f"train, mean of {window} steps")
    return float(max(means_T.max(), np.quantile(losses_T, 0.99)))


def _draw_epochs(axes: Axes, history: Sequence[Mapping[str, float]], metrics: Mapping[str, tuple[str, str]]) -> float:
    """Draw those of the metrics that the history has; returns the highest value."""
    top = 0.0
    for name, (label, colour) in metrics.items():
        if name not in history[0]:
            continue
        values_E = np.array([entry[name] for entry in history])
        values_E[~np.isfinite(values_E)] = np.nan
        epochs_E = [entry["epoch"] for entry in history]
        axes.plot(epochs_E, values_E, color=colour, linewidth=1.4, marker="o", markersize=4, label=label)
        top = np.nanmax(values_E, initial=top)
    return top
