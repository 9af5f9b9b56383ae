"""What trials of a search are told, which one is the best, and which ranges are refused."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from bertray.config import bounds
from bertray.training.config import TrainConfig, TuneConfig
from bertray.training.trials import SEARCHED, TrialRecord, best_of, options_of, train_config


def config(**options: Any) -> TuneConfig:
    return TuneConfig(data="data", output="bundle", **options)


def record(number: int, f1_macro: float, status: str = "done") -> TrialRecord:
    return TrialRecord(
        number=number, options={}, status=status, history=[{"f1_macro": 0.0}, {"f1_macro": f1_macro}], best_epoch=2
    )


def test_the_first_trial_is_jobs_train() -> None:
    assert train_config(config(), 0) == TrainConfig(data="data", output="bundle")
    assert options_of(config(learning_rate=1e-3, learning_rates="1e-5:2e-5"), 0)["learning_rate"] == 1e-3


def test_the_others_are_within_their_ranges_and_spread() -> None:
    drawn = [options_of(config(), number) for number in range(1, 201)]
    for name, text in config().searched_bounds.items():
        lowest, highest = bounds(text)
        values = [options[name] for options in drawn]
        assert lowest <= min(values) < max(values) <= highest
        if name == "learning_rate":
            lowest, highest, values = math.log(lowest), math.log(highest), [math.log(value) for value in values]
        # of 200 uniform draws the mean lies within 4 standard errors of the middle, 6 draws in 100,000 aside
        assert abs(sum(values) / 200 - (lowest + highest) / 2) < 4 * (highest - lowest) / math.sqrt(12 * 200)
    assert {options["batch_size"] for options in drawn} == {16, 32, 64}
    assert {options["epochs"] for options in drawn} == {2, 3, 4, 5}
    assert [options["seed"] for options in drawn] == list(range(1, 201))
    assert list(drawn[0]) == list(SEARCHED)


def test_trials_follow_from_the_seed_and_their_number() -> None:
    few, many = config(num_trials=2), config(num_trials=100, num_concurrent=7)
    assert [options_of(few, number) for number in range(5)] == [options_of(many, number) for number in range(5)]
    assert options_of(config(seed=1), 1) != options_of(config(), 1)
    assert options_of(config(), 1) != options_of(config(), 2)


def test_one_number_is_for_all_trials() -> None:
    fixed = config(learning_rates="0.0003", layer_decays=1, batch_sizes=8)
    assert {(one["learning_rate"], one["layer_decay"], one["batch_size"]) for one in map_options(fixed)} == {
        (3e-4, 1, 8)
    }


def test_trials_may_differ_in_their_seed_alone() -> None:
    search = config(only_seeds=True, learning_rate=1e-4, seed=7)
    first, *others = [options_of(search, number) for number in range(4)]
    assert first == {**options_of(config(learning_rate=1e-4), 0), "seed": 7}
    assert [other.pop("seed") for other in others] == [8, 9, 10]
    assert all(other == {name: first[name] for name in SEARCHED if name != "seed"} for other in others)


def map_options(search: TuneConfig) -> list[dict[str, int | float]]:
    return [options_of(search, number) for number in range(1, 20)]


def test_a_pruned_trial_is_not_the_best_and_the_first_of_equals_is() -> None:
    records = [record(0, 0.7), record(1, 0.9, "pruned"), record(3, 0.8), record(2, 0.8)]
    best = best_of(records)
    assert best is not None and best.number == 2
    failed = TrialRecord(number=0, options={}, status="failed", history=[], best_epoch=0, failure="the loss is nan")
    assert best_of([failed]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": "5e-4:2e-5"}, "give the lowest and the highest, as 0.1:0.5"),
        ({"learning_rates": "small"}, "give the lowest and the highest"),
        ({"learning_rates": "nan"}, "give the lowest and the highest"),
        ({"learning_rates": "0:1e-3"}, "learning_rates 0:1e-3: 0 is not allowed. Input should be greater than 0"),
        (
            {"layer_decays": "0.5:1.5"},
            "layer_decays 0.5:1.5: 1.5 is not allowed. Input should be less than",
        ),
        ({"label_smoothings": "-0.1:0"}, "label_smoothings -0.1:0: -0.1 is not allowed"),
        ({"batch_sizes": "16,none"}, "give numbers from 1, as 16,32,64"),
        ({"batch_sizes": ""}, "give numbers from 1"),
        ({"min_epochs": 6}, "min_epochs 6 is above max_epochs 5"),
        (
            {"max_epochs": 2},
            "epochs 3, of the first trial, is above max_epochs 2: raise --max-epochs, or",
        ),
        ({"only_seeds": True, "batch_sizes": "8"}, "batch_sizes has no meaning with only_seeds"),
        ({"num_workers": "2"}, "num_workers 2 has no meaning in a search"),
        ({"mlflow_uri": "http://127.0.0.1:5000"}, "mlflow_uri has no meaning in a search"),
    ],
)
def test_what_cannot_be_searched_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        config(**options)
    assert message in str(refused.value)
