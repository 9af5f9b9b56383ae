"""Storage that fails, for real: an S3 server behind a proxy that breaks connections, a full disk, refused access."""

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.errors import RequestError, UnavailableError
from bertray.storage import s3
from bertray.storage.location import Location
from tests.faults.s3_proxy import TRANSIENT, WRONG_CHECKSUM, FaultyProxy

PART_BYTES = 5 << 20  # S3 takes no smaller part, but the last
NEEDS_PARTS = os.urandom(2 * PART_BYTES + 12345)
NOBODY = 65534


def straight(uri: str) -> Location:
    """A location that goes straight to the server, whatever is started later: it is connected now."""
    place = Location.of(uri)
    place.fs.connect()
    return place


def parquet(num_rows: int) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"row": range(num_rows), "text": [f"text {row} " * (row % 40) for row in range(num_rows)]})
    pq.write_table(table, buffer, row_group_size=max(1, num_rows // 8))
    return buffer.getvalue()


def read_parquet(place: Location) -> pa.Table:
    with place.open() as file:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 12).read()


def read_from(place: Location, start: int, end: int) -> bytes:
    with place.open() as file:
        file.seek(start)
        return bytes(file.read(end - start))


def stage(place: Location, data: bytes) -> None:
    with place.staged() as path:
        path.write_bytes(data)


def copied(place: Location) -> dict[str, bytes]:
    with place.local_copy() as folder:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def source_folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "weights").write_bytes(os.urandom(200_000))
    (path / "empty").write_bytes(b"")
    (path / "last.json").write_bytes(b"{}")
    return path


def operations(place: Location, source: Path) -> dict[str, Callable[[], object]]:
    """Every operation of a location, on places that are there as `fill` leaves them."""
    return {
        "files": place.files,
        "info": (place / "file").info,
        "exists": (place / "file").exists,
        "is_file": (place / "file").is_file,
        "bucket": place.parent().exists,
        "open": lambda: read_from(place / "file", 10, 20),
        "parquet": lambda: read_parquet(place / "part.parquet"),
        "read_bytes": (place / "file").read_bytes,
        "put": lambda: (place / "new").put(b"x"),
        "create": lambda: (place / "created").create(b"x"),
        "staged": lambda: stage(place / "staged", b"x"),
        "put_folder": lambda: (place / "bundle").put_folder(source, last="last.json"),
        "local_copy": lambda: copied(place / "folder"),
        "remove": (place / "file").remove,
    }


def fill(place: Location) -> None:
    (place / "file").put(bytes(range(256)))
    (place / "part.parquet").put(parquet(1000))
    (place / "folder" / "file").put(b"folder's")


