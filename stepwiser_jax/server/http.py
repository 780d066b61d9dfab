"""The server: requests into jobs, events of jobs into answers. Starlette and uvicorn do the HTTP.

    GET /, GET /health, GET /v1/models, POST /check, POST /v1/completions

Clients are not trusted: sizes and times are bounded, a page of another site may not ask, and what a
client sends is in no log.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepwiser_jax.runs.progress import say
from stepwiser_jax.server.asking import CheckBody, CompletionBody, Refused, SomeBody, read_body
from stepwiser_jax.server.page import POLICY, page_of
from stepwiser_jax.server.worker import Event, Job, Worker

MAX_BODY = 2**19
"""The most bytes of a request's body."""

CLIENT_SECONDS = 20.0
"""How long a client may take to send the header of a request, and again for its body; to make room
for more of an answer; and to read its end."""

MAX_CONNECTIONS = 512
"""With more, uvicorn answers 503."""

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

OPEN = ("/", "/health")
"""Paths that need no key: they say nothing about the judge but its name."""


@dataclass(frozen=True)
class Access:
    """Who may ask. With `hosts`, only requests to one of these names, so that no page of another
    site gets here by a name that it makes resolve to this machine. With a `key`, only requests that
    have it."""

    hosts: frozenset[str] | None
    key: str | None

    def check(self, request: Request) -> None:
        """Raises Refused if this request is none of those."""
        host = request.headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise Refused(403, "this name is not the server's: use localhost or 127.0.0.1")
        origin = request.headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            raise Refused(403, "pages of other sites may not ask this server")
        if self.key is None or request.scope["path"] in OPEN:
            return
        sent = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(sent, f"Bearer {self.key}".encode()):
            message = "expected the server's key: Authorization: Bearer KEY"
            raise Refused(401, message, {"WWW-Authenticate": "Bearer"})


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


# --- asking the worker ----------------------------------------------------------------------------


