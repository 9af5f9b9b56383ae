"""A bundle on S3 is fetched once for all processes of a machine, whole and verified."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bertray import BundleError
from bertray.bundle import info as bundle_info
from bertray.bundle.info import opened
from bertray.errors import UnavailableError
from bertray.storage import s3
from bertray.storage.location import Location


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "bertray" / "bundles"


@pytest.fixture
def remote(tiny_bundle: Path, s3_folder: str) -> str:
    Location.of(f"{s3_folder}/bundle").put_folder(tiny_bundle, last="bundle.json")
    return f"{s3_folder}/bundle"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are downloaded."""
    paths, download = list[str](), Location.local_copy

    def noted(self: Location, within: Path | None = None) -> object:
        paths.extend([] if self.is_local else [str(self)])
        return download(self, within)

    monkeypatch.setattr(Location, "local_copy", noted)
    return paths


def kept(uri: str) -> Path:
    with opened(uri) as (folder, _):
        return folder


def test_it_is_fetched_once_and_another_one_beside_it(
    remote: str, make_bundle: Callable[..., Path], s3_folder: str, cache: Path, fetched: list[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(kept, [remote] * 4))
    assert fetched == [remote] and folder.parent == cache
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]
    Location.of(remote).put_folder(make_bundle(seed=5), last="bundle.json")  # replaced in its place
    assert kept(remote) != folder
    assert len(fetched) == 2


def test_what_is_altered_is_not_kept_nor_fetched_again(remote: str, cache: Path, fetched: list[str]) -> None:
    (Location.of(remote) / "config.json").put(b"{}")
    with pytest.raises(BundleError, match=r"altered: config\.json"):
        kept(remote)
    assert fetched == [remote]
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_process_that_died_over_it_leaves_nothing_half(remote: str, cache: Path, fetched: list[str]) -> None:
    cache.mkdir(parents=True)
    half = cache / "bertray-0123"
    half.mkdir()
    (half / "config.json").write_text("{")
    folder = kept(remote)
    assert folder != half and (folder / "model.safetensors").exists()


@pytest.mark.parametrize("left", ["config.json", None])
def test_one_that_was_tidied_up_in_part_is_fetched_again(
    left: str | None, remote: str, cache: Path, fetched: list[str]
) -> None:
    folder = kept(remote)
    for path in folder.iterdir():
        if path.name != left:
            path.unlink()
    assert kept(remote) == folder and (folder / "model.safetensors").exists()
    assert fetched == [remote] * 2


def test_its_files_outlive_a_power_failure(remote: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody verifies them again."""
    synced, sync = set[int](), os.fsync

    def noted(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        sync(file)

    monkeypatch.setattr(os, "fsync", noted)
    folder = kept(remote)
    names = bundle_info.read_info(Location.of(remote)).files
    assert len(names) >= 3 and {(folder / name).stat().st_ino for name in names} <= synced


def test_those_that_nobody_has_opened_for_a_week_go_when_another_one_comes(
    remote: str, make_bundle: Callable[..., Path], s3_folder: str, cache: Path
) -> None:
    old = kept(remote)
    a_week_ago_s = time.time() - bundle_info._KEPT_S - 1
    os.utime(old, (a_week_ago_s, a_week_ago_s))
    kept(remote)  # which is opening it
    Location.of(f"{s3_folder}/second").put_folder(make_bundle(seed=5), last="bundle.json")
    kept(f"{s3_folder}/second")
    assert old.exists()
    os.utime(old, (a_week_ago_s, a_week_ago_s))
    for name, seed in (("third", 6), ("fourth", 7)):
        Location.of(f"{s3_folder}/{name}").put_folder(make_bundle(seed=seed), last="bundle.json")
    with FileLock(f"{old}.lock"):  # another process is opening it
        kept(f"{s3_folder}/third")
    assert old.exists()
    kept(f"{s3_folder}/fourth")
    assert not old.exists()
    assert kept(remote) == old


def test_one_that_cannot_be_removed_stays(remote: str, cache: Path) -> None:
    (cache / "old.lock").mkdir(parents=True)  # as if it were another user's
    (cache / "old").mkdir()
    os.utime(cache / "old", (0, 0))
    assert kept(remote).parent == cache
    assert (cache / "old").exists()


def test_without_a_home_it_is_fetched_each_time(
    remote: str, tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = kept(remote)
    assert kept(remote) != first and len(fetched) == 2
    assert not first.exists()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", ["full", "no locks", "a lock of another user", "another process hangs over it"])
def test_where_no_copy_can_be_kept_it_is_fetched_each_time_and_the_log_says_why(
    fault: str, remote: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    download, lock = s3.download, cache / f"{bundle_info.read_info(Location.of(remote)).fingerprint()}.lock"
    reason = {"full": "No space left", "no locks": "No locks available"}.get(fault, lock.name)

    def fill(fs: object, path: str, folder: Path, explained: Callable[..., Any]) -> None:
        if cache in folder.parents:
            raise FULL
        download(fs, path, folder, explained)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if fault == "full":
        monkeypatch.setattr(s3, "download", fill)
    elif fault == "no locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    elif fault == "a lock of another user":
        lock.mkdir(parents=True)
    monkeypatch.setattr(bundle_info, "_FETCH_S", 0.1)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock) if "hangs" in fault else nullcontext():
        folder = kept(remote)
    assert cache not in folder.parents and not folder.exists()
    assert f"no copy of {remote} is kept" in caplog.text and reason in caplog.text
    assert [path.name for path in cache.iterdir()] in ([], [lock.name])


def test_a_disk_that_is_full_here_is_not_the_storages_fault(
    remote: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(s3, "download", fill)
    with pytest.raises(UnavailableError, match=r"storage refused /.*No space left"):
        kept(remote)


def test_a_local_one_is_read_where_it_is_and_checked_each_time(tiny_bundle: Path, tmp_path: Path, cache: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    assert kept(str(copy)) == copy
    (copy / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="altered"):
        kept(str(copy))
    assert not cache.exists()
