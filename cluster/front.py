"""What Ray Serve's processes need to be told from inside: limits on headers, answers that are shared, and the loopback.

Its proxy, which stands before the app, imports this file by the name `BEFORE_THE_APP` in its environment.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import ray
import uvicorn.config
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BEFORE_THE_APP = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.front.before_the_app"}
"""The environment in which Serve's proxy calls `before_the_app`."""

LOOPBACK = "127.0.0.1"
HEADERS_S = 30.0
"""Seconds that the headers of a request may take."""
LARGEST_HEADERS = 2**16
"""Bytes that they may have."""
FRESH_S = 1.0
"""Seconds for which an answer is given again."""
LARGEST_SHARED = 2**23
"""Bytes of an answer that is shared; a report has 5 MB, most of it the library that draws."""
MOST_SHARED = 64
SHARED_STATUSES = (200, 404, 503)
"""The answers that are true for everybody who asks the same; how often a client may call is not."""

Answer: TypeAlias = list[Message]


def before_the_app() -> list[Middleware]:
    """Have this process's servers limit headers, and return what stands before their app."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HastyProtocol.__name__}"
    return [Middleware(SharedAnswers)]


def stay_on_loopback() -> None:
    """Have the app's process, a replica of Serve, listen on the loopback where all of its node's Ray does.

    Serve opens a port for calls between deployments, of which there is one here, on all interfaces, and asks nobody.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    open_port = replica.add_port_to_grpc_server
    if ray.util.get_node_ip_address() == LOOPBACK:  # type: ignore[no-untyped-call]
        replica.add_port_to_grpc_server = lambda server, place: open_port(server, place.replace("[::]", LOOPBACK))


class HastyProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which by itself would wait for ever for the end of a request's headers."""

    headers_s = HEADERS_S
    _timer: asyncio.TimerHandle | None = None
    _waiting_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch(0)

    def data_received(self, data: bytes) -> None:
        """Read on; outside of a request this is the next one's beginning, or what is left of the last one's body."""
        super().data_received(data)
        self._watch(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        """End the watch with the connection."""
        self._end_watch()
        super().connection_lost(exc)

    def _watch(self, received: int) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_watch()  # the headers are here, and the app decides how long it waits for a body
            return
        self._waiting_bytes += received
        if self._timer is None:
            self._timer = self.loop.call_later(self.headers_s, self._cut)
        if self._waiting_bytes > LARGEST_HEADERS:
            self._cut()

    def _end_watch(self) -> None:
        self._waiting_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


class SharedAnswers:
    """An ASGI app that asks `app` once for all who ask the same at a time, and at most once in `FRESH_S` seconds.

    The same means: the same path and the same headers, so also the same token. A change that `app` makes ends all
    that was kept. `clock` gives seconds.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._kept: OrderedDict[Hashable, tuple[float, asyncio.Future[Answer | None]]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] in ("HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
        elif scope["method"] == "GET":
            await self._share(scope, receive, send)
        else:
            await self._change(scope, receive, send)

    async def _share(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the answer that is kept or on its way; who asks first, or for what cannot be shared, asks the app."""
        key = (scope.get("raw_path", scope["path"]), scope.get("query_string"), *scope["headers"])
        asked = self._kept.get(key)
        if asked is None or (asked[1].done() and self._clock() - asked[0] > FRESH_S):
            await self._ask(key, scope, receive, send)
            return
        answer = await asyncio.shield(asked[1])  # who hangs up must not cancel it for the others
        if answer is None:
            await self._app(scope, receive, send)
            return
        for message in answer:
            await send(message)

    async def _ask(self, key: Hashable, scope: Scope, receive: Receive, send: Send) -> None:
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        now = self._clock()
        for old in [one for one, (asked, kept) in self._kept.items() if kept.done() and now - asked > FRESH_S]:
            del self._kept[old]
        self._kept[key] = now, answer
        while len(self._kept) > MOST_SHARED:
            self._kept.popitem(last=False)
        seen: Answer = []

        async def send_and_keep(message: Message) -> None:
            if not answer.done():
                if message["type"] == "http.response.start" and not _is_shareable(message):
                    self._drop(key, answer)
                else:
                    seen.append(message)
                    if message["type"] == "http.response.body" and not message.get("more_body"):
                        answer.set_result(seen)
            await send(message)

        try:
            await self._app(scope, receive, send_and_keep)
        finally:
            if not answer.done():
                self._drop(key, answer)

    def _drop(self, key: Hashable, answer: asyncio.Future[Answer | None]) -> None:
        """Let all who wait for an answer ask by themselves."""
        answer.set_result(None)
        if (kept := self._kept.get(key)) is not None and kept[1] is answer:
            del self._kept[key]

    async def _change(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_forget(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._kept.clear()
            await send(message)

        await self._app(scope, receive, send_and_forget)


def _is_shareable(start: Message) -> bool:
    """Whether an answer that starts so is of a known, moderate length and true for all."""
    length = Headers(raw=start["headers"]).get("content-length", "")
    return start["status"] in SHARED_STATUSES and length.isdecimal() and int(length) <= LARGEST_SHARED
