"""An S3 server that can be reached through a proxy with habits."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from bertray.storage import s3
from tests.faults.s3_proxy import FaultyProxy


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, in s, as botocore asked for them. All are cut to a hundredth, s3fs' and ours too."""
    import s3fs
    from aiobotocore.endpoint import AioEndpoint

    asked: list[float] = []

    async def note(self: AioEndpoint, wait_s: float) -> None:
        asked.append(wait_s)
        await short(wait_s)

    async def short(wait_s: float) -> None:
        await asyncio.sleep(wait_s / 100)

    monkeypatch.setattr(AioEndpoint, "_sleep", note)
    monkeypatch.setattr(s3fs.core, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": short}))
    monkeypatch.setattr(s3, "_BODY_BACKOFF_S", s3._BODY_BACKOFF_S / 100)
    return asked


@pytest.fixture
def behind(s3_server: str, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FaultyProxy]]:
    """Starts a `FaultyProxy`, through which every `Location.of` goes from then on."""
    import s3fs

    connected: dict[str, Any] = {}  # straight to the server; to connect again takes half a second
    with ExitStack() as proxies:

        def start(**options: Any) -> FaultyProxy:
            proxy = FaultyProxy(s3_server, **options)
            endpoint, _ = proxies.enter_context(proxy)
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            connected.update(s3fs.S3FileSystem._cache)
            s3fs.S3FileSystem.clear_instance_cache()
            return proxy

        yield start
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem._cache.update(connected)
