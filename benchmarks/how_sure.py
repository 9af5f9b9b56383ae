"""Temperatures and thresholds of metrics.calibration on real texts: do they hold on rows that they were not chosen on?

    python -m benchmarks.how_sure
    python -m benchmarks.how_sure --train-rows 2000 --draws 10

Scores come from a small head, trained here on the mean of a frozen MiniLM's states: nothing is fine-tuned, so that it
takes minutes; of clinc150 for 3 epochs (too modest) and for 30 (too sure). From the validation rows so many are drawn,
again and again; what is chosen on a draw is measured on all test rows.

Legend: N rows, C classes, D size of a state.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModel

from benchmarks.results import SHARED_DATA, write_result
from bertray.metrics.calibration import (
    TEMPERATURE_BOUNDS,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    threshold_for_precision,
    tune_thresholds,
)
from bertray.metrics.classification import full_metrics
from bertray.model.pretrained import NO_CODE, load_tokenizer
from bertray.model.sources import encoder_folder
from bertray.tasks.multi_label import is_given
from bertray.tokenization.batching import pad, padded_batches
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.types import ProblemType

NUM_ROWS = (20, 100, 500, 2000)
PRECISIONS = (0.95, 0.98)
Logits = dict[str, tuple[np.ndarray, np.ndarray]]  # by split: logits_NC and targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-rows", type=int, default=20_000, help="at most so many of a data set")
    parser.add_argument("--draws", type=int, default=50, help="of validation rows")
    options = parser.parse_args()
    if not SHARED_DATA.is_dir():
        sys.exit(f"{SHARED_DATA} is missing: it holds clinc150 and goemotions_multilabel")
    started_s = time.monotonic()
    clinc = _states("clinc150", {"train": "train", "validation": "dev", "test": "test"}, options.train_rows)
    emotions = {"train": "train", "validation": "dev", "test": "test"}
    emotions_states = _states("goemotions_multilabel", emotions, options.train_rows)
    singles = {f"clinc150, {epochs} epochs": _head(clinc, epochs, several=False) for epochs in (3, 30)}
    several = _head(emotions_states, 8, several=True)
    lines = [
        *_temperatures({**singles, "goemotions, 8 epochs": several}, options.draws),
        "",
        *_label_thresholds(several, options.draws),
        "",
        *_review_thresholds(singles, options.draws),
    ]
    facts: dict[str, Any] = {"encoder": "minilm", "train_rows": options.train_rows, "draws": options.draws}
    facts["wall_s"] = round(time.monotonic() - started_s)
    write_result("how_sure", "clinc150-goemotions", "\n".join(lines), facts)


@torch.inference_mode()
def _states(name: str, files: dict[str, str], num_train_rows: int) -> dict[str, tuple[np.ndarray, list[str]]]:
    """By split: states_ND, of unit length, and the label column."""
    reference, _ = load_tokenizer("minilm", 64)
    tokenizer = ColumnTokenizer(reference.backend_tokenizer, 64)
    model = AutoModel.from_pretrained(encoder_folder("minilm"), **NO_CODE).eval().bfloat16()
    found = {}
    for split, file in files.items():
        rows = pq.read_table(SHARED_DATA / name / f"{file}.parquet")
        if split == "train" and len(rows) > num_train_rows:
            rows = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))[:num_train_rows]))
        tokens = tokenizer.encode(rows["text"])
        states_ND = np.empty((len(rows), model.config.hidden_size), dtype=np.float32)
        for batch in padded_batches(tokens.lengths_S, 2048):
            ids_BL, mask_BL = map(torch.from_numpy, pad(tokens, batch, model.config.pad_token_id))
            states_BLD = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()
            means_BD = (states_BLD * mask_BL[..., None]).sum(dim=1)
            states_ND[batch] = torch.nn.functional.normalize(means_BD, dim=1).numpy()
        found[split] = states_ND, rows["label"].to_pylist()
        print(f"{name}, {split}: {len(rows)} rows", flush=True)
    return found


def _head(states: dict[str, tuple[np.ndarray, list[str]]], num_epochs: int, *, several: bool) -> Logits:
    """Train a head of two layers; logits and targets of the other splits."""
    torch.manual_seed(0)
    labels = sorted({label for given in states["train"][1] for label in given.split(";")})
    ids = {label: number for number, label in enumerate(labels)}

    def targets(column: list[str]) -> np.ndarray:
        if not several:
            return np.array([ids[label] for label in column])
        true_NC = np.zeros((len(column), len(labels)), dtype=np.float32)
        for row, given in enumerate(column):
            true_NC[row, [ids[label] for label in given.split(";")]] = 1
        return true_NC

    states_ND, true = torch.from_numpy(states["train"][0]), torch.from_numpy(targets(states["train"][1]))
    head = torch.nn.Sequential(
        torch.nn.Linear(states_ND.shape[1], 256),
        torch.nn.GELU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(256, len(labels)),
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    loss = binary_cross_entropy_with_logits if several else cross_entropy
    for _ in range(num_epochs):
        for batch in torch.randperm(len(states_ND)).split(128):
            optimizer.zero_grad()
            loss(head(states_ND[batch]), true[batch]).backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        return {
            split: (head(torch.from_numpy(states[split][0])).numpy(), targets(states[split][1]))
            for split in ("validation", "test")
        }


def _drawn(logits: Logits, num_rows: int, num_draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Validation rows, drawn without repeats."""
    rng = np.random.default_rng(0)
    logits_NC, targets = logits["validation"]
    for _ in range(num_draws):
        rows = rng.permutation(len(logits_NC))[:num_rows]
        yield logits_NC[rows], targets[rows]


