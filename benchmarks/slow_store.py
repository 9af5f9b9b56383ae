"""An S3 store in memory that answers every request after the same time, on loopback.

    python -m benchmarks.slow_store S_A_REQUEST      (until its standard input ends)

It costs less processor time a request than moto, which would be what is measured. It knows what bertray asks for:
objects with ranges and conditions, copies, listings and removals; it checks no signature.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections import Counter
from urllib.parse import unquote
from xml.sax.saxutils import escape

from aiohttp import web

_MODIFIED_HTTP, _MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT", "2024-01-01T00:00:00.000Z"
_MAX_KEYS = 1000


class SlowStore:
    def __init__(self, s_a_request: float) -> None:
        self._s_a_request = s_a_request
        self._objects: dict[str, bytes] = {}
        self._etags: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    async def answer(self, request: web.Request) -> web.Response:
        data = await request.read()
        bucket, _, key = request.path.lstrip("/").partition("/")
        name = f"{bucket}/{key}"
        if bucket == "counts":  # of requests so far; not one itself
            return web.json_response(self.counts)
        await asyncio.sleep(self._s_a_request)
        kind = request.method + (" copy" if "x-amz-copy-source" in request.headers else "") + (" list" * (not key))
        self.counts[kind] += 1
        if not key:
            return self._listed(bucket, request) if request.method == "GET" else web.Response()
        if request.method == "PUT":
            return self._put(name, request, data)
        if request.method == "DELETE":
            self._objects.pop(name, None)
            return web.Response(status=204)
        if name not in self._objects:
            return _error(404, "NoSuchKey")
        return self._object(name, request)

    def _put(self, name: str, request: web.Request, data: bytes) -> web.Response:
        if request.headers.get("If-None-Match") == "*" and name in self._objects:
            return _error(412, "PreconditionFailed")
        if source := request.headers.get("x-amz-copy-source"):
            source = unquote(source).lstrip("/")
            if source not in self._objects:
                return _error(404, "NoSuchKey")
            data = self._objects[source]
        self._objects[name], self._etags[name] = data, f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        etag = self._etags[name]
        body = (
            f"<CopyObjectResult><ETag>{escape(etag)}</ETag><LastModified>{_MODIFIED}</LastModified></CopyObjectResult>"
        )
        return web.Response(text=body if source else "", headers={"ETag": etag}, content_type="application/xml")

    def _object(self, name: str, request: web.Request) -> web.Response:
        data, headers = self._objects[name], {"ETag": self._etags[name], "Last-Modified": _MODIFIED_HTTP}
        wanted = request.http_range
        if request.method == "GET" and wanted.start is not None:
            start, stop, _ = wanted.indices(len(data))
            if start >= len(data):
                return _error(416, "InvalidRange")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return web.Response(status=206, body=data[start:stop], headers=headers)
        return web.Response(body=data, headers=headers)

    def _listed(self, bucket: str, request: web.Request) -> web.Response:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        after = request.query.get("continuation-token", "")
        keys = sorted(name[len(bucket) + 1 :] for name in self._objects if name.startswith(f"{bucket}/{prefix}"))
        entries: dict[str, str] = {}
        for key in keys:
            folder, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                entries[prefix + folder + delimiter] = "CommonPrefixes"
            else:
                entries[key] = "Contents"
        page = [entry for entry in sorted(entries) if entry > after][: _MAX_KEYS + 1]
        is_cut, page = len(page) > _MAX_KEYS, page[:_MAX_KEYS]
        parts = [f"<Name>{bucket}</Name><IsTruncated>{str(is_cut).lower()}</IsTruncated>"]
        if is_cut:
            parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for entry in page:
            if entries[entry] == "CommonPrefixes":
                parts.append(f"<CommonPrefixes><Prefix>{escape(entry)}</Prefix></CommonPrefixes>")
                continue
            name = f"{bucket}/{entry}"
            parts.append(
                f"<Contents><Key>{escape(entry)}</Key><LastModified>{_MODIFIED}</LastModified>"
                f"<ETag>{escape(self._etags[name])}</ETag><Size>{len(self._objects[name])}</Size></Contents>"
            )
        return web.Response(
            text=f"<ListBucketResult>{''.join(parts)}</ListBucketResult>", content_type="application/xml"
        )


def _error(status: int, code: str) -> web.Response:
    return web.Response(status=status, text=f"<Error><Code>{code}</Code></Error>", content_type="application/xml")


async def serve(s_a_request: float) -> None:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{tail:.*}", SlowStore(s_a_request).answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    print(json.dumps({"endpoint": f"http://{host}:{port}"}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
