"""Texts that end the process which reads them."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray import Bundle
from bertray.bundle.isolated import IsolatedBundle, ModelSpec
from bertray.errors import BundleError, RequestError, ShardError, UnavailableError
from bertray.scoring.shard_reader import read_in_isolation
from bertray.storage.location import Location, _FileError
from tests.conftest import ROOT, run_job_process, write_shard

pytestmark = pytest.mark.services

FAULTS = ROOT / "tests" / "faults"
DEADLY = "before, this text ends the process, behind"


def spec_of(bundle: Path, timeout_s: float = 600.0) -> ModelSpec:
    return ModelSpec(str(bundle), "torch", "fp32", "cpu", "", 1, timeout_s)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def isolated(tiny_bundle: Path) -> Iterator[IsolatedBundle]:
    isolated = IsolatedBundle(spec_of(tiny_bundle))
    yield isolated
    isolated.close()


def column(texts: list[str | None]) -> pa.Array:
    return pa.array([None if text is None else text.encode() for text in texts], pa.large_binary())


def test_it_predicts_what_the_bundle_does(isolated: IsolatedBundle, tiny_bundle: Path) -> None:
    texts = column([f"text {row} " * (row % 9) for row in range(200)] + [None])
    expected = Bundle.load(str(tiny_bundle), "fp32").predict_column(texts)
    for _ in range(2):
        assert isolated.predict_column(texts).equals(expected)
    assert isolated.precision == "fp32"
    assert isolated.predict_column(texts[:0]).num_rows == 0


def test_a_process_that_is_killed_from_outside_costs_no_row(isolated: IsolatedBundle) -> None:
    texts = column([f"text {row}" for row in range(50)])
    expected = isolated.predict_column(texts)
    os.kill(isolated.ready().pid, signal.SIGKILL)
    found = isolated.predict_column(texts)
    assert found["error"].null_count == 50
    assert found["label"].to_pylist() == expected["label"].to_pylist()


@pytest.mark.parametrize("review_below", [0.0, None])
def test_deadly_texts_are_found_and_to_be_reviewed(
    faults: None, make_bundle: Callable[..., Path], review_below: float | None
) -> None:
    bundle = make_bundle(problem_type="multi_label_classification", review_below=review_below)
    isolated = IsolatedBundle(spec_of(bundle))
    texts: list[str | None] = [f"text {row}" for row in range(5)]
    texts[3] = DEADLY
    found = isolated.predict_column(column(texts))
    isolated.close()
    assert found.schema.equals(isolated.schema)
    reason = "the model's process was ended by SIGSEGV on this text"
    is_deadly = [row == 3 for row in range(5)]
    assert found["error"].to_pylist() == [reason if deadly else None for deadly in is_deadly]
    assert found["review"].to_pylist() == is_deadly
    assert [labels is None for labels in found["labels"].to_pylist()] == is_deadly


def test_too_many_deaths_are_no_matter_of_texts(
    faults: None, isolated: IsolatedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertray.bundle.isolated._MAX_DEATHS", 2)
    with pytest.raises(ShardError, match="the model's process died 3 times, last: it was ended by SIGSEGV"):
        isolated.predict_column(column([DEADLY] * 4))


def test_an_error_of_the_model_is_no_matter_of_texts(faults: None, isolated: IsolatedBundle) -> None:
    with pytest.raises(ShardError, match=r"^ValueError: broken$"):
        isolated.predict_column(column(["a text", "this text breaks the model"]))
    assert isolated.predict_column(column(["a text"]))["error"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("sickness", "message"),
    [
        ("breaking", "the model does not run here: ValueError: broken"),
        ("deadly", "the model's process was ended by SIGSEGV on a harmless text, too"),
        ("gpu", "the model's process exited with code 1 on a harmless text, too"),
    ],
)
def test_what_fails_on_any_text_is_the_machines_fault(
    faults: None, isolated: IsolatedBundle, monkeypatch: pytest.MonkeyPatch, sickness: str, message: str
) -> None:
    monkeypatch.setenv("BERTRAY_SICK", sickness)
    with pytest.raises(UnavailableError, match=message):
        isolated.predict_column(column(["a text"]))


def test_a_text_over_which_the_model_hangs_is_found(faults: None, tiny_bundle: Path) -> None:
    with IsolatedBundle(spec_of(tiny_bundle, timeout_s=1.5)) as isolated:
        found = isolated.predict_column(column(["before", "this text hangs", "behind"]))
    reason = "the model's process made no progress for 2 s on this text"
    assert found["error"].to_pylist() == [None, reason, None]


def test_a_model_that_cannot_be_loaded(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IsolatedBundle(spec_of(shutil.copytree(tiny_bundle, tmp_path / "gone"))) as gone:
        (tmp_path / "gone" / "bundle.json").unlink()
        with pytest.raises(RequestError, match=r"gone is no model bundle: it has no bundle\.json"):
            gone.predict_column(column(["text"]))
    with IsolatedBundle(spec_of(tiny_bundle)) as dies:
        monkeypatch.setenv("PYTHONHOME", "/nowhere")  # of the child: it finds no library of Python's
        with pytest.raises(
            BundleError, match=r"the process that was to load .* exited with code 1; its stderr says why"
        ):
            dies.predict_column(column(["text"]))


def test_another_bundle_in_its_place_is_noticed(
    make_bundle: Callable[..., Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with IsolatedBundle(spec_of(place)) as isolated:
        os.kill(isolated.ready().pid, signal.SIGKILL)
        shutil.rmtree(place)
        shutil.copytree(make_bundle(seed=1), place)
        with pytest.raises(BundleError, match="was replaced while the job ran"):
            isolated.predict_column(column(["text"]))


def test_deadly_files_are_found(faults: None, tmp_path: Path) -> None:
    fine, deadly = write_shard(tmp_path / "fine.parquet", ["a text"]), deadly_shard(tmp_path / "deadly.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"not Parquet")
    for path in (fine, tmp_path / "broken.parquet"):  # the latter is said by who reads it next
        read_in_isolation(Location.of(str(path)), "text", [], 1 << 20)
    with pytest.raises(ShardError, match="the process that read it was ended by SIGSEGV"):
        read_in_isolation(Location.of(str(deadly)), "text", [], 1 << 20)


def deadly_shard(path: Path) -> Path:
    table = pq.read_table(write_shard(path, ["a text"]))
    pq.write_table(table.replace_schema_metadata({"this file ends the process": ""}), path)
    return path


@pytest.fixture
def deadly_archive(tmp_path: Path) -> Path:
    """A shard that ends its reader, the last one, one with a text that ends the model's process, and a good one."""
    archive = tmp_path / "archive"
    deadly_shard(archive / "7.parquet")
    for part in range(2):
        texts: list[str | None] = [f"part {part} text {row}" for row in range(3)]
        if part == 1:
            texts[1] = DEADLY
        write_shard(archive / f"{part}.parquet", texts)
    return archive