def _without_prior(logits_NC: np.ndarray, targets: np.ndarray) -> float:
    """The temperature of the least loss."""
    found = minimize_scalar(
        lambda log_temperature: negative_log_likelihood(logits_NC / np.exp(log_temperature), targets),
        bounds=np.log(TEMPERATURE_BOUNDS),
        method="bounded",
    )
    return float(np.exp(found.x))


def _temperatures(all_logits: dict[str, Logits], num_draws: int) -> list[str]:
    lines = [
        "Temperatures (median; least to largest), and what they make of the test rows: negative log-likelihood (mean; "
        "largest of the draws) and expected calibration error (mean). `alone`: of the rows alone, without "
        "the prior of `fit_temperature`.",
        "",
        "| scores of | drawn rows | T | T, alone | NLL at 1 | NLL | NLL, alone | ECE at 1 | ECE |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [line for name, logits in all_logits.items() for line in _temperatures_of(name, logits, num_draws)]


def _temperatures_of(name: str, logits: Logits, num_draws: int) -> Iterator[str]:
    test_NC, targets = logits["test"]
    kind: ProblemType = "single_label_classification" if targets.ndim == 1 else "multi_label_classification"

    def nll(temperature: float) -> float:
        return negative_log_likelihood(test_NC / temperature, targets)

    def ece(temperature: float) -> float:
        return expected_calibration_error(probabilities(test_NC / temperature, kind), targets)

    for num_rows in NUM_ROWS:
        draws = list(_drawn(logits, num_rows, num_draws))
        fitted, alone = ([fit(*draw) for draw in draws] for fit in (fit_temperature, _without_prior))
        cells = [name, f"{num_rows:,}", _spread(fitted), _spread(alone), f"{nll(1):.4f}"]
        cells += [f"{np.mean(of):.4f}; {max(of):.4f}" for of in (list(map(nll, fitted)), list(map(nll, alone)))]
        cells += [f"{ece(1):.4f}", f"{np.mean(list(map(ece, fitted))):.4f}"]
        yield f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.2f}; {min(values):.2f} to {max(values):.2f}"


