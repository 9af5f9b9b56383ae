"""`--precision auto` is decided once for an output and a bundle; who cannot follow says so."""

import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bertray import Bundle
from bertray.bundle import guard
from bertray.bundle.guard import HalfRecord, agreed_precision, decided, keep, place_of, torch_summary
from bertray.bundle.info import BundleInfo, read_info
from bertray.errors import RequestError, UnavailableError
from bertray.storage.location import Location
from bertray.types import RealPrecision


@pytest.fixture
def info(tiny_bundle: Path) -> BundleInfo:
    return read_info(Location.of(str(tiny_bundle)))


@pytest.fixture
def cache(tmp_path: Path) -> Location:
    return Location.of(str(tmp_path / "engine"))


def file_in(cache: Location, info: BundleInfo) -> Path:
    return Path(str(place_of(cache, info))) / "decision.json"


def half(info: BundleInfo, *, is_fp16: bool) -> HalfRecord:
    note = "fp16: it loses nothing" if is_fp16 else "not fp16: it loses 3 points"
    lost = 0.1 if is_fp16 else 3.0
    facts = {"bundle_fingerprint": info.fingerprint(), "versions": {}}
    return HalfRecord(is_fp16=is_fp16, note=note, accuracy_drop_points=lost, **facts)


def agree(cache: Location, info: BundleInfo, best: RealPrecision, device: str = "CPU", *, is_fp16: bool = True) -> str:
    """As a process on such a device; fp16 is kept as measured, as `guard.half_record` does."""

    def measured() -> HalfRecord:
        record = half(info, is_fp16=is_fp16)
        (place_of(cache, info) / "fp16.json").put(record.model_dump_json().encode())
        return record

    return agreed_precision(cache, info, best, device, measured)


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)


