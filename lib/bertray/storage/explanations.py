"""What storage answered, as a sentence that names the place and the next step."""

from __future__ import annotations

import os
import shlex
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, NoCredentialsError

from bertray.errors import UnavailableError, Why
from bertray.storage import s3

_CREDENTIALS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or the role"
_NO_KEYS = "FSSPEC_S3_ANON=true reads a public bucket without keys"
_DENIED = (
    f"Check {_CREDENTIALS} and the bucket's policy; {_NO_KEYS}, FSSPEC_S3_REQUESTER_PAYS=true one whose reader pays"
)
_NEW_TOKEN = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_OTHER_REGION = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301")


def explained(
    uri: str, path: str, is_local: bool, error: Exception, kind: type[UnavailableError]
) -> UnavailableError | None:
    """The error for the user; None: it does not come from the storage."""
    message = _explanation(uri, path, is_local, error)
    is_away = not is_local and s3.is_away(error)
    why: Why = "missing" if isinstance(error, FileNotFoundError) else "away" if is_away else "refused"
    return None if message is None else kind.because(why, message)


def _explanation(uri: str, path: str, is_local: bool, error: Exception) -> str | None:
    # s3fs translates errors: S3's answer, with the operation and the number of attempts, is the cause.
    answer = error.__cause__ if isinstance(error.__cause__, ClientError) else None
    # fsspec's timeout is empty, but has a cause.
    reason = (str(answer or error) or str(error.__cause__ or "") or type(error).__name__).rstrip(".")
    if isinstance(error, FileNotFoundError):
        check = "the path" if is_local else "the path, the bucket and AWS_ENDPOINT_URL"
        return f"not found: {uri}. Check {check}"
    if answer is not None and isinstance(error, OSError):
        is_forbidden = isinstance(error, PermissionError) and s3.error_code(error) != "InvalidObjectState"
        verb = "no permission for" if is_forbidden else "storage refused"
        return f"{verb} {uri}: {reason}. {_next_step(path, answer.response, is_forbidden)}"
    if isinstance(error, PermissionError):
        return f"no permission for {uri}: {reason}. Check its mode and owner"
    if isinstance(error, FlexibleChecksumError):  # `rclone serve s3`, for one
        return (
            f"cannot read {uri}: {reason}. A store that sends the checksum of a whole file with a part of it "
            "needs AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
        )
    if isinstance(error, NoCredentialsError):
        return f"no keys for {uri}: {reason}. Set {_CREDENTIALS}; {_NO_KEYS}"
    if not is_local and isinstance(error, (BotoCoreError, *s3.no_answer())):
        return f"cannot reach {uri}: {reason}. Check {_CREDENTIALS} and AWS_ENDPOINT_URL"
    if not is_local and isinstance(error, ValueError | RecursionError):  # of botocore: a setting; redirects in a circle
        return f"cannot use {uri}: {reason}. Check AWS_ENDPOINT_URL (http://HOST:PORT) and the other AWS variables"
    # Such as a full disk, a file where a folder should be.
    return f"storage refused {uri}: {reason}" if isinstance(error, OSError) else None


def _next_step(path: str, response: dict[str, Any], is_forbidden: bool) -> str:
    """What to do about an answer of S3."""
    facts, about = response["Error"], response.get("ResponseMetadata", {})
    code, status = str(facts.get("Code", "")), about.get("HTTPStatusCode", 0)
    if code == "InvalidObjectState":
        bucket, _, key = path.partition("/")
        restore = f"--bucket {bucket} --key {shlex.quote(key)} --restore-request Days=7"
        return (
            f"It is in an archived storage class (Glacier): restore it with aws s3api restore-object {restore}, wait "
            "until that is done, which takes hours, and run again"
        )
    if code in _NEW_TOKEN:
        return "Get new temporary credentials, as with aws sso login, or set AWS_SESSION_TOKEN and both keys anew"
    if code == "RequestTimeTooSkewed":
        return "Set this machine's clock: S3 allows a difference of 15 minutes"
    if code in _OTHER_REGION:
        region = facts.get("Region") or about.get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return f"Set AWS_DEFAULT_REGION{f'={region}' if region else ''}, the region of the bucket"
    if is_forbidden and "FSSPEC_S3_ANON" in os.environ:
        return "FSSPEC_S3_ANON is set, so no key was sent: unset it where a key is needed"
    if status in (400, 501) and os.environ.get(s3.CHECKSUMS, "when_required").lower() != "when_required":
        return f"If the store does not take the checksums that {s3.CHECKSUMS} asks for, set it to when_required"
    if is_forbidden:
        return _DENIED
    if status in (501, 507):
        return "The store cannot do that" if status == 501 else "The store's disk is full"
    return "Try again later" if status >= 500 else f"Check {_CREDENTIALS}, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
