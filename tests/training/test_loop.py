"""The loop of training: exact to resume, the same on any number of ranks, and its levers do what they say."""

import json
import math
import multiprocessing
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from bertray.errors import DivergedError, RequestError
from bertray.model.adapter import Layout
from bertray.model.pretrained import load_classifier, load_tokenizer
from bertray.storage.location import Location
from bertray.tokenization.tokenizer import ColumnTokenizer, Sequences
from bertray.training import token_files
from bertray.training.checkpoints import Checkpoints
from bertray.training.learner import Learner
from bertray.training.loss import LOSSES
from bertray.training.tracking import StepRecord
from tests.small_training import (
    NUM_LABELS,
    NUM_ROWS,
    OF_SEVERAL_RANKS,
    Recorder,
    checkpoints_in,
    config,
    fine_tune,
    opened_run,
    run_rank,
    small_model,
    write_rows,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "rows"
    write_rows(folder)
    return folder


@pytest.fixture(autouse=True)
def looks_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second is longer than these runs."""
    monkeypatch.setattr("bertray.training.loop._LOOK_INTERVAL_S", 0.0)


def weights_of(checkpoints: Checkpoints) -> dict[str, torch.Tensor]:
    progress = checkpoints.latest()
    assert progress is not None and progress.is_done
    return checkpoints.load_best(progress)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_bit_for_bit(precision: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertray.training.loop._MAX_RECORDS", 8)  # of 30
    settings = config(precision=precision, checkpoint_steps=7)
    whole = checkpoints_in(tmp_path / "whole", settings)
    watcher = Recorder()
    undisturbed = fine_tune(rows, settings, watcher, whole)
    parts = checkpoints_in(tmp_path / "parts", settings)
    seen = []
    # In mid-epoch, between checkpoints and upon one, at an epoch's end, amid its evaluation; an epoch has 10 steps.
    for part in (Recorder(4), Recorder(10), Recorder(13), Recorder(14), Recorder(20, amid_evaluation=True), Recorder()):
        interrupted = fine_tune(rows, settings, part, checkpoints_in(tmp_path / "parts", settings))
        seen += part.records
        latest = parts.latest()
        assert latest is not None and latest.step == (part.stop_at or 30)
        assert len(latest.history) == {10: 0, 20: 1}.get(latest.step, latest.step // 10)
    assert [(one.step, one.loss) for one in seen] == [(one.step, one.loss) for one in watcher.records]
    expected, actual = weights_of(whole), weights_of(parts)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    for one, other in zip(undisturbed.progress.history, interrupted.progress.history, strict=True):
        assert {**one, "wall_s": 0} == {**other, "wall_s": 0}
    curves = [[(one.step, one.loss) for one in run.progress.records] for run in (undisturbed, interrupted)]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [4, 8, 12, 16, 20, 24, 28]


def test_a_checkpoint_is_written_every_so_many_minutes(rows: Path, tmp_path: Path) -> None:
    """The interval of these is shorter than a step."""

    class Crash(Recorder):
        def steps(self, records: list[StepRecord], num_steps: int) -> bool:
            if records and records[-1].step == 5:
                checkpoints.wait()
                raise OSError("the machine is gone")
            return super().steps(records, num_steps)

    for minutes, expected in ((1e-9, range(1, 5)), (10.0, [])):
        settings = config(checkpoint_minutes=minutes)
        checkpoints = checkpoints_in(tmp_path / f"{minutes}", settings)
        with pytest.raises(OSError, match="gone"):
            fine_tune(rows, settings, Crash(), checkpoints)
        latest = checkpoints.latest()
        assert (latest.step in expected) if latest else not expected


def test_a_crash_costs_the_steps_since_the_checkpoint_alone(rows: Path, tmp_path: Path) -> None:
    class Crash(Recorder):
        def epoch(self, metrics: dict[str, float]) -> None:
            super().epoch(metrics)
            if metrics["epoch"] == 2:
                raise OSError("the machine is gone")

    settings = config(checkpoint_steps=6)
    whole, broken = (checkpoints_in(tmp_path / name, settings) for name in ("whole", "broken"))
    fine_tune(rows, settings, Recorder(), whole)
    with pytest.raises(OSError, match="gone"):
        fine_tune(rows, settings, Crash(), broken)
    broken.wait()
    watcher = Recorder()
    fine_tune(rows, settings, watcher, checkpoints_in(tmp_path / "broken", settings))
    assert watcher.records[0].step == 19  # after the checkpoint of step 18
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(broken)[name])


@pytest.mark.parametrize(("name", "world_size"), [("2", 2), ("4", 4), ("bf16", 2)])
def test_ranks_take_the_same_steps(
    name: str, world_size: int, single: tuple[Any, ...], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As one rank in fp32, no dropout, from its checkpoint on, batches of unequal shares among them."""
    folder, tolerance = rows.parent, 100 if name == "bf16" else 1
    shutil.copytree(folder / "begun", folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawning = multiprocessing.get_context("forkserver")  # torch is imported once
    spawning.set_forkserver_preload(["bertray.training.loop", "transformers.models.bert.modeling_bert"])
    ranks = [
        spawning.Process(target=run_rank, args=(folder, name, rank, world_size, port)) for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=200)
        assert [rank.exitcode for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    records, history, state = torch.load(folder / f"{name}.pt")
    expected_records, expected_history, begun, expected_state = single
    assert [record["step"] for record in records] == list(range(12, 66))
    for one, other in zip(expected_records, records, strict=True):
        assert other["loss"] == pytest.approx(one.loss, abs=1e-4 * tolerance)
        assert other["grad_norm"] == pytest.approx(one.grad_norm, rel=1e-3 * tolerance)
    for one, other in zip(expected_history, history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4 * tolerance)
        assert other["accuracy"] == pytest.approx(one["accuracy"], abs=1e-3 * tolerance)  # a row is 0.025
    assert state.keys() == expected_state.keys()
    # Not tensor by tensor: a bias whose gradient is zero but for rounding is moved by rounding alone.
    for kind in {key.split("/")[0] for key in state}:
        before, one, other = (
            torch.cat([held.flatten() for key, held in of_run.items() if key.startswith(f"{kind}/")])
            for of_run in (begun, expected_state, state)
        )
        norm = torch.linalg.vector_norm
        assert norm(other - one) < (0.3 if name == "bf16" else 0.01) * norm(one - before), kind


@pytest.fixture(scope="module")
def single(rows: Path) -> tuple[Any, ...]:
    """Records, history, first and last state of one rank; the checkpoint of step 11 is in the folder "begun"."""
    settings, watcher = config(**OF_SEVERAL_RANKS), Recorder(stop_at=11)
    checkpoints = checkpoints_in(rows.parent / "begun", settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bertray.training.loop._LOOK_INTERVAL_S", 0.0)
        begun = fine_tune(rows, settings, watcher, checkpoints, small_model(dropout=0.0)).optimizer.state()
    shutil.copytree(rows.parent / "begun", rows.parent / "1")
    watcher = Recorder()
    run = fine_tune(rows, settings, watcher, checkpoints_in(rows.parent / "1", settings), small_model(dropout=0.0))
    return watcher.records, run.progress.history, begun, run.optimizer.state()


def test_parts_that_fit_into_memory_take_the_same_steps(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watchers, num_parts = [Recorder(), Recorder()], []
    add_gradients = Learner.add_gradients

    def counted(self: Learner, tokens: Sequences, part: np.ndarray, *args: Any, **options: Any) -> torch.Tensor:
        num_parts[-1] += 1
        assert len(num_parts) == 1 or len(part) == 1 or tokens.lengths_S[part].sum() <= 100
        return add_gradients(self, tokens, part, *args, **options)

    monkeypatch.setattr(Learner, "add_gradients", counted)
    for watcher, budget in zip(watchers, (None, 100), strict=True):
        num_parts.append(0)
        fine_tune(rows, config(micro_batch_tokens=budget), watcher, model=small_model(dropout=0.0))
    assert num_parts[0] == len(watchers[0].records) == 30
    assert num_parts[1] >= 2 * 30
    for one, other in zip(watchers[0].records, watchers[1].records, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)


def test_states_computed_again_are_the_same(rows: Path) -> None:
    watchers, num_calls = [Recorder(), Recorder()], []
    for watcher, again in zip(watchers, (False, True), strict=True):
        calls: list[None] = []
        model = small_model(dropout=0.0)
        with opened_run(rows, config(gradient_checkpointing=again), watcher, model=model) as run:
            dense = model.bert.encoder.layer[0].intermediate.dense
            dense.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
            run.run()
        num_calls.append(len(calls))
    assert num_calls[1] == num_calls[0] + 30  # a step computes them twice
    for one, other in zip(watchers[0].records, watchers[1].records, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)


def test_it_learns_with_dropout_in_bf16(rows: Path) -> None:
    watcher = Recorder()
    run = fine_tune(rows, config(precision="bf16", epochs=10, learning_rate=3e-3), watcher)
    assert run.learner.precision == "bf16"
    assert max(epoch["accuracy"] for epoch in watcher.epochs) > 0.9


def test_it_ends_when_no_epoch_is_better(rows: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(Location.of(str(tmp_path)))
    run = fine_tune(rows, config(epochs=40, patience=2, learning_rate=1e-9), Recorder(), checkpoints)
    assert len(run.progress.history) == 3  # nothing is learnt: the first epoch stays the best
    assert run.progress.best_epoch == 1
    assert run.progress.is_done


def test_the_best_or_the_last_epoch_is_kept(rows: Path) -> None:
    settings = {"epochs": 3, "learning_rate": 1e-9}
    assert fine_tune(rows, config(**settings), Recorder()).progress.best_epoch == 1
    assert fine_tune(rows, config(**settings, keep="last"), Recorder()).progress.best_epoch == 3


def test_divergence_names_the_rows_and_leaves_a_sound_checkpoint(rows: Path, tmp_path: Path) -> None:
    settings = config(checkpoint_steps=2)
    checkpoints = checkpoints_in(tmp_path, settings)
    fine_tune(rows, settings, Recorder(stop_at=5), checkpoints)
    before = checkpoints.latest()
    assert before is not None
    state = checkpoints.load(before)
    state["weights/bert.encoder.layer.0.output.dense.weight"][0, 0] = math.inf
    checkpoints.save(before, state, None)
    checkpoints.wait()
    with pytest.raises(DivergedError, match=r"the loss is nan at epoch 1, step 6: lower --learning-rate") as caught:
        fine_tune(rows, settings, Recorder(), checkpoints_in(tmp_path, settings))
    assert caught.value.step == 6
    assert len(caught.value.rows) == 16
    assert checkpoints.latest() == before  # not one of step 6


def test_levers_change_the_run(rows: Path) -> None:
    losses = {}
    levers = [
        {},
        {"label_smoothing": 0.1},
        {"class_weights": "balanced"},
        {"layer_decay": 0.5},
        {"weight_decay": 0.5},
    ]
    for lever in levers:
        watcher = Recorder()
        fine_tune(rows, config(epochs=1, **lever), watcher, model=small_model(dropout=0.0))
        losses[json.dumps(lever)] = np.array([record.loss for record in watcher.records])
    plain = losses.pop("{}")
    for lever, found in losses.items():
        assert not np.allclose(found, plain, atol=1e-5), lever


@pytest.mark.parametrize("lever", [{}, {"label_smoothing": 0.1}, {"class_weights": "balanced"}])
def test_several_labels_begin_where_nothing_is_known_of_a_text(lever: dict[str, Any], rows: Path) -> None:
    settings = config(**lever)
    with opened_run(rows, settings, problem_type="multi_label_classification") as run:
        bias_C = run.learner.model.classifier.bias.detach()
    with token_files.opened(Location.of(str(rows))) as (splits, _):
        objective = LOSSES["multi_label_classification"](splits["train"], NUM_LABELS, torch.device("cpu"), settings)
        logits_SC = bias_C.repeat(NUM_ROWS, 1).requires_grad_()
        (objective.loss_sum(logits_SC, np.arange(NUM_ROWS)) / NUM_ROWS).backward()
    assert logits_SC.grad is not None
    torch.testing.assert_close(logits_SC.grad.sum(dim=0), torch.zeros(NUM_LABELS), atol=1e-3, rtol=0)


def test_large_numbers_keep_their_digits(rows: Path, tiny_encoder: Path) -> None:
    """Prices around ten millions, of which float32 knows the whole ones."""
    model = load_classifier(str(tiny_encoder), ["value"], "regression", 0)
    with opened_run(rows, model=model, problem_type="regression") as run:
        run.progress.unit = (0.0, 1.0)
        expected_NC = run._validation_logits()
        run.progress.unit = (1e7, 100.0)
        found_NC = run._validation_logits()
    assert np.ptp(expected_NC) > 0.1
    assert np.abs((found_NC - 1e7) / 100 - expected_NC).max() < 1e-7


def test_documents_count_alike_whatever_their_windows(tmp_path: Path) -> None:
    """One class of short texts, one of texts of ten windows: each row's loss counts as often."""
    tokenizer = ColumnTokenizer(load_tokenizer("minilm", 16)[0].backend_tokenizer, 16, stride=4)
    texts = pa.array(["one two"] * 6 + ["one card of two " * 20] * 3)
    ids = pa.array([[0]] * 6 + [[1]] * 3, pa.large_list(pa.int32()))
    splits = dict.fromkeys(("train", "validation"), (tokenizer.encode(texts), ids))
    token_files.write(Location.of(str(tmp_path)), splits, 30522, num_kept=1)
    with token_files.opened(Location.of(str(tmp_path))) as (splits, _):
        rows = splits["train"]
        every = np.arange(len(rows.tokens.documents_S))
        is_long_S = rows.label_ids(every) == 1
        assert is_long_S.sum() > 20
        logits_11 = torch.zeros(1, 2)
        objective = LOSSES["single_label_classification"](rows, 2, torch.device("cpu"), config())
        losses_S = np.array([objective.loss_sum(logits_11, every[one : one + 1]).item() for one in every])
        assert losses_S[is_long_S].sum() / losses_S.sum() == pytest.approx(1 / 3, rel=1e-5)


def test_validation_that_does_not_fit_is_run_in_smaller_batches(
    rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = fine_tune(rows, config(epochs=1), Recorder()).progress.history
    forward = Layout.forward

    def limited(self: Layout, model: Any, tokens: Sequences, part: np.ndarray) -> torch.Tensor:
        if not torch.is_grad_enabled() and tokens.lengths_S[part].sum() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, model, tokens, part)

    with opened_run(rows, config(epochs=1)) as run:
        monkeypatch.setattr(Layout, "forward", limited)
        run.run()
    assert run.validation_budget <= 100 < run.token_budget
    assert f"batches have {run.validation_budget} tokens from now on, not {run.token_budget}" in caplog.text
    assert run.progress.history[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert run.progress.history[0]["accuracy"] == expected[0]["accuracy"]


def test_parts_become_smaller_until_they_fit(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU with room for 60 tokens would have it, or for 120 without the gradients of another part."""
    tried = []
    forward = Learner.logits

    def limited(self: Learner, tokens: Sequences, part: np.ndarray) -> torch.Tensor:
        tried.append(int(tokens.lengths_S[part].sum()))
        if tried[-1] > (120 if self.model.classifier.bias.grad is None else 60):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, part)

    monkeypatch.setattr(Learner, "logits", limited)
    with opened_run(rows) as run:
        run.device = torch.device("cuda")
        run.fit_into_memory()
        assert run.token_budget == tried[-1]  # a later step may be heavier, and is cut
    assert tried[0] > 200 and tried[-1] == tried[-2] <= 60 < tried[-3] == tried[-4]
    assert all(weights.grad is None for weights in run.learner.model.parameters())

    def never_fits(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Learner, "logits", never_fits)
    with opened_run(rows) as run:
        run.device = torch.device("cuda")
        with pytest.raises(RequestError, match=r"one sequence of \d+ tokens does not fit .*--gradient-checkpointing"):
            run.fit_into_memory()


def test_weights_that_do_not_fit_are_refused(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(RequestError, match=r"weights takes .* GiB .* are free: use a smaller --encoder"):
        fine_tune(rows, config(), Recorder())