def test_two_processors_run_one_precision(
    tiny_bundle: Path,
    info: BundleInfo,
    cache: Location,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(precision: Any = "auto", cache: Location | None = cache) -> str:
        return Bundle.load(str(tiny_bundle), precision, "cpu", cache).precision

    caplog.set_level(logging.WARNING, "bertray")  # other tests may have made it chattier
    on_a_cpu(monkeypatch, has_bf16=False)
    assert load() == "fp32"
    file = file_in(cache, info)
    content = json.loads(file.read_text())
    assert content.pop("versions")["python"] and content.pop("decided_at")
    assert (
        content.pop("reason") == f"fp32 is the best of the CPU of {socket.gethostname()}, which loaded the bundle first"
    )
    assert content == {
        "format_version": 1,
        "bundle_fingerprint": info.fingerprint(),
        "engine": "torch",
        "precision": "fp32",
        "quality_lost": None,
    }
    assert not caplog.records

    on_a_cpu(monkeypatch, has_bf16=True)
    assert load() == "fp32"
    (warning,) = caplog.messages
    assert str(file) in warning and "CPU could run bf16: --precision bf16 --rescore" in warning
    assert [load("bf16"), load(cache=None)] == ["bf16", "bf16"]  # who asks for one, or has no output, needs no decision
    assert json.loads(file.read_text())["precision"] == "fp32"

    other = cache / "other"
    assert load(cache=other) == "bf16"
    on_a_cpu(monkeypatch, has_bf16=False)
    with pytest.raises(UnavailableError, match="--precision fp32 --rescore") as raised:
        load(cache=other)
    for fact in ("auto is bf16", str(file_in(other, info)), f"CPU of {socket.gethostname()} has no bf16 arithmetic"):
        assert fact in str(raised.value)


@pytest.mark.parametrize(
    ("first", "device", "best", "outcome"),
    [
        ("fp32", "CPU", "fp32", "runs"),
        ("fp32", "CPU", "bf16", "warns"),
        ("fp32", "A100", "bf16", "warns"),
        ("fp32", "T4", "fp16", "warns"),
        ("bf16", "CPU", "bf16", "runs"),
        ("bf16", "A100", "bf16", "runs"),
        ("bf16", "CPU", "fp32", "cannot"),
        ("bf16", "T4", "fp16", "cannot"),
        ("fp16", "T4", "fp16", "runs"),
        ("fp16", "A100", "bf16", "runs"),
        ("fp16", "CPU", "fp32", "cannot"),
        ("fp16", "CPU", "bf16", "cannot"),
    ],
)
def test_who_follows(
    first: RealPrecision,
    device: str,
    best: RealPrecision,
    outcome: str,
    info: BundleInfo,
    cache: Location,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert agree(cache, info, first, "CPU" if first == "fp32" else "GPU") == first
    before = file_in(cache, info).read_bytes()
    if outcome == "cannot":
        with pytest.raises(UnavailableError, match=f"{device} of .* has no {first} arithmetic"):
            agree(cache, info, best, device)
    else:
        assert agree(cache, info, best, device) == first
    assert (f"{device} could run {best}: --precision {best} --rescore" in caplog.text) is (outcome == "warns")
    assert file_in(cache, info).read_bytes() == before


@pytest.mark.parametrize("is_fp16", [True, False])
def test_fp16_is_decided_as_it_was_measured(
    is_fp16: bool, info: BundleInfo, cache: Location, caplog: pytest.LogCaptureFixture
) -> None:
    expected = "fp16" if is_fp16 else "fp32"
    for _ in range(2):
        assert agree(cache, info, "fp16", "T4", is_fp16=is_fp16) == expected
    decision = decided(cache, info)
    assert decision is not None and decision.quality_lost == (0.1 if is_fp16 else None)
    assert decision.reason == half(info, is_fp16=is_fp16).note
    assert "could run" not in caplog.text  # it was measured that it could not
    summary = torch_summary(cache, info, "auto", expected)
    assert (summary["engine_note"], summary["accuracy_drop_points"]) == (decision.reason, 0.1 if is_fp16 else 3.0)


def test_data_that_cannot_be_read_decides_too(
    tiny_bundle: Path, info: BundleInfo, cache: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the processes of one run might measure, one by one, as the data comes back."""

    def refuse(_: object) -> None:
        raise UnavailableError("s3://bucket/data does not answer")

    monkeypatch.setattr(guard, "training_data", refuse)
    record: Any = guard.half_record(cache, info, None, None)  # type: ignore[arg-type]
    assert agreed_precision(cache, info, "fp16", "T4", lambda: record) == "fp32"
    assert not (place_of(cache, info) / "fp16.json").exists()
    decision = decided(cache, info)
    assert decision is not None and decision.reason.endswith("s3://bucket/data does not answer")


def test_of_many_that_decide_at_once_one_does(info: BundleInfo, cache: Location) -> None:
    together = threading.Barrier(8)

    def load(best: RealPrecision) -> str:
        together.wait()
        try:
            return agree(cache, info, best)
        except UnavailableError:
            return "cannot"

    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(load, ["fp32", "bf16"] * 4))
    decision = decided(cache, info)
    assert decision is not None and decision.precision in found
    assert found <= {decision.precision, "cannot"}


def test_who_comes_second_takes_what_was_kept_meanwhile(info: BundleInfo, cache: Location) -> None:
    def measured() -> HalfRecord:
        assert agree(cache, info, "bf16", "A100") == "bf16"
        return half(info, is_fp16=True)

    with pytest.raises(UnavailableError, match=r"T4 of .* has no bf16 arithmetic"):
        agreed_precision(cache, info, "fp16", "T4", measured)


def test_a_store_that_keeps_the_last_of_two_is_warned_of(
    info: BundleInfo, cache: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process has put its decision right after this one."""

    def create(file: Location, _: bytes) -> bool:
        other = guard.PrecisionDecision(bundle_fingerprint=info.fingerprint(), precision="fp32", reason="the last")
        file.put(other.model_dump_json().encode())
        return True

    monkeypatch.setattr(Location, "create", create)
    monkeypatch.setattr(Location, "is_exclusive", lambda *_: False)
    assert agree(cache, info, "bf16") == "fp32"
    assert "knows no conditional put" in caplog.text and "name a --precision" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        "",
        "{",
        "null",
        "\xff",
        {"bundle_fingerprint": "0" * 64},
        {"format_version": 2},
        {"precision": "int8"},
        {"reason": 1},
    ],
)
def test_a_decision_that_cannot_be_read_is_not_made_again(
    change: str | dict[str, Any], info: BundleInfo, cache: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard.time, "sleep", lambda _: None)
    assert agree(cache, info, "fp32") == "fp32"
    file = file_in(cache, info)
    changed = json.dumps(json.loads(file.read_text()) | change) if isinstance(change, dict) else change
    file.write_bytes(changed.encode("latin-1"))
    for read in (agree, keep):
        decision: Any = (
            "bf16"
            if read is agree
            else guard.PrecisionDecision(bundle_fingerprint=info.fingerprint(), precision="bf16", reason="another")
        )
        with pytest.raises(RequestError, match=r"does not say what --precision auto is .*remove it") as raised:
            read(cache, info, decision)
        assert str(raised.value).startswith(str(file)) and "\n" not in str(raised.value)
    assert file.read_bytes() == changed.encode("latin-1")


def test_a_file_that_is_just_being_written_is_waited_for(
    info: BundleInfo, cache: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without hard links."""
    assert agree(cache, info, "bf16") == "bf16"
    file = file_in(cache, info)
    content = file.read_bytes()
    file.write_bytes(b"")
    monkeypatch.setattr(guard.time, "sleep", lambda _: file.write_bytes(content))
    assert agree(cache, info, "bf16") == "bf16"
