"""Local folders and an HTTP S3 server behave the same."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bertray.errors import RequestError, UnavailableError
from bertray.storage.location import Location


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return Location.of(str(tmp_path / "folder"))
    return Location.of(request.getfixturevalue("s3_folder"))


def test_put_read_list_remove(folder: Location) -> None:
    assert folder.files() == []
    (folder / "date=2026-01-05/part-0.parquet").put(b"one")
    (folder / "b.PARQUET").put(b"three")
    (folder / "notes.txt").put(b"x")
    (folder / ".hidden/part-1.parquet").put(b"x")
    (folder / "_SUCCESS").put(b"")
    assert [(info.path, info.size_bytes) for info in folder.files((".parquet",))] == [
        ("b.PARQUET", 5),
        ("date=2026-01-05/part-0.parquet", 3),
    ]
    file = folder / "notes.txt"
    assert file.read_bytes() == b"x"
    assert (folder / "_SUCCESS").read_bytes() == b""
    assert file.is_file()
    assert file.info().path == "notes.txt"
    with file.open() as stream:
        assert stream.read() == b"x"
    file.remove()
    file.remove()  # nothing there: nothing to do
    assert not file.exists()


def test_a_marker_of_a_folder_is_no_file(s3_folder: str) -> None:
    import s3fs

    place = Location.of(f"{s3_folder}/docs.parquet")
    s3fs.S3FileSystem().pipe_file(f"{place}/", b"")
    assert place.exists() and not place.is_file()
    assert place.is_empty() and place.files((".parquet",)) == []
    (place / "part.parquet").put(b"one")
    assert [info.path for info in place.files()] == ["part.parquet"]


def test_the_version_changes_with_the_content(folder: Location) -> None:
    file = folder / "part.parquet"
    file.put(b"old")
    before = folder.files()[0]
    file.put(b"new")
    after = folder.files()[0]
    assert before.size_bytes == after.size_bytes
    assert before.version != after.version
    assert file.info().version == after.version


def test_create_happens_once(folder: Location) -> None:
    file = folder / "a" / "b.json"
    assert file.create(b"first")
    assert not file.create(b"second")
    assert file.read_bytes() == b"first"
    assert [info.path for info in (folder / "a").files()] == ["b.json"]


def test_a_name_is_no_pattern(folder: Location) -> None:
    place = folder / "part[12]"
    (place / "file[1].parquet").put(b"x")
    for other in ("part1/file", "part2/file", "part[12]/file1.parquet", "part[12]x"):
        (folder / other).put(b"other")
    with place.local_copy() as copy:
        assert sorted(path.name for path in copy.iterdir()) == ["file1.parquet", "file[1].parquet"]
    (place / "file[1].parquet").remove()
    assert [info.path for info in place.files()] == ["file1.parquet"]
    place.remove()
    assert [info.path for info in folder.files()] == ["part1/file", "part2/file", "part[12]x"]


def test_a_file_that_is_removed_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("x")
    scandir = os.scandir

    @contextmanager
    def removed_since(folder: str) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(folder) as entries:
            found = list(entries)
        (tmp_path / "a").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", removed_since)
    assert [info.path for info in Location.of(str(tmp_path)).files()] == ["b"]
    with pytest.raises(RequestError, match=r"not found: .*/a"):
        Location.of(str(tmp_path / "a")).info()


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "archive" / "2026").mkdir(parents=True)
    (tmp_path / "archive" / "2026" / "a.parquet").write_text("x")
    (tmp_path / "archive" / "b.parquet").write_text("x")
    scandir = os.scandir

    def failing(folder: str) -> Any:
        if folder.endswith("2026"):
            raise OSError(errno.EIO, "Input/output error", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", failing)
    for listed in (tmp_path / "archive", tmp_path / "archive" / "2026"):
        place = Location.of(str(listed))
        for look in (place.files, place.is_empty) if listed.name == "2026" else (place.files,):
            with pytest.raises(RequestError, match=r"storage refused .*Input/output error: .*2026"):
                look()


def test_links_are_followed_and_end_no_listing(tmp_path: Path) -> None:
    (tmp_path / "disk" / "2026").mkdir(parents=True)
    (tmp_path / "disk" / "2026" / "a.parquet").write_text("x")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "year").symlink_to(tmp_path / "disk")
    (tmp_path / "archive" / "b.parquet").symlink_to(tmp_path / "disk" / "2026" / "a.parquet")
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "archive")
    assert [info.path for info in Location.of(str(tmp_path / "archive")).files()] == [
        "b.parquet",
        "year/2026/a.parquet",
    ]
    (tmp_path / "disk").rename(tmp_path / "not mounted")  # its files have not left the archive
    with pytest.raises(RequestError, match=r"archive/.* is a link to a place that is not there: mount it, or remove"):
        Location.of(str(tmp_path / "archive")).files()


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")).write_text("x")
    folder = Location.of(str(tmp_path))
    assert folder.files((".csv",)) == []
    with pytest.raises(RequestError, match=r"the name of 'caf\\udce9\.parquet' in .* is not UTF-8: rename it"):
        folder.files((".parquet",))


def test_reading_here_and_there_fetches_little_more_than_is_read(
    s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Arrow reads two columns that lie far apart, a MiB of one, then of the other."""
    import s3fs

    file = Location.of(s3_folder) / "wide.parquet"
    file.put(bytes(48 << 20))
    fetched: list[int] = []
    fetch = s3fs.core.S3File._fetch_range

    def counted(self: Any, start: int, end: int) -> bytes:
        found: bytes = fetch(self, start, end)
        fetched.append(len(found))
        return found

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    with file.open() as stream:
        for piece in range(8):
            for column in (0, 24 << 20):
                stream.seek(column + (piece << 20))
                assert len(stream.read(1 << 20)) == 1 << 20
    assert sum(fetched) <= 2 * 16 << 20
    fetched.clear()
    (file.parent() / "small.parquet").put(bytes(90_000))
    with (file.parent() / "small.parquet").open() as stream:
        stream.seek(24_464)
        stream.read()  # as Arrow reads a footer
        stream.seek(4)
        stream.read(20_000)
        stream.read(20_000)
    assert len(fetched) <= 2