def test_every_operation_ends_right(
    behind: Callable[..., FaultyProxy], s3_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", PART_BYTES)
    direct = straight(s3_folder)
    proxy = behind(share=0.2, seed=1, slow_s=0.05)
    place = Location.of(s3_folder)
    source = source_folder(tmp_path / "source")
    expected = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    shard = parquet(3000)
    for number in range(10):
        folder = place / f"{number}"
        file = folder / "file"
        assert not file.exists()
        assert not file.is_file()
        content = os.urandom(50_000) + b"%d" % number
        file.put(content)
        assert file.exists()
        assert file.is_file()
        assert not folder.is_file()
        assert file.read_bytes() == content
        assert read_from(file, 100, 40_000) == content[100:40_000]
        assert file.info() == (direct / f"{number}" / "file").info()
        assert (folder / "created").create(b"mine %d" % number)
        assert not (folder / "created").create(b"another's")
        stage(folder / "part.parquet", shard)
        assert read_parquet(folder / "part.parquet").equals(pq.read_table(io.BytesIO(shard)))
        (folder / "bundle").put_folder(source, last="last.json")
        assert copied(folder / "bundle") == expected
        assert [info.path for info in folder.files()] == [
            *("bundle/empty", "bundle/last.json", "bundle/sub/weights"),
            *("created", "file", "part.parquet"),
        ]
        file.remove()
        (folder / "bundle").remove()
        assert [info.path for info in (direct / f"{number}").files()] == ["created", "part.parquet"]
    for _ in range(2):
        stage(place / "large", NEEDS_PARTS)
        assert (direct / "large").read_bytes() == NEEDS_PARTS
        (place / "large").remove()
    assert all(proxy.counts[kind] >= 3 for kind in TRANSIENT), proxy.counts


def test_a_create_whose_answer_is_lost_is_ours(behind: Callable[..., FaultyProxy], s3_folder: str) -> None:
    proxy = behind(plan=["lost_answer"], matches=lambda method, path: method == "PUT")
    file = Location.of(s3_folder) / "lock"
    assert file.create(b"ours")
    assert proxy.counts["lost_answer"] == 1
    assert not file.create(b"another's")
    assert file.read_bytes() == b"ours"


def test_a_create_that_meets_another(behind: Callable[..., FaultyProxy], s3_folder: str) -> None:
    file = Location.of(s3_folder) / "lock"
    file.put(b"ours")
    proxy = behind(plan=["precondition", "conflict", "conflict"], matches=lambda method, path: method == "PUT")
    file = Location.of(s3_folder) / "lock"
    assert not file.create(b"another's")  # refused as MinIO does it
    assert not file.create(b"another's")  # both at once
    assert file.read_bytes() == b"ours"
    assert not (file.parent() / "other").create(b"ours")  # the other put has not ended
    assert proxy.counts["conflict"] == 2


def test_what_fails_for_good_names_the_place(
    behind: Callable[..., FaultyProxy], s3_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Location.of(s3_folder))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 0.05)
    proxy = behind(share=1.0)
    place = Location.of(s3_folder)
    named = rf"^(cannot reach|storage refused) {place.parent()}.*: .+\. (Check|Try)"
    for kind in (*TRANSIENT, "hang"):
        if kind == "slow_body":
            continue
        proxy.kinds = [kind]
        for name, operation in operations(place, source_folder(tmp_path / kind)).items():
            proxy.counts.clear()
            with pytest.raises(UnavailableError, match=named) as caught:
                print(kind, name, operation())
            assert caught.value.why == "away"
            assert proxy.counts["passed"] == 0
            # s3fs and aiohttp each may ask twice, and s3fs that twice for a read: no more.
            assert proxy.counts["requests"] <= 4


def test_a_body_that_ends_early_is_never_taken_for_the_whole(
    behind: Callable[..., FaultyProxy], s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = straight(s3_folder)
    fill(direct)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 0.5)
    monkeypatch.setattr(s3, "_PART_BYTES", 4)
    proxy = behind(matches=lambda method, path: method == "GET" and "list-type" not in path)
    place = Location.of(s3_folder)
    for kind, *names in (
        ("reset_in_body", "open", "parquet", "read_bytes", "local_copy"),
        ("short_body", "open", "parquet", "read_bytes", "local_copy"),
        ("hang_in_body", "open"),  # a timeout each time
    ):
        proxy.share, proxy.kinds = 1.0, [kind]
        for name in names:
            with pytest.raises(RequestError, match=rf"^cannot reach {place}.*: .+\. Check"):
                print(kind, name, operations(place, Path())[name]())
        # S3fs asks twice, each of the two times: only the fourth answer is whole.
        proxy.share = 0.0
        for name in names:
            proxy.plan = [kind] * 3
            assert operations(place, Path())[name]() == operations(direct, Path())[name]()
            assert not proxy.plan


def test_a_checksum_that_does_not_match_is_not_passed_over(
    behind: Callable[..., FaultyProxy], s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Location.of(s3_folder))
    proxy = behind(plan=[WRONG_CHECKSUM], kinds=[WRONG_CHECKSUM], matches=lambda method, path: method == "GET")
    file = Location.of(s3_folder) / "file"
    assert file.read_bytes() == bytes(range(256))
    assert proxy.counts["requests"] == 2
    proxy.share = 1.0
    for read in (file.read_bytes, lambda: read_from(file, 10, 20)):
        with pytest.raises(RequestError, match=rf"^cannot read {file}: .*AWS_RESPONSE_CHECKSUM_VALIDATION=when_req"):
            read()
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    file.fs.connect(refresh=True)
    assert file.read_bytes() == bytes(range(256))