class Asking:
    """One request's job, and its events as they come. Use it as a context: after it the job is not
    judged, if it has not begun."""

    def __init__(self, request: Request, worker: Worker, timeout: float):
        self.request, self.worker, self.timeout = request, worker, timeout
        self._loop = asyncio.get_running_loop()
        self._ends = self._loop.time() + timeout
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._job: Job | None = None

    def submit(self, asked: Any, *, is_read_along: bool) -> None:
        """Raises Refused if there is no place."""
        self._job = Job(asked, self._tell, is_read_along)
        self.worker.submit(self._job)

    def _tell(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def withdraw(self) -> None:
        if self._job is not None:
            self.worker.withdraw(self._job)

    async def next(self) -> Event:
        """Returns the next event. Raises Refused if it is an error, or too late."""
        try:
            async with asyncio.timeout_at(self._ends):
                event = await self._events.get()
        except TimeoutError:
            raise Refused(504, f"no answer in {self.timeout:g} seconds") from None
        if event.name == "error":
            raise event.data
        return event

    async def next_while_connected(self) -> Event:
        """Returns the next event. Raises ClientDisconnect if the client goes away before."""
        coming = asyncio.ensure_future(self.next())
        gone = asyncio.ensure_future(_until_gone(self.request))
        try:
            await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ClientDisconnect
            return coming.result()
        finally:
            coming.cancel()
            gone.cancel()

    async def rest(self) -> AsyncIterator[Event]:
        """Yields the events up to the result; an error is one too."""
        event = Event("", None)
        while event.name not in ("result", "error"):
            try:
                event = await self.next()
            except Refused as error:
                event = Event("error", error)
            yield event


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. When the client is gone, or has all, the job is withdrawn."""

    media_type = "text/event-stream"

    def __init__(self, asking: Asking, lines: AsyncIterator[str]):
        super().__init__(lines)
        self.asking = asking

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.asking.withdraw()


def event_lines(data: Any, name: str | None = None) -> str:
    """Returns a server-sent event. JSON has no line breaks of its own."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, allow_nan=False)}\n\n"


# --- the application ------------------------------------------------------------------------------


def make_app(worker: Worker, access: Access, *, timeout: float, example: Any = None) -> ASGIApp:
    """Returns the application.

    Args:
        worker: The judge and its queue.
        access: Who may ask.
        timeout: The most seconds from a request to the end of its answer.
        example: A question and its solution, to fill the page with; or None.
    """
    page = page_of(worker.judge_id, needs_key=access.key is not None, example=example)
    endpoints = Endpoints(worker, timeout, page)
    app = Starlette(
        routes=[
            Route("/", endpoints.index),
            Route("/health", endpoints.health),
            Route("/v1/models", endpoints.models),
            Route("/check", endpoints.check, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
        ],
        exception_handlers={
            Refused: refused,
            HTTPException: unknown,
            ClientDisconnect: gone,
            Exception: failed,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, access)


Lines = Callable[[AsyncIterator[Event], Event], AsyncIterator[str]]
"""Makes the server-sent events of an answer, of its first event and those after it."""


class Endpoints:
    """What the server answers, by path."""

    def __init__(self, worker: Worker, timeout: float, page: str):
        self.worker, self.timeout, self.page = worker, timeout, page
        self.began = int(time.time())

    async def index(self, _: Request) -> Response:
        return HTMLResponse(self.page, headers={"Content-Security-Policy": POLICY})

    async def health(self, _: Request) -> Response:
        if self.worker.is_closed:
            raise Refused(503, "the server is stopping", {"Retry-After": "10"})
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        model = {"id": self.worker.judge_id, "object": "model", "created": self.began}
        model["owned_by"] = "stepwiser"
        return JSONResponse({"object": "list", "data": [model]})

    async def check(self, request: Request) -> Response:
        body = await read_request(request, CheckBody)
        return await self._answer(request, body.to_solution(), body.stream, {}, check_lines)

    async def completions(self, request: Request) -> Response:
        body = await read_request(request, CompletionBody)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.worker.judge_id,
        }
        lines = functools.partial(completion_lines, head)
        return await self._answer(request, body, body.stream, head, lines)

    async def _answer(
        self, request: Request, asked: Any, is_streamed: bool, head: dict[str, Any], lines: Lines
    ) -> Response:
        """Returns what becomes of a job: the `lines` of its events, or its result after `head`."""
        asking = Asking(request, self.worker, self.timeout)
        asking.submit(asked, is_read_along=is_streamed)
        try:
            # What goes wrong before the judge begins has a status of its own.
            event = await asking.next_while_connected()
        except BaseException:
            asking.withdraw()
            raise
        if is_streamed:
            return EventStream(asking, lines(asking.rest(), event))
        return JSONResponse(head | event.data)


async def read_request(request: Request, kind: type[SomeBody]) -> SomeBody:
    """Returns the body of a request. Raises Refused if it is too long, too slow, or none."""
    content = bytearray()
    try:
        async with asyncio.timeout(CLIENT_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > MAX_BODY:
                    raise Refused(413, f"expected a body of at most {MAX_BODY} bytes")
    except TimeoutError:
        raise Refused(408, f"no whole body in {CLIENT_SECONDS:g} seconds") from None
    return read_body(kind, bytes(content))


async def check_lines(rest: AsyncIterator[Event], begun: Event) -> AsyncIterator[str]:
    """Yields the server-sent events of a solution that is judged."""
    yield event_lines(begun.data, "begun")
    async for event in rest:
        is_error = event.name == "error"
        yield event_lines(event.data.to_fields() if is_error else event.data, event.name)


async def completion_lines(
    head: dict[str, Any], rest: AsyncIterator[Event], _: Event
) -> AsyncIterator[str]:
    """Yields the server-sent events of completions, in OpenAI's words. Each begins with `head`."""
    nothing = {"finish_reason": None, "stop_reason": None, "logprobs": None}
    async for event in rest:
        if event.name == "written":
            yield event_lines(head | {"choices": [nothing | event.data]})
        elif event.name == "completed":
            yield event_lines(head | {"choices": [event.data]})
        elif event.name == "error":
            yield event_lines(event.data.to_fields())
    yield "data: [DONE]\n\n"


# --- errors ---------------------------------------------------------------------------------------


async def refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.to_fields(), error.status, error.headers)


async def unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = Refused(error.status_code, error.detail, dict(error.headers or {}))
    return await refused(request, found)


async def gone(*_: Any) -> Response:
    return Response(status_code=499)  # nobody gets it


async def failed(request: Request, _: Exception) -> Response:
    return await refused(request, Refused(500, "the server failed: see its own messages"))


class Guard:
    """Stands before the application: who may ask, our headers on every answer, a line in the log
    without anything of the client's, and no error that prints what a client sent."""

    def __init__(self, app: ASGIApp, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        try:
            try:
                self.access.check(Request(scope))
                await self.app(scope, receive, send_with_headers)
            except Refused as error:
                response = JSONResponse(error.to_fields(), error.status, error.headers)
                await response(scope, receive, send_with_headers)
        except Exception as error:
            traceback.print_tb(error.__traceback__)
            print(f"serve: {type(error).__name__}", file=sys.stderr, flush=True)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "another path"
            say(f"{scope['method'][:8]} {path} {status} {time.monotonic() - began:.2f} s")


PATHS = ("/", "/health", "/check", "/v1/models", "/v1/completions")
"""The paths that are named in the log."""

# --- the server -----------------------------------------------------------------------------------


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, and time limits for the client: a connection ends if no request comes, if
    it is not read, and some time after an answer, unless the next request has come."""

    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request_after(self.cycle)

    def on_response_complete(self) -> None:
        answered = self.cycle  # it may begin the next one, which has been sent already
        super().on_response_complete()
        self._expect_request_after(answered)

    def _expect_request_after(self, cycle: Any) -> None:
        def end() -> None:
            if self.cycle is cycle:
                self.transport.abort()

        self.loop.call_later(CLIENT_SECONDS, end)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(CLIENT_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()


class Server(uvicorn.Server):
    """Serves until a signal comes; then it answers what it has accepted, refuses what is new, and
    returns. A second signal ends the process at once."""

    def __init__(self, app: ASGIApp, worker: Worker):
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
        )
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        signal.signal(sig, signal.SIG_DFL)
        # In a thread: the handler may have interrupted the code that it would call.
        threading.Thread(target=self.drain, daemon=True).start()

    def drain(self) -> None:
        """Takes no more requests, waits until the last is judged, and ends the server."""
        self.worker.close()
        self.worker.join()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens. Raises OSError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def is_loopback(listener: socket.socket) -> bool:
    """Returns whether only this machine reaches a socket."""
    address = listener.getsockname()[0]
    return address == "::1" or address.startswith("127.")