def check_output(archive: Path, output: Path, tiny_bundle: Path) -> None:
    """What died has an error; all else is scored."""
    (failure,) = json.loads(max(output.glob("runs/*/summary.json")).read_text())["failures"]
    assert failure == {"path": "7.parquet", "reason": "the process that read it was ended by SIGSEGV"}
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    for part in range(2):
        found = pq.read_table(output / "predictions" / f"{part}.parquet")
        source = pq.read_table(archive / f"{part}.parquet")["text"].to_pylist()
        assert [error is not None for error in found["error"].to_pylist()] == [text == DEADLY for text in source]
        labels = [None if text == DEADLY else bundle.predict([text])[0].label for text in source]
        assert found["label"].to_pylist() == labels


@pytest.mark.chaos  # without Ray: the next one
def test_a_run_goes_on_over_deadly_texts_and_files(
    faults: None, tiny_bundle: Path, deadly_archive: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scored"
    places = ("--bundle", tiny_bundle, "--input", deadly_archive, "--output", output)
    # A Ray of its own: the workers of the tests' cluster were started without the fault.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = run_job_process("score", *places, "--num-actors", 1, "--precision", "fp32", env=environment)
    assert done.returncode == 3, done.stderr
    assert "an actor died; scoring its unit" in done.stderr and "was ended by SIGSEGV over" in done.stderr
    check_output(deadly_archive, output, tiny_bundle)


def test_without_ray_a_deadly_text_ends_nothing_and_a_deadly_file_one_run(
    faults: None, tiny_bundle: Path, deadly_archive: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scored"
    places = ("--bundle", tiny_bundle, "--input", deadly_archive, "--output", output)
    options = ("--num-actors", 0, "--precision", "fp32", "--max-error-fraction", 1)
    died = run_job_process("score", *places, *options)
    assert died.returncode == -signal.SIGSEGV
    said = died.stderr
    for _ in range(2):  # what failed is tried again, with the same care
        done = run_job_process("score", *places, *options)
        said += done.stderr
        assert done.returncode == 3, done.stderr
        check_output(deadly_archive, output, tiny_bundle)
    assert "was ended by SIGSEGV over 3 texts" in said  # in the first run or the next


def test_an_error_of_an_inner_class_passes_through_the_pipe() -> None:
    one, other = Pipe()
    with one, other:
        one.send(_FileError("gone"))
        found = other.recv()
    assert isinstance(found, UnavailableError) and isinstance(found, OSError) and str(found) == "gone"
