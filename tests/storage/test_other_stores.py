"""S3 stores that are no AWS, and answers that people meet: what works, and what the message says to do."""

from collections.abc import Callable
from pathlib import Path

import fsspec.config
import pytest
import s3fs

from bertray.errors import LockedError, RequestError, ShardError, UnavailableError
from bertray.scoring.shard_reader import opened
from bertray.storage.location import Location
from bertray.storage.lock import RunLock
from tests.faults.s3_proxy import FaultyProxy

Behind = Callable[..., FaultyProxy]
CHECKSUM_HEADERS = ("x-amz-checksum-crc32", "x-amz-checksum-crc64nvme", "x-amz-trailer", "x-amz-sdk-checksum-algorithm")


@pytest.mark.parametrize("answer", ["not_implemented", "invalid_argument", "", "refused as it should be"])
def test_a_store_without_conditional_puts_is_named_once_a_run(
    behind: Behind, s3_folder: str, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    is_known = " " in answer
    behind(habits={} if is_known else {"if-none-match": answer})
    output = Location.of(s3_folder)
    with caplog.at_level("WARNING", logger="bertray"):
        for run_id in ("first", "second"):
            caplog.clear()
            with RunLock(output, run_id).held() as lock:
                lock.check()
                with pytest.raises(LockedError, match=f"run {run_id} holds"), RunLock(output, "rival").held():
                    pass
            warnings = [record.getMessage() for record in caplog.records]
            assert len(warnings) == (0 if is_known else 1)
            assert all(s3_folder in warning and "start one at a time" in warning for warning in warnings)


def test_a_rival_s_put_at_the_same_time_shows_that_the_condition_is_known(behind: Behind, s3_folder: str) -> None:
    (Location.of(s3_folder) / "lock").put(b"ours")
    behind(share=1.0, kinds=["conflict"])
    assert (Location.of(s3_folder) / "lock").is_exclusive(b"ours")


@pytest.mark.parametrize("answer", ["not_implemented", "invalid_argument"])
def test_what_is_there_stays_without_conditional_puts(behind: Behind, s3_folder: str, answer: str) -> None:
    behind(habits={"if-none-match": answer})
    file = Location.of(s3_folder) / "archive.json"
    assert file.create(b"ours")
    assert file.create(b"ours")
    assert not file.create(b"another's")
    assert file.read_bytes() == b"ours"


def test_no_checksum_is_sent_unasked(behind: Behind, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behind(habits=dict.fromkeys(CHECKSUM_HEADERS, "bad_digest"))
    file = Location.of(s3_folder) / "file"
    file.put(b"x")
    assert (file.parent() / "created").create(b"x")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    for operation in (Location.put, Location.create):
        with pytest.raises(RequestError, match=r"AWS_REQUEST_CHECKSUM_CALCULATION .*when_required$"):
            operation(Location.of(f"{s3_folder}/new"), b"y")
    assert file.read_bytes() == b"x"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("expired_token", r"\(ExpiredToken\).*temporary credentials.* AWS_SESSION_TOKEN"),
        ("skewed_clock", r"\(RequestTimeTooSkewed\).*Set this machine's clock"),
        ("other_region", r"\(AuthorizationHeaderMalformed\).*Set AWS_DEFAULT_REGION"),
        ("access_denied", r"no permission .*Check AWS_ACCESS_KEY_ID.*FSSPEC_S3_REQUESTER_PAYS=true"),
        ("unknown_key", r"no permission .*Check AWS_ACCESS_KEY_ID.*FSSPEC_S3_ANON=true"),
    ],
)
def test_an_answer_says_what_to_do(behind: Behind, s3_folder: str, answer: str, said: str) -> None:
    (Location.of(s3_folder) / "file").put(b"x")
    behind(share=1.0, kinds=[answer])
    file = Location.of(s3_folder) / "file"
    # `info` asks by HEAD, whose answers have no reason.
    for operation in (file.read_bytes, file.info, file.parent().files, lambda: file.put(b"y")):
        with pytest.raises(UnavailableError, match=said) as caught:
            operation()
        assert caught.value.why == "refused"


def test_a_file_in_an_archived_storage_class_is_named_with_how_to_restore_it(behind: Behind, s3_folder: str) -> None:
    (Location.of(s3_folder) / "bundle" / "model 1.bin").put(bytes(1000))
    behind(share=1.0, kinds=["archived"], matches=lambda method, path: method == "GET" and "list-type" not in path)
    bundle = Location.of(s3_folder) / "bundle"
    bucket = bundle.path.partition("/")[0]
    restore = (
        rf"archived storage class .*aws s3api restore-object --bucket {bucket} --key 'folder/bundle/model 1\.bin' "
    )
    with (bundle / "model 1.bin").open() as stream:
        for read in (stream.read, (bundle / "model 1.bin").read_bytes, bundle.local_copy().__enter__):
            with pytest.raises(RequestError, match=restore) as caught:
                read()
            assert "AWS_ACCESS_KEY_ID" not in str(caught.value)
    with pytest.raises(ShardError, match=rf"^storage refused .*{restore}"), opened(bundle / "model 1.bin"):
        pass


def test_a_public_bucket_is_read_without_keys(
    behind: Behind, s3_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs.S3FileSystem().pipe_file(f"{s3_folder}/file", b"public", ACL="public-read")
    s3fs.S3FileSystem().pipe_file(f"{s3_folder}/private", b"private")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    behind(habits={"authorization": "unknown_key"})
    with pytest.raises(RequestError, match=r"no keys for .*FSSPEC_S3_ANON=true"):
        (Location.of(s3_folder) / "file").read_bytes()
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    fsspec.config.set_conf_env(fsspec.config.conf)  # as it does when it is imported
    s3fs.S3FileSystem.clear_instance_cache()
    place = Location.of(s3_folder)
    assert (place / "file").read_bytes() == b"public"
    with pytest.raises(RequestError, match=r"no permission .*FSSPEC_S3_ANON is set"):
        (place / "private").read_bytes()
