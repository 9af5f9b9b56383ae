"""Tables that people read: everything in them, nothing that misleads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertray.metrics.classification import full_metrics, out_of_scope_metrics
from bertray.reports.terminal import (
    SUMMARY_METRICS,
    print_dataset,
    print_evaluation,
    print_look,
    print_scoring,
    print_trials,
)
from bertray.training.trials import TrialRecord
from tests.conftest import write_shard


def test_data_set_with_many_labels(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {f"label {number:02}": {"train": number, "validation": 1, "test": 2} for number in range(40)}
    print_dataset(
        {
            "labels": labels,
            "splits": {"train": 780, "validation": 40, "test": 80},
            "num_rows_in": 905,
            "num_rows_kept": 900,
            "num_rows_out": {"duplicate": 5},
        }
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "label 29" in captured.err
    assert "label 30" not in captured.err
    assert "10 more labels" in captured.err
    assert "905 rows read, 900 kept; taken out: 5 duplicate" in captured.err


def test_rows_by_their_number_of_labels(capsys: pytest.CaptureFixture[str]) -> None:
    by_split = [dict(zip(("train", "validation", "test"), counts, strict=True)) for counts in ((7, 3, 2), (1, 4, 5))]
    print_dataset(
        {
            "labels": {"a": by_split[0]},
            "splits": {"train": 8, "validation": 7, "test": 6},
            "num_rows_by_labels": {"0": by_split[0], "1": by_split[1], "3+": by_split[0]},
            "num_rows_in": 21,
            "num_rows_kept": 21,
            "num_rows_out": {},
        }
    )
    lines = [line.split() for line in capsys.readouterr().err.replace("│", "").splitlines()]
    assert ["rows", "with", "0", "labels", "7", "3", "2"] in lines
    assert ["rows", "with", "1", "label", "1", "4", "5"] in lines
    assert ["rows", "with", "3+", "labels", "7", "3", "2"] in lines
    assert ["all", "8", "7", "6"] in lines


@pytest.mark.parametrize("is_class", [True, False])
def test_rows_out_of_scope_have_a_line_after_many_classes(is_class: bool, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"train": 7 * is_class, "validation": 8, "test": 9}
    labels = {f"label {number:02}": dict.fromkeys(counts, 1) for number in range(40)}
    if is_class:
        labels = {"aside": counts} | labels
    splits = {"train": 47, "validation": 48, "test": 49}
    kept = {"num_rows_in": 144, "num_rows_kept": 144, "num_rows_out": {}}
    print_dataset({"labels": labels, "splits": splits, "oos_label": "aside", "num_rows_oos": counts, **kept})
    text = capsys.readouterr().err
    assert "10 more labels" in text
    kind = "a class" if is_class else "no class"
    (line,) = [line for line in text.replace("│", "").splitlines() if "aside" in line]
    assert line.split() == f"aside (out of scope, {kind}) {7 * is_class} 8 9".split()


INTERVALS = {"difference_intervals": dict.fromkeys(SUMMARY_METRICS, (-0.1, 0.3))}
HOW_SURE: dict[str, Any] = {"ece": 0.03124, "nll": 0.5, "review": None, "out_of_scope": None}


def test_evaluation_says_how_sure_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = full_metrics(np.array([0, 1]), np.array([0, 1]), ("a", "b"))
    metrics |= {
        "split": "test",
        "baseline": {**metrics, "name": "the baseline", "num_training_rows": 1200, **INTERVALS},
        **HOW_SURE,
    }
    metrics["review"] = {"review_below": 0.61, "target_precision": 0.95, "coverage": 0.0, "precision": None}
    scope = out_of_scope_metrics(np.array([0, -1, -1, 1]), np.array([0, -1, 1, -1]), np.array([0.9, 0.1, 0.8, 0.3]))
    metrics["out_of_scope"] = {"label": "oos", "is_class": False, "threshold": 0.5, **scope}
    print_evaluation(metrics)
    lines = [[*map(str.strip, line.split("│"))][1:3] for line in capsys.readouterr().err.splitlines() if "│" in line]
    for line in (
        ["rows below this score are to be reviewed", "0.6100"],
        ["coverage: rows that need no review", "0.0000"],
        ["precision of their labels (wanted: 0.95)", "no rows"],
        ["out of scope: 2 of 4 rows; rejected by", "score below 0.5000"],
        ["in-scope accuracy (a rejected row is wrong)", "0.5000"],
        ["out-of-scope recall (rows rejected)", "0.5000"],
        ["AUROC of the score", "0.7500"],
    ):
        assert line in lines
    print_evaluation({**metrics, "review": {**metrics["review"], "review_below": 2.0}})
    assert "every row" in capsys.readouterr().err
    for changed, shown in (({"is_class": True}, "class oos"), ({"threshold": None}, "no threshold")):
        print_evaluation({**metrics, "out_of_scope": {**metrics["out_of_scope"], **changed}})
        assert shown in capsys.readouterr().err


def test_evaluation_of_several_labels_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    true_NC = np.array([[1, 0], [1, 1]])
    metrics = full_metrics(true_NC, np.array([[1, 0], [1, 0]]), ("good", "weak"))
    metrics |= {
        "split": "test",
        "baseline": {**metrics, "name": "the baseline", "num_training_rows": 1200, **INTERVALS},
        **HOW_SURE,
    }
    print_evaluation(metrics)
    text = capsys.readouterr().err
    assert "subset_accuracy" in text and "f1_micro" in text
    assert "most often taken for" not in text and "threshold" not in text
    for scores in metrics["per_class"].values():
        scores["threshold"] = 0.123
    print_evaluation(metrics)
    assert "0.123" in capsys.readouterr().err


def test_evaluation_puts_the_weakest_class_first(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = full_metrics(np.array([0, 0, 0, 1] * 5), np.array([0, 0, 1, 1] * 5), ("good", "weak"))
    metrics |= {
        "split": "test",
        "baseline": {**metrics, "name": "the baseline", "num_training_rows": 1200, "accuracy": 0.5, **INTERVALS},
        **HOW_SURE,
    }
    print_evaluation(metrics)
    text = capsys.readouterr().err
    assert "0.0312" in text
    assert "review" not in text
    assert "scope" not in text
    assert "+0.250 (-0.100 to +0.300)" in text
    assert text.index("│ weak") < text.index("│ good")
    assert "weak (5)" in text
    print_evaluation({**metrics, "num_rows": 19})  # too few for an interval
    assert "+0.250 " in (text := capsys.readouterr().err) and "to +0.300" not in text


def test_labels_are_neither_markup_nor_commands_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("[/b]", "[other]", ":smile:", "\x1b[31mred", "\u202eback", "two\nlines")
    labels = {label: {"train": 1, "validation": 1, "test": 1} for label in names}
    splits = {"train": 3, "validation": 3, "test": 3}
    print_dataset({"labels": labels, "splits": splits, "num_rows_in": 9, "num_rows_kept": 9, "num_rows_out": {}})
    text = capsys.readouterr().err
    for shown in (*names[:3], "\\x1b[31mred", "\\u202eback", "two\\nlines"):
        assert shown in text
    assert not {"\x1b", "\u202e"} & set(text)


def test_failed_shards_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    print_scoring({"num_rows": 12345}, [{"path": f"{number}.parquet", "reason": "broken"} for number in range(31)])
    text = capsys.readouterr().err
    assert "12,345" in text
    print_scoring({"num_rows_error": 0, "num_shards_gone": 0, "held_because": [], "hours_estimated": 0.0}, [])
    text += capsys.readouterr().err
    assert "num_rows_error" in text and "hours_estimated" in text
    assert "num_shards_gone" not in text and "held_because" not in text
    assert "29.parquet" in text
    assert "1 more in the run's summary.json" in text


def test_a_look_at_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["one\ntwo", None, "x" * 500]
    write_shard(tmp_path / "archive" / "d=1" / "a.parquet", texts)
    write_shard(
        tmp_path / "predictions" / "d=1" / "a.parquet",
        texts,
        label=["a", None, "b"],
        score=[0.5, None, 1.0],
        error=[None, "text is null", None],
    )
    print_look(tmp_path / "archive", tmp_path / "predictions", num_rows=3)
    text = capsys.readouterr().err
    for words in ("one two", "0.500", "text is null", "1.000", "…"):
        assert words in text


def test_a_table_of_trials_has_what_they_differ_in(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"learning_rate": 5e-5, "batch_size": 32, "epochs": 3, "warmup_fraction": 0.1, "label_smoothing": 0.0}
    given |= {"layer_decay": 1.0}
    trials = [
        TrialRecord(number=number, options={**given, "seed": number}, status="done", history=[], best_epoch=0)
        for number in (0, 1)
    ]
    print_trials(trials)
    shown = capsys.readouterr().err
    assert "seed" in shown and "epochs run" in shown and "learning" not in shown
    print_trials([trials[0], trials[1].model_copy(update={"options": {**trials[1].options, "learning_rate": 1e-4}})])
    shown = capsys.readouterr().err
    assert "learning rate" in shown and "0.0001" in shown and "seed" not in shown
