"""What is waited for, and for how long; what is refused at once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bertray import ScoreConfig, score
from bertray.errors import BundleError, RequestError, ShardError, UnavailableError
from bertray.storage import patience, s3
from bertray.storage.location import Location
from bertray.storage.patience import patiently
from tests.conftest import write_shard
from tests.faults.s3_proxy import FaultyProxy
from tests.stub_pool import stub_pool

AWAY = UnavailableError.because("away", "cannot reach s3://bucket")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, in s, which end at once."""
    waits = list[float]()
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    return waits


@pytest.fixture
def clock(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, after which it is so much later."""
    monkeypatch.setattr(patience.time, "monotonic", lambda: sum(slept))
    return slept


def failing(num_times: int, error: Exception) -> Callable[[], str]:
    left = iter(range(num_times))

    def work() -> str:
        if next(left, None) is not None:
            raise error
        return "done"

    return work


def test_waits_grow_until_there_is_an_answer(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    num_alive = list[None]()
    monkeypatch.setattr(patience, "alive", lambda: num_alive.append(None))
    assert patiently(failing(7, AWAY)) == "done"
    assert clock == [1, 2, 4, 8, 16, 30, 30]
    assert len(num_alive) == 7  # a watchdog does not end who waits


def test_patience_ends(clock: list[float]) -> None:
    with pytest.raises(UnavailableError, match="cannot reach"):
        patiently(failing(1000, AWAY))
    assert patience.MAX_AWAY_S < sum(clock) <= patience.MAX_AWAY_S + 30


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("no permission for s3://bucket"),
        UnavailableError.because("missing", "not found: s3://bucket"),
        BundleError("it was replaced"),
        ShardError("not a readable Parquet file"),
        OSError("no space left on device"),
    ],
)
def test_what_waiting_does_not_mend_is_raised_at_once(clock: list[float], error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        patiently(failing(1, error))
    assert caught.value is error and clock == []


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For endpoints that nobody answers at."""
    import s3fs

    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http//127.0.0.1:9000", "http://127.0.0.1:port"])
def test_a_typo_in_the_endpoint_is_said_at_once(
    keys: None, slept: list[float], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(RequestError, match=r"s3://bucket/file: .*Check .*AWS_ENDPOINT_URL"):
        patiently((Location.of("s3://bucket") / "file").read_bytes)
    assert slept == []


@pytest.mark.parametrize("name", ["bundle", "input", "output"])
def test_a_host_where_nobody_answers_is_said_before_anything_begins(
    keys: None, name: str, tiny_bundle: Path, tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one with a typo, which looks like a store that is away."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    write_shard(tmp_path / "archive" / "a.parquet", ["a text"])
    places = {"bundle": str(tiny_bundle), "input": str(tmp_path / "archive"), "output": str(tmp_path / "scored")}
    with pytest.raises(UnavailableError, match=r"cannot reach s3://bucket/there.*AWS_ENDPOINT_URL"):
        score(ScoreConfig(**{**places, name: "s3://bucket/there"}), open_pool=stub_pool())
    assert slept == []


def test_refused_keys_are_said_at_once_and_whoever_reads_is_alive(
    behind: Callable[..., FaultyProxy], s3_folder: str, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Location.of(s3_folder) / "file"
    file.put(b"x")
    num_alive = list[None]()
    monkeypatch.setattr(s3, "alive", lambda: num_alive.append(None))
    assert patiently(file.read_bytes) == b"x" and len(num_alive) == 1
    proxy = behind(share=1.0)
    for kind in ("access_denied", "unknown_key", "wrong_signature", "expired_token"):
        proxy.kinds = [kind]
        with pytest.raises(UnavailableError) as caught:
            patiently((Location.of(s3_folder) / "file").read_bytes)
        assert caught.value.why == "refused" and slept == []
