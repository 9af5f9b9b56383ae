"""Learning curves for the model card: losses by step and scores by epoch, as one self-contained SVG.

    records of steps, history of epochs, kept epoch 2   ->   <svg>  loss: train (every step faint, mean of 40),
                                                                          validation (a point an epoch)
                                                                    scores: accuracy, macro-F1 (a point an epoch)
                                                                    both: a line at epoch 2

The same input gives the same bytes under the same version of matplotlib. What is not finite is left out, and counted.

Legend: T steps, P pieces of consecutive steps, E epochs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bertray.training.tracking import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A panel is some 400 pixels wide: of more steps the range is drawn, of as many pieces.
_MAX_POINTS = 400
# A mean is over this share of the steps, so that it follows the curve however long the run was.
_WINDOW_FRACTION = 1 / 30
# Scores of the history, single-label and multi-label, as far as an entry has them.
_SCORES = {
    "accuracy": "accuracy",
    "subset_accuracy": "subset accuracy",
    "f1_micro": "micro-F1",
    "f1_macro": "macro-F1",
}
_MAX_MARKERS = 40
# Okabe and Ito's colours, which people who are colour-blind can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"
_SCORE_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bertray",  # of the names that the file gives its parts; random otherwise
    "svg.fonttype": "path",  # whoever shows it need not have the font
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
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
        _draw_losses(loss_axes, records, history)
        _draw_scores(score_axes, history)
        last = max([1.0, *(record.epoch for record in records), *(entry["epoch"] for entry in history)])
        for axes in (loss_axes, score_axes):
            _finish(axes, last, kept_epoch)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": "Learning curves", "Date": None, "Creator": None})
    return file.getvalue()


def _draw_losses(axes: Axes, records: Sequence[StepRecord], history: Sequence[Mapping[str, float]]) -> None:
    latest = {record.step: record for record in records}
    ordered = [latest[step] for step in sorted(latest)]
    epochs_T = np.array([record.epoch for record in ordered], dtype=np.float64)
    losses_T = np.array([record.loss for record in ordered], dtype=np.float64)
    finite_T = np.isfinite(losses_T)
    epochs_T, losses_T = epochs_T[finite_T], losses_T[finite_T]
    tops = []
    if len(losses_T):
        window = max(1, round(len(losses_T) * _WINDOW_FRACTION))
        means_T = _moving_mean(losses_T, window)
        if len(losses_T) <= _MAX_POINTS:
            if window > 1:
                axes.plot(epochs_T, losses_T, color=_BLUE, alpha=0.3, linewidth=0.8, label="train, every step")
            drawn = np.arange(len(losses_T))
        else:
            starts_P = np.linspace(0, len(losses_T), _MAX_POINTS, endpoint=False, dtype=np.int64)
            lows_P, highs_P = np.minimum.reduceat(losses_T, starts_P), np.maximum.reduceat(losses_T, starts_P)
            axes.fill_between(
                epochs_T[starts_P], lows_P, highs_P, color=_BLUE, alpha=0.25, linewidth=0, label="train, every step"
            )
            drawn = np.append(starts_P, len(losses_T) - 1)
        label = f"train, mean of {window} steps" if window > 1 else "train, every step"
        marker = "o" if len(losses_T) == 1 else ""
        axes.plot(epochs_T[drawn], means_T[drawn], color=_BLUE, linewidth=1.4, marker=marker, markersize=4, label=label)
        # A few wild steps must not press all else to the bottom; they are cut off.
        tops += [means_T.max(), np.quantile(losses_T, 0.99)]
    losses_E = _plot_by_epoch(axes, history, "loss", "validation", _ORANGE)
    tops += losses_E.tolist()
    if tops:
        axes.set_ylim(0, 1.05 * max(*tops, 1e-6))
    axes.set_ylabel("loss")
    _label(axes, has_data=bool(tops), num_left_out=int((~finite_T).sum()) + len(history) - len(losses_E))


def _draw_scores(axes: Axes, history: Sequence[Mapping[str, float]]) -> None:
    scores: list[float] = []
    num_left_out = 0
    names = [name for name in _SCORES if any(name in entry for entry in history)]
    for name, colour in zip(names, _SCORE_COLOURS, strict=False):
        scores_E = _plot_by_epoch(axes, history, name, _SCORES[name], colour)
        scores += scores_E.tolist()
        num_left_out += len(history) - len(scores_E)
    if scores:
        margin = max(0.02, 0.1 * (max(scores) - min(scores)))
        axes.set_ylim(max(-0.01, min(scores) - margin), min(1.01, max(scores) + margin))
    axes.set_ylabel("score on validation")
    _label(axes, has_data=bool(scores), num_left_out=num_left_out)


def _plot_by_epoch(
    axes: Axes, history: Sequence[Mapping[str, float]], name: str, label: str, colour: str
) -> np.ndarray:
    """Draw one metric of the history; returns its finite values."""
    values_E = np.array([entry.get(name, np.nan) for entry in history], dtype=np.float64)
    finite_E = np.isfinite(values_E)
    epochs_E = np.array([entry["epoch"] for entry in history], dtype=np.float64)[finite_E]
    if finite_E.any():
        marker = "o" if len(history) <= _MAX_MARKERS else ""
        axes.plot(epochs_E, values_E[finite_E], color=colour, linewidth=1.4, marker=marker, markersize=4, label=label)
    return values_E[finite_E]


def _label(axes: Axes, *, has_data: bool, num_left_out: int) -> None:
    axes.set_xlabel(f"epoch ({num_left_out} values are not finite, and left out)" if num_left_out else "epoch")
    if not has_data:
        axes.text(0.5, 0.5, "nothing recorded", color=_GREY, ha="center", va="center", transform=axes.transAxes)


def _finish(axes: Axes, last_epoch: float, kept_epoch: int | None) -> None:
    """What the panels share: the same epochs from left to right, the kept one marked."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, 1.02 * last_epoch)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=last_epoch >= 3))
    if kept_epoch is not None:
        axes.axvline(kept_epoch, color=_GREY, linestyle="--", linewidth=1.0, label=f"kept: epoch {kept_epoch}")
    if axes.get_legend_handles_labels()[0]:
        # Above the panel, where it covers no curve.
        axes.legend(fontsize="small", ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _moving_mean(values_T: np.ndarray, window: int) -> np.ndarray:
    """Mean of up to `window` values around each one; fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values_T)])
    positions_T = np.arange(len(values_T))
    starts_T = np.maximum(0, positions_T - window // 2)
    ends_T = np.minimum(len(values_T), positions_T - window // 2 + window)
    means_T: np.ndarray = (sums[ends_T] - sums[starts_T]) / (ends_T - starts_T)
    return means_T