def test_a_file_is_read_by_one_request(behind: Callable[..., FaultyProxy], s3_folder: str) -> None:
    """Not in parts, which may be of two versions."""
    fill(Location.of(s3_folder))
    proxy = behind()
    assert (Location.of(s3_folder) / "file").read_bytes() == bytes(range(256))
    assert proxy.counts["requests"] == 1


def test_who_reads_a_file_meets_an_os_error(behind: Callable[..., FaultyProxy], s3_folder: str) -> None:
    fill(Location.of(s3_folder))
    proxy = behind(kinds=["reset_in_body"])
    with (Location.of(s3_folder) / "file").open() as stream:
        proxy.share = 1.0
        with pytest.raises(OSError, match="cannot reach") as caught:
            stream.read()
        assert isinstance(caught.value, RequestError)
        assert stream.tell() == 0
        proxy.share = 0.0
        assert stream.read() == bytes(range(256))


def test_an_upload_in_parts_whose_completion_is_not_answered(
    behind: Callable[..., FaultyProxy], s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", PART_BYTES)
    proxy = behind(matches=lambda method, path: method == "POST" and "uploadId" in path)
    # Asked again, AWS and moto say once more that it is complete; other stores know the upload no more.
    for number, plan in enumerate([["lost_answer"], ["lost_answer", "no_such_upload"]]):
        proxy.plan = plan
        file = Location.of(s3_folder) / f"large-{number}"
        stage(file, NEEDS_PARTS)
        assert not proxy.plan
        assert file.read_bytes() == NEEDS_PARTS


def test_an_upload_that_fails_for_good_leaves_nothing(
    behind: Callable[..., FaultyProxy], s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", PART_BYTES)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    direct = straight(s3_folder)
    (direct / "old").put(b"old")
    proxy = behind(kinds=["slow_down", "internal_error", "reset"])
    for num_passed in range(5):  # the upload's start, three parts, its completion
        for name in ("new", "old"):
            proxy.share, proxy.plan = 1.0, [""] * num_passed
            file = Location.of(s3_folder) / name
            with pytest.raises(RequestError, match=rf"^(cannot reach|storage refused) {file}: "):
                stage(file, NEEDS_PARTS)
            assert not proxy.plan
            assert [info.path for info in direct.files()] == ["old"]
            assert (direct / "old").read_bytes() == b"old"


def test_attempts_wait_longer_each_time(behind: Callable[..., FaultyProxy], s3_folder: str, waits: list[float]) -> None:
    proxy = behind(share=1.0, kinds=["internal_error"])
    with pytest.raises(RequestError, match=r"reached max retries: 6.*\. Try again later"):
        (Location.of(s3_folder) / "file").put(b"x")
    assert proxy.counts["requests"] == 7
    assert len(waits) == 6
    assert all(0 < wait_s <= 2**number for number, wait_s in enumerate(waits))


def test_the_user_sets_attempts_and_mode(
    behind: Callable[..., FaultyProxy], s3_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
    proxy = behind(share=1.0, kinds=["internal_error"])
    place = Location.of(s3_folder)
    with pytest.raises(RequestError, match="storage refused"):
        place.put(b"x")
    assert proxy.counts["requests"] == 2
    assert place.fs.s3.meta.config.retries == {"mode": "adaptive", "total_max_attempts": 2}


def test_refused_credentials_are_named_at_once(
    behind: Callable[..., FaultyProxy], s3_folder: str, tmp_path: Path, waits: list[float]
) -> None:
    fill(Location.of(s3_folder))
    proxy = behind(share=1.0)
    place = Location.of(s3_folder)
    for kind in ("access_denied", "unknown_key", "wrong_signature"):
        proxy.kinds = [kind]
        todo = operations(place, source_folder(tmp_path / kind))
        assert todo.pop("is_file")() is False  # see there
        for name, operation in todo.items():
            proxy.counts.clear()
            with pytest.raises(RequestError, match=r"^no permission for s3://.*: .*\. Check AWS_ACCESS_KEY_ID, "):
                print(kind, name, operation())
            assert proxy.counts["requests"] <= 2
    assert waits == []


def test_a_missing_bucket_is_named_by_every_operation(s3_server: str, tmp_path: Path) -> None:
    place = Location.of("s3://no-such-bucket-anywhere/x")
    todo = operations(place, source_folder(tmp_path / "source"))
    assert todo.pop("exists")() is False
    assert todo.pop("bucket")() is False
    assert todo.pop("is_file")() is False
    todo.pop("remove")()  # nothing there: nothing to do
    for name, operation in todo.items():
        with pytest.raises(RequestError, match=rf"^not found: {place}.*\. Check the path, the bucket"):
            print(name, operation())


def test_what_cannot_be_removed_is_named(behind: Callable[..., FaultyProxy], s3_folder: str) -> None:
    direct = straight(s3_folder)
    fill(direct)
    behind(share=1.0, kinds=["access_denied"], matches=lambda method, path: method in ("DELETE", "POST"))
    with pytest.raises(RequestError, match=r"no permission for .*/folder: "):
        (Location.of(s3_folder) / "folder").remove()
    assert (direct / "folder" / "file").exists()


def test_an_object_that_is_replaced_while_it_is_read_is_noticed(s3_folder: str) -> None:
    file = Location.of(s3_folder) / "file"
    file.put(b"old" * 1000)
    with file.open() as stream:
        file.put(b"new" * 1000)
        with pytest.raises(RequestError, match=rf"storage refused {file}: .*no longer exists"):
            stream.read()


def test_a_name_that_leads_out_of_the_folder_is_refused(s3_folder: str) -> None:
    place = Location.of(s3_folder)
    (place / "file").put(b"x")
    place.fs.pipe_file(f"{place.path}//tmp/absolute", b"x")
    with pytest.raises(RequestError, match=rf"storage refused {place}: the name .*//tmp/absolute leads out"):
        copied(place)


def run_restricted(restriction: str, folder: Path, code: str) -> None:
    """Run code in a process that restricts itself: a limit cannot be taken back, nor can root."""
    script = f"""
import os, pathlib, resource, sys
from bertray.errors import RequestError
from bertray.storage.location import Location

folder = pathlib.Path(sys.argv[1])
place = Location.of(str(folder))
{restriction}

def refused(operation, *arguments, **options):
    try:
        operation(*arguments, **options)
    except RequestError as error:
        return str(error)
    raise AssertionError("it was not refused")

{code}
"""
    finished = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert finished.returncode == 0, finished.stderr


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    place = Location.of(str(folder))
    (place / "old").put(b"old")
    source_folder(folder / "bundle")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    source_folder(tmp_path / "source")
    run_restricted(
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))",
        folder,
        """
data = bytes(1 << 16)
assert refused((place / "old").put, data) == f"storage refused {place}/old: [Errno 27] File too large"
assert refused((place / "new").put, data).startswith(f"storage refused {place}/new: ")
assert refused((place / "created").create, data).startswith(f"storage refused {place}/created: ")
said = refused((place / "bundle").put_folder, folder.parent / "source", last="last.json")
assert said.startswith(f"storage refused {place}/bundle: ") and "File too large" in said
""",
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_refused_access_is_named() -> None:
    with tempfile.TemporaryDirectory(prefix="bertray-") as name:  # pytest's own are closed to others
        folder = Path(name)
        place = Location.of(name)
        (place / "closed" / "file").put(b"old")
        (place / "old").put(b"old")
        (place / "old").put(b"old")
        folder.chmod(0o555)
        (folder / "old").chmod(0o000)
        (folder / "closed").chmod(0o000)
        run_restricted(
            f"os.geteuid() or os.setuid({NOBODY})",
            folder,
            """
for operation, *arguments in [
    ((place / "new").put, b"x"),
    ((place / "sub" / "new").put, b"x"),
    ((place / "new").create, b"x"),
    ((place / "old").read_bytes,),
    ((place / "old").open,),
    ((place / "old").remove,),
    ((place / "closed" / "file").info,),
]:
    said = refused(operation, *arguments)
    assert said.startswith(f"no permission for {place}/") and said.endswith("Check its mode and owner"), said
""",
        )
        folder.chmod(0o755)
        (folder / "closed").chmod(0o755)
        assert sorted(path.name for path in folder.rglob("*")) == ["closed", "file", "old"]