def test_a_failed_write_leaves_what_was_there(folder: Location) -> None:
    file = folder / "part.parquet"
    file.put(b"whole")
    with pytest.raises(ZeroDivisionError), file.staged() as path:
        path.write_bytes(b"ha")
        raise ZeroDivisionError
    assert file.read_bytes() == b"whole"
    assert [info.path for info in folder.files()] == ["part.parquet"]
    if folder.is_local:
        assert [path.name for path in Path(folder.path).iterdir()] == ["part.parquet"]


def test_put_folder_replaces_all_of_the_old_one(folder: Location, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a").write_text("1")
    (source / "last.json").write_text("{}")
    target = folder / "bundle"
    target.put_folder(source, last="last.json")
    (source / "sub" / "a").rename(source / "b")
    target.put_folder(source, last="last.json")
    assert [info.path for info in target.files()] == ["b", "last.json"]
    with target.local_copy() as copy:
        assert (copy / "b").read_text() == "1"


def test_what_a_killed_process_left_of_a_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".bundle.0123456789ab.tmp").mkdir()
    (tmp_path / ".bundle.0123456789ab.tmp" / "model").write_text("half")
    (tmp_path / ".bundle.v2.0123456789ab.tmp").mkdir()
    Location.of(str(tmp_path / "bundle")).remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == [".bundle.v2.0123456789ab.tmp"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    old = tmp_path / "place" / "bundle"
    old.mkdir(parents=True)
    (old / "file").write_text("old")
    rename = Path.replace

    def fail_on_the_new_one(self: Path, target: Path) -> Path:
        if target == old and (self / "file").exists() is False:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_the_new_one)
    with pytest.raises(KeyboardInterrupt):
        Location.of(str(old)).put_folder(tmp_path / "new", last="bundle.json")
    assert (old / "file").read_text() == "old"
    assert [path.name for path in old.parent.iterdir()] == ["bundle"]


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"storage refused .*file/x: "):
        Location.of(str(tmp_path / "file" / "x")).put(b"")


