"""What h11 alone makes of a response, to compare the recognizers of HTTP/1.1 with it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import h11

from trio_exchange import RemoteProtocolError
from trio_exchange._fields import Headers
from trio_exchange._http import http11, http11_bodies
from trio_exchange._http.http11_bodies import ChunkedBody
from trio_exchange._http.http11_explanations import explain_received
from trio_exchange._http.http11_heads import Framing, ReceivedHead, recognize
from trio_exchange._http.message_stream import Head

LIMIT = 4096
_NEVER = re.compile(rb"(?!)")
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

#: What a body yields after each piece that arrives; then its trailers, the bytes after it and whether there
#: are none, or its error.
Yielded = list[Any]


@contextlib.contextmanager
def h11_alone() -> Iterator[None]:
    """Let the client recognize nothing, so that h11 judges all."""
    with (
        mock.patch.object(http11, "recognize", return_value=None),
        mock.patch.multiple(http11_bodies, _BOUNDARY=_NEVER, _END=_NEVER, _INCOMPLETE=_NEVER),
    ):
        yield


def _connection(method: str) -> h11.Connection:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=LIMIT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "")]))
    return connection


def head_by_h11(data: bytes) -> ReceivedHead | None:
    """What h11 makes of a head; None if it wants more, or refuses it."""
    connection = _connection("GET")
    connection.receive_data(data)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, (h11.Response, h11.InformationalResponse)):
        return None
    headers = Headers(event.headers.raw_items())
    head = Head(b"HTTP/" + event.http_version, event.status_code, event.reason, headers)
    rest = connection.trailing_data[0]
    framing = _framing_by_h11(data[: len(data) - len(rest)])
    return ReceivedHead(head, framing, rest)


def _framing_by_h11(head: bytes) -> Framing:
    connection = _connection("GET")
    connection.receive_data(head)
    event: Any = connection.next_event()
    # A response without content shows at once whether the connection may go on.
    without_content = _connection("HEAD")
    without_content.receive_data(head)
    without_content.next_event()
    without_content.next_event()
    closes = without_content.their_state is h11.MUST_CLOSE
    if isinstance(event, h11.InformationalResponse) or event.status_code in (204, 304):
        # h11 does not look at the framing.
        fields: dict[bytes, bytes] = dict(event.headers)
        length = fields.get(b"content-length")
        coded = b"transfer-encoding" in fields
        return Framing(None if length is None else int(length), coded, closes, coded and length is not None)
    reader: Any = connection._reader
    length = getattr(reader, "_length", None)
    return Framing(length, type(reader).__name__ == "ChunkedReader", closes, ambiguous=False)


def heads(data: bytes) -> tuple[ReceivedHead | None, ReceivedHead | None]:
    """What the recognizer makes of a head, and what h11 does; both None if it is left to h11.

    Also for less of the head, which must not be recognized, and for more of what follows it.
    """
    found = recognize(data, LIMIT)
    if found is None:
        return None, None
    size = len(data) - len(found.rest)
    early = [recognize(data[:length], LIMIT) for length in range(size)]
    late = [recognize(data[:length], LIMIT) for length in range(size, len(data) + 1, 7)]
    if any(early) or {(each and each[:2]) == found[:2] for each in late} - {True}:
        return found, None
    return found, head_by_h11(data)


def chunks(pieces: Iterable[bytes]) -> Yielded:
    """What the client makes of a chunked body that arrives in pieces, `b""` for the stream's end."""
    body = ChunkedBody(b"", LIMIT)
    seen: Yielded = []
    try:
        for piece in pieces:
            body.feed(piece)
            seen.append(b"")
            while data := body.take():
                seen[-1] += data
            if data is not None:
                after = body._arrived[body._at :]
                return [*seen, body.trailers, after, body.is_clean]
    except RemoteProtocolError as exc:
        seen.append(str(exc))
    return seen


def chunks_by_h11(pieces: Iterable[bytes]) -> Yielded:
    """What h11 makes of the same."""
    connection = _connection("GET")
    connection.receive_data(_CHUNKED)
    connection.next_event()
    seen: Yielded = []
    try:
        for piece in pieces:
            connection.receive_data(piece)
            seen.append(b"")
            while isinstance(event := connection.next_event(), h11.Data):
                seen[-1] += event.data
            if isinstance(event, h11.EndOfMessage):
                after = connection.trailing_data[0]
                return [*seen, event.headers.raw_items(), after, not after]
    except h11.RemoteProtocolError as exc:
        seen.append(explain_received(str(exc), b"", LIMIT))
    return seen
