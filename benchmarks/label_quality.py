"""How many wrong labels does bertray audit find, beside TF-IDF + logistic regression? Labels are made wrong on purpose.

    python -m benchmarks.label_quality                              banking77, MiniLM, 5 folds of 5 epochs
    python -m benchmarks.label_quality --rows 1500 --epochs 1

Of the training rows a share (5 %) gets another label, drawn at random among all others, with a seed. Both methods rank
all rows by the quality of their labels, which cleanlab takes from out-of-fold probabilities: those of bertray audit,
and those of a logistic regression by scikit-learn's cross_val_predict. Whoever looks at the first 5 % of a ranking
finds this share of the wrong labels (recall), and that many of the rows looked at are wrong (precision). What was wrong
in the data set before counts as right, so that no method reaches 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from benchmarks.results import SHARED_DATA, write_result
from bertray.data.cleaning import clean, comparison_keys
from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.data.prepare import prepare
from bertray.data.readers import read_labelled
from bertray.drivers.audit import audit
from bertray.formats.files import find_files
from bertray.metrics import baseline
from bertray.schema import LABEL, LABEL_ID, TEXT
from bertray.training.config import AuditConfig


def prepared(
    name: str, folder: Path, num_rows: int | None, flip_fraction: float, seed: int
) -> tuple[Dataset, np.ndarray]:
    """A data set of which some training labels are wrong, and which of its training rows they are (bool)."""
    rng = np.random.default_rng(seed)
    source = str(SHARED_DATA / name / "train.parquet")
    # Cleaned before, so that no flip makes two equal texts contradict each other.
    rows = clean(
        read_labelled(find_files(str(source), ["text", "label"]), PrepareConfig(input=[str(source)], output="output"))
    ).rows
    rows = rows.take(pa.array(rng.permutation(rows.num_rows)[:num_rows]))
    labels, ids = np.unique(rows[LABEL].to_pylist(), return_inverse=True)
    flipped = rng.choice(rows.num_rows, round(flip_fraction * rows.num_rows), replace=False)
    ids[flipped] = (ids[flipped] + rng.integers(1, len(labels), len(flipped))) % len(labels)
    pq.write_table(pa.table({"text": rows[TEXT], "label": pa.array(labels[ids])}), folder / "train.parquet")
    places = {"output": str(folder / "data")}
    for split in ("validation", "test"):  # never read, but a data set has three splits
        places[split] = str(folder / f"{split}.csv")
        held_out = [f"{split} {row},{labels[row]}\n" for row in range(2)]
        Path(places[split]).write_text("".join(["text,label\n", *held_out]))
    prepare(PrepareConfig(input=[str(folder / "train.parquet")], **places))
    dataset = Dataset.open(places["output"])
    wrong = comparison_keys(rows.take(pa.array(flipped))).to_pylist()
    return dataset, np.isin(comparison_keys(dataset.split("train")).to_pylist(), wrong)


def baseline_quality(dataset: Dataset, num_folds: int, seed: int) -> np.ndarray:
    """Quality of every training row's label by TF-IDF + logistic regression, as `bertray.metrics.baseline` has them."""
    rows = dataset.split("train")
    texts, ids = rows[TEXT].to_pylist(), rows[LABEL_ID].to_numpy()
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    probabilities_NC = cross_val_predict(baseline.classifier(texts), texts, ids, cv=folds, method="predict_proba")
    return np.asarray(get_label_quality_scores(ids, probabilities_NC))


def found(quality_N: np.ndarray, is_wrong_N: np.ndarray, inspected: float) -> dict[str, float]:
    """What a look at the worst rows of a ranking brings."""
    worst = np.argsort(quality_N, kind="stable")[: round(inspected * len(quality_N))]
    num_found = int(is_wrong_N[worst].sum())
    return {
        "recall": num_found / int(is_wrong_N.sum()),
        "precision": num_found / len(worst),
        "average_precision": float(average_precision_score(is_wrong_N, -np.nan_to_num(quality_N))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="banking77", help="a data set of ../shared/data with one label a row")
    parser.add_argument("--rows", type=int, help="take so many training rows at random; default: all")
    parser.add_argument("--flip-fraction", type=float, default=0.05)
    parser.add_argument("--inspected", type=float, default=0.05)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not SHARED_DATA.is_dir():
        sys.exit(f"no data sets at {SHARED_DATA}")
    with tempfile.TemporaryDirectory(prefix="bertray-benchmark-") as temporary:
        folder = Path(temporary)
        dataset, is_wrong_N = prepared(arguments.data, folder, arguments.rows, arguments.flip_fraction, arguments.seed)
        started_s = time.perf_counter()
        simplest_N = baseline_quality(dataset, arguments.folds, arguments.seed)
        walls_s = {"TF-IDF + logistic regression": time.perf_counter() - started_s}
        started_s = time.perf_counter()
        audited = audit(
            AuditConfig(
                data=str(dataset.location),
                output=str(folder / "audit"),
                **{name: getattr(arguments, name) for name in ("encoder", "epochs", "learning_rate", "folds", "seed")},
            )
        )
        walls_s["jobs.audit"] = time.perf_counter() - started_s
        suspects = audited.suspects["row"].to_numpy()
    rankings = {"jobs.audit": audited.quality_N, "TF-IDF + logistic regression": simplest_N}
    results = {name: found(quality_N, is_wrong_N, arguments.inspected) for name, quality_N in rankings.items()}
    lines = [
        f"| ranking | recall at {arguments.inspected:.0%} inspected | precision | average precision | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, one in results.items():
        values = " | ".join(f"{one[key]:.3f}" for key in ("recall", "precision", "average_precision"))
        lines.append(f"| {name} | {values} | {walls_s[name]:.0f} |")
    facts = {
        **vars(arguments),
        "num_rows": len(is_wrong_N),
        "num_wrong": int(is_wrong_N.sum()),
        "num_suspects": len(suspects),
        "num_suspects_wrong": int(is_wrong_N[suspects].sum()),
        "noise_estimated": audited.report["noise"],
        "out_of_fold": audited.report["out_of_fold"],
        "results": results,
        "wall_s": walls_s,
    }
    write_result("label_quality", arguments.data, "\n".join(lines), json.loads(json.dumps(facts)))


if __name__ == "__main__":
    main()
