"""Learning curves for the model card: losses by step and scores by epoch, as one self-contained SVG.

The same input gives the same bytes with the same version of matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bertray.training.tracking import StepRecord

# The mean is taken over this share of the steps, so that it follows the curve of a short and of a long run.
_WINDOW_FRACTION = 1 / 30
# Metrics of an epoch, which has some of them.
_LOSS = {"loss": "validation"}
_SCORES = {
    "accuracy": "accuracy",
    "subset_accuracy": "subset accuracy",
    "f1_micro": "micro-F1",
    "f1_macro": "macro-F1",
    "r2": "r2",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
_LOOK = {"font.size": 9.0, "axes.grid": True, "grid.color": "#E6E6E6", "legend.frameon": False}
# The ids in the file are random without a salt. Not the user's own style: it would change the file.
_STYLES: Any = ["default", "tableau-colorblind10", {"svg.hashsalt": "bertray", **_LOOK}]


def learning_curves(records: Sequence[StepRecord], history: Sequence[Mapping[str, float]], kept_epoch: int) -> str:
    """The text of the SVG.

    Args:
        records: steps in order, whose losses are finite.
        history: metrics of every epoch. A value that is not finite leaves a gap.
    """
    # Here, not above: half a second. Figure without pyplot keeps no global state.
    from matplotlib import style
    from matplotlib.figure import Figure

    steps, epochs = pd.DataFrame(records), pd.DataFrame(history).replace([np.inf, -np.inf], np.nan)
    with style.context(_STYLES):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        loss_axes, score_axes = figure.subplots(1, 2)
        top = epochs["loss"].max()
        if records:
            loss_axes.plot(steps["epoch"], steps["loss"], "C0", alpha=0.3, linewidth=0.8, label="train, every step")
            window = max(1, round(len(records) * _WINDOW_FRACTION))
            means = steps["loss"].rolling(window, center=True, min_periods=1).mean()
            if window > 1:
                loss_axes.plot(steps["epoch"], means, "C0", label=f"train, mean of {window} steps")
            top = np.nanmax([top, means.max(), steps["loss"].quantile(0.99)])  # a few wild steps may be cut off
        for axes, name, metrics in ((loss_axes, "loss", _LOSS), (score_axes, "score on validation", _SCORES)):
            for colour, metric in enumerate((one for one in metrics if one in epochs), start=1):
                axes.plot(epochs["epoch"], epochs[metric], f"C{colour}o-", markersize=4, label=metrics[metric])
            axes.set_ylabel(name)
            axes.set_xlabel("epoch")
            axes.set_xlim(left=0)
            axes.axvline(kept_epoch, color="grey", linestyle="--", linewidth=1.0, label=f"kept: epoch {kept_epoch}")
            # Above, where it covers no curve.
            axes.legend(fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        loss_axes.set_ylim(0, 1.05 * top if top > 0 else None)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": "Learning curves", "Date": None, "Creator": None})
    return file.getvalue()
