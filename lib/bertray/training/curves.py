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

# The ids in the file are random without a salt. Not the user's own style: it would change the file.
_STYLES: Any = ["default", "tableau-colorblind10", {"svg.hashsalt": "bertray", "font.size": 9.0, "axes.grid": True}]


def learning_curves(
    records: Sequence[StepRecord], history: Sequence[Mapping[str, float]], scores: Mapping[str, str], kept_epoch: int
) -> str:
    """The text of the SVG.

    Args:
        records: steps in order, whose losses are finite.
        history: metrics of every epoch. A value that is not finite leaves a gap.
        scores: those to show, and their names for people.
    """
    # Here, not above: half a second. Figure without pyplot keeps no global state.
    from matplotlib import style
    from matplotlib.figure import Figure

    steps, epochs = pd.DataFrame(records), pd.DataFrame(history).replace([np.inf, -np.inf], np.nan)
    with style.context(_STYLES):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        loss_axes, score_axes = figure.subplots(1, 2)
        if records:
            loss_axes.plot(steps["epoch"], steps["loss"], "C0", linewidth=0.8, label="train")
        for axes, what, shown in (
            (loss_axes, "loss", {"loss": "validation"}),
            (score_axes, "score on validation", scores),
        ):
            for colour, (metric, name) in enumerate(shown.items(), start=1):
                axes.plot(epochs["epoch"], epochs[metric], f"C{colour}o-", markersize=4, label=name)
            axes.axvline(kept_epoch, color="grey", linestyle="--", label=f"kept: epoch {kept_epoch}")
            axes.set(xlabel="epoch", ylabel=what)
            axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": "Learning curves", "Date": None, "Creator": None})
    return file.getvalue()