def _label_thresholds(logits: Logits, num_draws: int) -> list[str]:
    lines = [
        "Thresholds of 28 labels (goemotions), on the test rows: micro- and macro-F1 (mean; least of the draws), and "
        "of the label that is given too often most, the rows that get it beside those that have it (mean).",
        "",
        "| drawn rows | thresholds | micro-F1 | macro-F1 | given / true |",
        "|---|---|---|---|---|",
    ]
    test_NC, true_NC = logits["test"]
    test_NC = probabilities(test_NC, "multi_label_classification")
    labels = tuple(map(str, range(true_NC.shape[1])))
    choices: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "0.5": lambda _, true: np.full(true.shape[1], 0.5),
        "each label alone": lambda scores, true: tune_thresholds(scores, true, min_positives=0),
        "`tune_thresholds`": tune_thresholds,
    }
    for num_rows in (*NUM_ROWS[1:], len(logits["validation"][0])):
        for name, choose in choices.items():
            micro, macro, ratio = [], [], []
            for drawn_NC, drawn_true_NC in _drawn(logits, num_rows, num_draws if num_rows in NUM_ROWS else 1):
                thresholds_C = choose(probabilities(drawn_NC, "multi_label_classification"), drawn_true_NC)
                given_NC = is_given(test_NC, thresholds_C)
                found = full_metrics(true_NC, given_NC, labels)
                micro.append(found["f1_micro"])
                macro.append(found["f1_macro"])
                ratio.append((given_NC.sum(axis=0) / np.maximum(true_NC.sum(axis=0), 1)).max())
            cells = [f"{num_rows:,}", name, *(f"{np.mean(of):.4f}; {min(of):.4f}" for of in (micro, macro))]
            lines.append(f"| {' | '.join(cells)} | {np.mean(ratio):.1f} |")
    return lines


def _review_thresholds(all_logits: dict[str, Logits], num_draws: int) -> list[str]:
    lines = [
        "Scores from which a precision is promised: share of the draws in which the test rows at or above it miss it; "
        "coverage of the test rows (mean; 0 where no score reaches it). `observed`: reached on the drawn rows alone.",
        "",
        "| scores of | wanted | drawn rows | missed, observed | missed | coverage, observed | coverage |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, logits in all_logits.items():
        scores = {split: _top(*logits[split]) for split in logits}
        for target in PRECISIONS:
            for num_rows in NUM_ROWS[1:]:
                missed: dict[bool, list[bool]] = {True: [], False: []}
                coverage: dict[bool, list[float]] = {True: [], False: []}
                for drawn_NC, drawn_true in _drawn(logits, num_rows, num_draws):
                    for is_observed in (True, False):
                        drawn_N, is_right_N = _top(drawn_NC, drawn_true)
                        if is_observed:
                            found = _observed(drawn_N, is_right_N, target)
                        else:
                            found = threshold_for_precision(drawn_N, is_right_N, target)
                        test_N, is_test_right_N = scores["test"]
                        covered_N = test_N >= (2 if found is None else found)
                        coverage[is_observed].append(covered_N.mean())
                        missed[is_observed].append(covered_N.any() and is_test_right_N[covered_N].mean() < target)
                shares = [f"{np.mean(missed[one]):.0%}" for one in (True, False)]
                shares += [f"{np.mean(coverage[one]):.3f}" for one in (True, False)]
                lines.append(f"| {name} | {target} | {num_rows:,} | {' | '.join(shares)} |")
    return lines


def _top(logits_NC: np.ndarray, true_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score of the likeliest label, and whether it is the true one."""
    probabilities_NC = probabilities(logits_NC, "single_label_classification")
    return probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == true_N


def _observed(scores_N: np.ndarray, is_right_N: np.ndarray, target: float) -> float | None:
    """The lowest score such that of these rows at or above it enough are right."""
    reached = [score for score in scores_N if is_right_N[scores_N >= score].mean() >= target]
    return float(min(reached)) if reached else None


if __name__ == "__main__":
    main()
