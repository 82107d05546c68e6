"""The guard of the HTTP service: it checks the token, the origin, the rate and the size of every call.

`Guard` stands before the app and passes granted calls on; every other call gets a 4xx with a reason, before the app
sees it. It remembers nothing but the rates of the latest clients.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BYTES = 2**18
"""The largest body of a request: a hundred specs, and as much YAML as is read in less than a second."""
HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?", re.ASCII)
"""A name or an address in the header `Host`, without a user, a path, or anything else of a URL."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/style.css", "/page.js", "/chart.js")
"""The paths that need no token: the page and the description of the service, which are the same for everyone."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

CALLS_PER_S = 20.0
BURST = 100.0
CHANGE_COSTS = 10.0
"""The number of plain calls that one call counts for if it changes something."""
MOST_CLIENTS = 4096

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is not granted: its HTTP status, and a reason in the usual three parts."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(status, reason, headers)
        self.status = status
        self.reason = reason
        self.headers = headers


@dataclass(frozen=True)
class Access:
    """The rules by which the service answers a call.

    `digest` is that of the token (see `digest_of`), so that the token itself stays with its owner; with None no token
    is needed, and then only calls that were addressed to this machine itself are answered.
    """

    digest: bytes | None = None
    calls_per_s: float = CALLS_PER_S
    burst: float = BURST


def digest_of(token: bytes) -> bytes:
    """The digest of a token, by which the service knows it again, and with which nobody can call the service."""
    return hashlib.sha256(token).digest()


class Guard:
    """An ASGI app that passes on to `app` the calls that `access` allows. `clock` gives seconds."""

    def __init__(self, app: ASGIApp, access: Access, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._access = access
        self._buckets = Buckets(access.calls_per_s, access.burst, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            safely = _with_headers(send)
            try:
                self._check(scope)
            except Refused as refused:
                await send_refusal(refused, safely)
            else:
                await self._app(scope, bounded(receive), safely)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # there is none here; servers answer it with 403

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        is_safe = scope["method"] in SAFE_METHODS
        client = (scope.get("client") or ("unknown",))[0]
        wait_s = self._buckets.take(client, 1.0 if is_safe else CHANGE_COSTS)
        if wait_s > 0:
            raise Refused(
                429,
                f"{client} calls too often; expected {self._access.calls_per_s:g} calls a second, where one that "
                f"changes something counts as {CHANGE_COSTS:g}; wait {wait_s:.1f} s",
                {"retry-after": str(int(wait_s) + 1)},
            )
        _check_host(headers)
        if self._access.digest is None:
            _check_local(headers, is_safe=is_safe)
        elif scope["path"] not in OPEN_PATHS:
            _check_token(headers, self._access.digest)
        if (length := headers.get("content-length", "0")) and not (length.isdecimal() and len(length) < 16):
            raise Refused(400, f"content-length is {length[:40]!r}; expected a number of bytes; correct it")
        if int(length or 0) > LARGEST_BYTES:
            raise _too_large()


def _check_token(headers: Headers, digest: bytes) -> None:
    """Refuse a call without the one token; the time that the check takes tells nothing of the token."""
    given = headers.getlist("authorization")
    kind, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    is_right = hmac.compare_digest(digest_of(token.strip().encode("latin-1")), digest)
    if kind.lower() != "bearer" or not is_right:
        what = "the token is another" if token else "there is no token"
        raise Refused(
            401,
            f"{what}; expected the header 'Authorization: Bearer TOKEN' with the token that the service was started "
            "with; ask its operator",
            {"www-authenticate": "Bearer"},
        )


def _check_host(headers: Headers) -> None:
    """Refuse a call that does not say in one plain name or address whom it is for."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
        raise Refused(
            400,
            f"the header Host is {', '.join(hosts)[:100]!r}; expected one name or address of this service, perhaps "
            "with its port; correct it",
        )


def _check_local(headers: Headers, *, is_safe: bool) -> None:
    """Refuse calls of another site's page in a browser on this machine: such a page knows no token, but needs none.

    A name that its owner lets point to this machine is still in `Host`; a page's own address is in `Origin`.
    """
    host = headers["host"]
    name = HOST.fullmatch(host)
    if name is None or name[1].strip("[]").lower() not in LOOPBACK:
        raise Refused(
            421,
            f"the request is for the host {host[:100]!r}; expected {', '.join(LOOPBACK)}; call it by one of them, or "
            "start the service with a token",
        )
    origin = headers.get("origin")
    if not is_safe and origin is not None and origin.partition("://")[2] != host:
        raise Refused(
            403,
            f"the request was made by a page of {origin[:100]!r}; expected one of this service; "
            "use its own page, or call it from outside a browser",
        )


class Buckets:
    """The remaining calls of each client, which may call `rate` times a second, and `burst` times at once.

    Only the `MOST_CLIENTS` that called last are remembered; `clock` gives seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """The number of remembered clients."""
        return len(self._levels)

    def take(self, client: str, cost: float) -> float:
        """Take `cost` calls from the client and return 0, or take none and return the seconds to wait."""
        now = self._clock()
        level, then = self._levels.pop(client, (self._burst, now))
        level = min(self._burst, level + (now - then) * self._rate)
        wait_s = max(0.0, (cost - level) / self._rate)
        self._levels[client] = (level if wait_s else level - cost, now)
        if len(self._levels) > MOST_CLIENTS:
            self._levels.popitem(last=False)
        return wait_s


def bounded(receive: Receive) -> Receive:
    """Make `receive` raise `Refused` once a body is too large, also against its header."""
    seen = 0

    async def receive_bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > LARGEST_BYTES:
            raise _too_large()
        return message

    return receive_bounded


def _too_large() -> Refused:
    return Refused(
        413,
        f"the request's body is larger than {LARGEST_BYTES:,} bytes; expected a spec, which takes a few thousand; "
        "name data and weights by their paths",
        {"connection": "close"},
    )


async def send_refusal(refused: Refused, send: Send) -> None:
    """Send the refusal as an answer."""
    body = json.dumps({"error": refused.reason}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    """Make `send` add the headers that keep a browser from doing more with an answer than to show it."""

    async def send_safely(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_safely
