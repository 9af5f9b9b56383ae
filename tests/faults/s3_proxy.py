"""An HTTP proxy that makes an S3 server as unreliable as S3 can be, for tests and for benchmarks/.

    with FaultyProxy("http://127.0.0.1:9000", share=0.05) as (endpoint, counts):
        ...  # AWS_ENDPOINT_URL=endpoint
    print(counts)  # Counter({'requests': 812, 'passed': 771, 'slow_down': 9, ...})

Nothing is simulated on the client's side: connections are reset by a TCP RST, bodies end early on the wire.
"""

from __future__ import annotations

import asyncio
import io
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Self
from xml.sax.saxutils import escape

import aiohttp
from aiohttp import web
from yarl import URL

# Answers that S3 gives in place of the one asked for; nothing reaches the server.
ERRORS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "access_denied": (403, "AccessDenied", "Access Denied"),
    "unknown_key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "wrong_signature": (
        403,
        "SignatureDoesNotMatch",
        "The request signature we calculated does not match the signature you provided.",
    ),
    "precondition": (412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold"),
    "no_such_upload": (404, "NoSuchUpload", "The specified upload does not exist."),
    "not_implemented": (501, "NotImplemented", "A header you provided implies functionality that is not implemented."),
    "invalid_argument": (400, "InvalidArgument", "Invalid argument."),
    "bad_digest": (400, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match."),
    "archived": (403, "InvalidObjectState", "The operation is not valid for the object's storage class"),
    "expired_token": (400, "ExpiredToken", "The provided token has expired."),
    "skewed_clock": (403, "RequestTimeTooSkewed", "The difference between the request time and the server's is large."),
    "other_region": (400, "AuthorizationHeaderMalformed", "The region 'us-east-1' is wrong; expecting 'eu-central-1'"),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting operation occurred during the upload."),
}
# Faults that go away when the request is made again.
TRANSIENT = (
    "slow_down",
    "internal_error",
    "reset",  # the connection, before the request is carried out
    "lost_answer",  # the same after it was: the client does not learn of its success
    "reset_in_body",  # half of the answer's body, then a reset
    "short_body",  # half of it, then an orderly end of the connection
    "slow_body",  # all of it, little by little
)
# The server says nothing (more) until the client gives up.
HANGS = ("hang", "hang_in_body")
_NEED_BODY = ("reset_in_body", "short_body", "slow_body", "hang_in_body")
# A whole answer, with a header that says something else.
WRONG_CHECKSUM = "wrong_checksum"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "upgrade"}
_NUM_TRICKLES = 4


class FaultyProxy:
    """Stands before an S3 server on a free port of 127.0.0.1, in a thread of its own.

    Args:
        upstream: the server's endpoint.
        share: of the requests that meet a fault; may be changed at any time.
        kinds: the faults to draw from, of `TRANSIENT`, `HANGS`, `ERRORS` and `WRONG_CHECKSUM`.
        plan: what the next requests meet, in order, before any draw; "" is no fault. May be changed at any time.
        matches: which requests may meet a fault (method, path with query); others pass and use up nothing of the plan.
        habits: what a request meets that has this header: an error of `ERRORS`, or "", and the header is ignored.
        slow_s: how long a slow body takes.

    Attributes:
        counts: requests, passed, and each kind of fault. Where an answer has no body, one that would have ended early
            is a "lost_answer", and a slow one passes.
    """

    def __init__(
        self,
        upstream: str,
        share: float = 0.0,
        *,
        seed: int = 0,
        kinds: Sequence[str] = TRANSIENT,
        plan: Sequence[str] = (),
        matches: Callable[[str, str], bool] = lambda method, path: True,
        habits: Mapping[str, str] = MappingProxyType({}),
        slow_s: float = 0.2,
    ) -> None:
        self.share = share
        self.kinds = list(kinds)
        self.counts: Counter[str] = Counter()
        self.endpoint = ""
        self._upstream = upstream.rstrip("/")
        self.plan = list(plan)
        self._matches = matches
        self._habits = habits
        self._slow_s = slow_s
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()], daemon=True)

    def __enter__(self) -> tuple[str, Counter[str]]:
        self.start()
        return self.endpoint, self.counts

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as self._client:
            application = web.Application(client_max_size=0)  # no limit
            application.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._started.set()
            await self._stop.wait()
            await runner.cleanup()

    def _draw(self, request: web.Request) -> str:
        for name, kind in self._habits.items():
            if name in request.headers and kind:
                return kind
        if not self._matches(request.method, request.raw_path):
            return ""
        if self.plan:
            return self.plan.pop(0)
        return self._random.choice(self.kinds) if self._random.random() < self.share else ""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        kind = self._draw(request)
        self.counts["requests"] += 1
        data = await request.read()
        if kind in ERRORS:
            self.counts[kind] += 1
            return _error(*ERRORS[kind], request)
        if kind == "reset":
            self.counts[kind] += 1
            return _end(request, reset=True)
        if kind == "hang":
            self.counts[kind] += 1
            await self._stop.wait()
            return _end(request, reset=True)
        status, headers, body = await self._forward(request, data)
        if kind in _NEED_BODY and not body:
            kind = "" if kind == "slow_body" else "lost_answer"
        self.counts[kind or "passed"] += 1
        if kind == "lost_answer":
            return _end(request, reset=True)
        if kind == WRONG_CHECKSUM:
            headers["x-amz-checksum-crc32"] = "AAAAAA=="
        if kind not in _NEED_BODY:
            return web.Response(status=status, headers=headers, body=body)
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if kind == "slow_body":
            size = -(-len(body) // _NUM_TRICKLES)
            for start in range(0, len(body), size):
                await asyncio.sleep(self._slow_s / _NUM_TRICKLES)
                await response.write(body[start : start + size])
            return response
        await response.write(body[: len(body) // 2])
        if kind == "hang_in_body":
            await self._stop.wait()
        await asyncio.sleep(0.01)  # a reset takes with it what has not been sent
        return _end(request, reset=kind == "reset_in_body")

    async def _forward(self, request: web.Request, data: bytes) -> tuple[int, dict[str, str], bytes]:
        # As they came, signed Host included.
        dropped = _HOP_BY_HOP | set(self._habits)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in dropped}
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with self._client.request(
            request.method, url, headers=headers, data=io.BytesIO(data) if data else None, allow_redirects=False
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            return answer.status, kept, await answer.read()


def _error(status: int, code: str, message: str, request: web.Request) -> web.Response:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{escape(message)}</Message>"
        f"<Resource>{escape(request.path)}</Resource><RequestId>0123456789ABCDEF</RequestId></Error>"
    )
    return web.Response(status=status, text=body, content_type="application/xml")


def _end(request: web.Request, *, reset: bool) -> web.Response:
    """End the connection, whatever has been answered: by a reset, or as if all were said."""
    transport = request.transport
    if transport is not None and reset:
        no_linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        transport.abort()
    elif transport is not None:
        transport.close()
    return web.Response()  # goes nowhere