def test_what_is_missing_is_named(folder: Location) -> None:
    with pytest.raises(RequestError, match=r"not found: .*nothing\.parquet"):
        (folder / "nothing.parquet").read_bytes()


def test_a_missing_bucket_is_named(s3_server: str) -> None:
    with pytest.raises(RequestError, match=r"not found: s3://no-such-bucket-anywhere/x\. Check the path, the bucket"):
        Location.of("s3://no-such-bucket-anywhere/x").put(b"")


def test_an_endpoint_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    try:
        with pytest.raises(UnavailableError, match=r"cannot reach s3://bucket/x: .*127\.0\.0\.1:9.*AWS_END") as caught:
            Location.of("s3://bucket/x").read_bytes()
        assert caught.value.why == "away"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_uris() -> None:
    assert Location.of("file:///a/b").path == "/a/b"
    assert Location.of("a").path == str(Path.cwd() / "a")
    with pytest.raises(RequestError, match="names no place"):
        Location.of("s3://")
    assert Location.of("S3://bucket/x").uri == "s3://bucket/x"
    for uri in ("gopher://x", "ftp://host/x", "memory://x"):
        with pytest.raises(RequestError, match=rf"cannot open '{uri}': use a local path or an s3:// URI"):
            Location.of(uri)


def test_a_bucket_has_no_parent() -> None:
    assert Location.of("s3://bucket/a").parent().uri == "s3://bucket"
    assert [place.uri for place in Location.of("s3://bucket/a/b").ancestors()] == ["s3://bucket/a", "s3://bucket"]
    assert [place.uri for place in Location.of("/a/b").ancestors()] == ["/a"]
    with pytest.raises(RequestError, match="s3://bucket is a whole bucket: name a folder in it"):
        Location.of("s3://bucket").parent()


def test_contains(tmp_path: Path) -> None:
    here = Location.of(str(tmp_path))
    assert here.contains(here)
    assert here.contains(here / "a/b")
    assert not (here / "a").contains(here / "ab")
    assert not (here / "a").contains(here)


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL)


@pytest.mark.parametrize("code", NO_LINKS)
def test_a_file_is_created_once_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    file = Location.of(str(tmp_path / "a" / "b.json"))
    assert file.create(b"first")
    assert not file.create(b"second")
    assert file.read_bytes() == b"first"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_full_disk_without_hard_links_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name == "b.json":
            raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match=r"storage refused .*/b\.json: .*No space left"):
        Location.of(str(tmp_path / "b.json")).create(b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def durable(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Folders that are made durable, each with the names that it has then."""
    seen: list[tuple[str, list[str]]] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_dir():
            seen.append((path.name, sorted(entry.name for entry in path.iterdir())))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    return seen


def test_names_are_durable_after_a_write(tmp_path: Path, durable: list[tuple[str, list[str]]]) -> None:
    root = Location.of(str(tmp_path))
    (root / "a" / "b" / "file").put(b"x")
    assert durable == [(tmp_path.name, ["a"]), ("a", ["b"]), ("b", ["file"])]
    durable.clear()
    (root / "a" / "b" / "created").create(b"x")
    (root / "a" / "b" / "file").put(b"y")
    assert [name for name, names in durable if "created" in names] == ["b", "b"]
    durable.clear()
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_text("x")
    (root / "bundle").put_folder(source, last="weights")
    assert ("sub", ["weights"]) in durable
    assert durable[-1] == (tmp_path.name, ["a", "bundle", "source"])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EIO])
def test_a_file_system_may_not_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse_folders(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().is_dir():
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse_folders)
    file = Location.of(str(tmp_path / "a" / "file"))
    if code == errno.EIO:  # the disk is broken
        with pytest.raises(RequestError, match=r"storage refused .*Input/output error"):
            file.put(b"x")
    else:
        file.put(b"x")
        assert file.read_bytes() == b"x"
