"""What stands before the app: equal questions share an answer, and headers that never end are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from cluster.front import LARGEST_HEADERS, MOST_SHARED, HastyProtocol, SharedAnswers

LIMIT_S = 60


class Counted:
    """An app that answers once it is let, with how often it was asked."""

    def __init__(self, status: int = 200, *, has_length: bool = True) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._start = {"type": "http.response.start", "status": status}
        self._has_length = has_length

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        body = str(self.asked).encode()
        await self.may_answer.wait()
        length = [(b"content-length", str(len(body)).encode())] if self._has_length else []
        await send({**self._start, "headers": length})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await send({"type": "http.response.body", "body": body[1:]})


async def asked(app: ASGIApp, path: str = "/searches", method: str = "GET", token: str = "mine") -> str:
    """The status and the body of an answer."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    headers = [(b"authorization", token.encode())]
    await app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
    return f"{sent[0]['status']} {b''.join(message['body'] for message in sent[1:]).decode()}"


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await story()

    asyncio.run(limited())


def test_all_who_ask_the_same_share_one_answer_for_a_while() -> None:
    async def story() -> None:
        now = 0.0
        app = Counted()
        shared = SharedAnswers(app, lambda: now)
        app.may_answer.clear()
        asking = [asyncio.create_task(asked(shared)) for _ in range(200)]
        asking += [asyncio.create_task(asked(shared, token="another")) for _ in range(2)]
        await asyncio.sleep(0)
        asking[1].cancel()  # who hangs up takes the answer from nobody
        app.may_answer.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [answers[0], *answers[2:]] == ["200 1"] * 199 + ["200 2"] * 2
        now = 0.9
        assert await asked(shared) == "200 1"
        now = 1.1
        assert await asked(shared) == "200 3"

    run(story)


def test_a_change_ends_what_was_kept_and_a_refused_one_does_not() -> None:
    async def story() -> None:
        app = Counted()
        shared = SharedAnswers(app)
        assert [await asked(shared), await asked(shared, method="DELETE"), await asked(shared)] == [
            "200 1", "200 2", "200 3",
        ]  # fmt: skip
        refusing = Counted(403)
        assert await asked(SharedAnswers(refusing), method="POST") == "403 1"
        shared = SharedAnswers(refusing)
        await asked(shared, path="/a")
        await asked(shared, path="/a", method="HEAD")
        assert refusing.asked == 3

    run(story)


def test_what_is_not_true_for_all_or_has_no_end_is_asked_for_by_each() -> None:
    async def story() -> None:
        for app in (Counted(429), Counted(401), Counted(has_length=False)):
            shared = SharedAnswers(app)
            app.may_answer.clear()
            asking = [asyncio.create_task(asked(shared)) for _ in range(5)]
            await asyncio.sleep(0)
            app.may_answer.set()
            assert len(set(await asyncio.gather(*asking))) == 5

    run(story)


def test_who_asked_first_and_hangs_up_leaves_the_others_to_ask() -> None:
    async def story() -> None:
        app = Counted()
        shared = SharedAnswers(app)
        app.may_answer.clear()
        first, second = (asyncio.create_task(asked(shared)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        app.may_answer.set()
        assert await second == "200 2"
        for number in range(2 * MOST_SHARED):
            await asked(shared, path=f"/{number}")
        assert len(shared._kept) == MOST_SHARED

    run(story)


class Brief(HastyProtocol):
    """The same, with less patience."""

    headers_s = 0.05


START = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


async def talk(port: int, *parts: bytes, after: int = 0) -> bytes:
    """All that comes back for these bytes, sent on a connection that had this many answers, to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(after):
        writer.write(START + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.readexactly(1)
    for part in parts:
        writer.write(part)
        await writer.drain()
    found = await reader.read()
    writer.close()
    await writer.wait_closed()
    return found


def test_headers_that_never_end_are_cut_and_others_answered() -> None:
    async def story() -> None:
        config = uvicorn.Config(Counted(), lifespan="off", log_config=None)
        config.load()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Brief(config, ServerState(), {}, loop), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        for slow in ((), (b"G",), (START,), (START, b"X-More: ")):
            assert (await talk(port, *slow)).startswith(b"HTTP/1.1 408 Request Timeout")
        for slow in ((START,), (b"\r\n",)):
            assert (await talk(port, *slow, after=2)).startswith(b"HTTP/1.1 408 Request Timeout")
        assert (await talk(port, START, b"X: " + b"x" * LARGEST_HEADERS)).startswith(b"HTTP/1.1 408")
        assert b"408" not in await talk(port, START + b"Connection: close\r\n\r\n")
        server.close()

    run(story)
