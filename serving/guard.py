# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The door, before anything is parsed: who comes in, how many, with how much, how slowly; what is logged."""

import asyncio
import logging
import time
from collections.abc import Callable
from hashlib import sha256
from secrets import compare_digest
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .images import Limits
from .openai import APIError

OPEN = ("/", "/health", "/docs", "/openapi.json")  # tell nothing of anybody


class PatientProtocol(H11Protocol):
    """uvicorn's, but who takes more than `timeout_keep_alive` seconds to send a request's headers, or to read what it
    was sent, is cut off."""

    timer: asyncio.TimerHandle | None = None

    def _wait(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def _give_up(self) -> None:
        if self.flow.write_paused or self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait()


class Guard:
    """ASGI middleware around the whole application. A client that goes away cancels its request.

    Args:
        app: what it guards. key: of `Authorization: Bearer …`, None for no key. limits: of a request. requests: that
            may be under way, those that are still being read included. observe: told (route, status, seconds) of each.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        limits: Limits,
        requests: int,
        observe: Callable[[Any, int, float], None],
    ):
        self.app, self.limits, self.requests, self.observe = app, limits, requests, observe
        self.digest = None if key is None else sha256(key.encode()).digest()
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # nginx's, for a client that has gone

        async def send_on(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        counted = scope["method"] not in ("GET", "HEAD")
        try:
            self._check_key(scope)
            if counted and self.under_way >= self.requests:
                raise APIError(429, f"busy: {self.under_way} requests are under way", code="rate_limit_exceeded")
            self.under_way += counted
            try:
                await self._answer(scope, await self._read(scope, receive), receive, send_on)
            finally:
                self.under_way -= counted
        except APIError as error:  # the rest of its body is not wanted
            headers = {**error.headers, "Connection": "close"}
            await JSONResponse(error.body(), error.status, headers)(scope, receive, send_on)
        except ConnectionError:  # gone while it sent
            pass
        finally:
            seconds = time.perf_counter() - start
            self.observe(scope.get("route"), status, seconds)
            client, path = (scope.get("client") or "-")[0], scope["raw_path"][:100].decode("latin-1")
            logging.getLogger("serving").info("%s %s %s %d %.3f s", client, scope["method"], path, status, seconds)

    def _check_key(self, scope: Scope) -> None:
        if self.digest is None or scope["path"] in OPEN:
            return
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not compare_digest(sha256(key.strip()).digest(), self.digest):
            raise APIError(401, "no or another API key; expected Authorization: Bearer …", code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        told, seconds = dict(scope["headers"]).get(b"content-length", b"0"), self.limits.seconds
        body, more, deadline = bytearray(), int(told[:20]) <= self.limits.body, time.monotonic() + seconds
        while more and len(body) <= self.limits.body:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise APIError(408, f"the request took more than {seconds:g} s to arrive") from None
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if not more:
                return bytes(body)
        raise APIError(413, f"the request is larger than {self.limits.body} bytes", code="request_too_large")

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Runs the application until it is done or the client is gone."""
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def replay() -> Message:
            return unread.pop() if unread else await asyncio.shield(gone)

        async def watch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                pass
            gone.set_result(message)

        answering, watching = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(watch())
        try:
            await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not answering.done():
                answering.cancel()
                await asyncio.wait((answering,))
        if not answering.cancelled():
            answering.result()
