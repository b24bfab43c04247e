"""The ASGI application that hypercorn runs for the interop tests. It needs nothing but Python."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    match scope["type"]:
        case "lifespan":
            for _ in range(2):
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
        case "websocket":
            await mirror(receive, send)
        case "http":
            await HANDLERS[scope["path"]](scope, receive, send)


async def mirror(receive: Receive, send: Send) -> None:
    """Send every message back, reversed."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        answer = {name: message[name][::-1] for name in ("text", "bytes") if message.get(name) is not None}
        await send({"type": "websocket.send", **answer})


async def echo(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Send back each piece of the body as soon as it is there, and then trailers."""
    headers = [(b"x-process", b"%d" % os.getpid())]
    await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": True})
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        more = message.get("more_body", False)
        size += len(message.get("body", b""))
        if message.get("body"):
            await send({"type": "http.response.body", "body": message["body"], "more_body": True})
    await send({"type": "http.response.body", "body": b""})
    trailers = [(b"x-size", b"%d" % size)]
    await send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})


async def hints(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answer with 103 (Early Hints), and then an ordinary response."""
    for link in (b"</one.css>; rel=preload", b"</two.js>; rel=preload"):
        await send({"type": "http.response.early_hint", "links": [link]})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def large(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Send 32 MiB that can be checked. Where the client has left, hypercorn takes and drops them."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(512):
        body = number.to_bytes(2, "big") * 32768
        await send({"type": "http.response.body", "body": body, "more_body": number < 511})


HANDLERS: dict[str, Callable[[dict[str, Any], Receive, Send], Awaitable[None]]] = {
    "/echo": echo,
    "/hints": hints,
    "/large": large,
}
