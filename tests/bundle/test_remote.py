"""A bundle on S3 is fetched once for all processes of a machine, whole and verified."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from bertray import BundleError
from bertray.bundle import info as bundle_info
from bertray.bundle.info import opened
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


def test_what_is_altered_is_not_kept(remote: str, cache: Path) -> None:
    (Location.of(remote) / "config.json").put(b"{}")
    with pytest.raises(BundleError, match=r"altered: config\.json"):
        kept(remote)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_process_that_died_over_it_leaves_nothing_half(remote: str, cache: Path, fetched: list[str]) -> None:
    cache.mkdir(parents=True)
    half = cache / "bertray-0123"
    half.mkdir()
    (half / "config.json").write_text("{")
    folder = kept(remote)
    assert folder != half and (folder / "model.safetensors").exists()


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


def test_without_a_home_it_is_fetched_each_time(
    remote: str, tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first = kept(remote)
    assert kept(remote) != first and len(fetched) == 2
    assert not first.exists()


def test_a_local_one_is_read_where_it_is_and_checked_each_time(tiny_bundle: Path, tmp_path: Path, cache: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    assert kept(str(copy)) == copy
    (copy / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="altered"):
        kept(str(copy))
    assert not cache.exists()
