"""HTTP/1.1: the bodies of responses, by their framing (RFC 9112, section 6.3).

Theory of operation. A body takes bytes as they arrive, and yields data as soon as there is some. What has
arrived together comes in one piece, since the boundaries of chunks mean nothing. A body does no I/O.

*Chunks.* `ChunkedBody` recognizes chunks of the plain form: a short size, CRLF, data, CRLF, and at the end a
size of 0 and an empty line. Before each chunk it expects a *boundary*: CRLF, size, CRLF. The first size has
no CRLF before it, so one is added. A boundary may arrive in parts: bytes that may begin one are kept. At any
other boundary (an extension, trailers, a malformed line), and when the stream ends, a `ChunkJudge` takes over
for the rest of the body.
"""

from __future__ import annotations

import re
from typing import Protocol

from .._exceptions import RemoteProtocolError
from .._fields import HeaderList
from .http11_fallback import ChunkJudge
from .http11_heads import ReceivedHead

_NO_TRAILERS: HeaderList = []

# Between two chunks, with the size of the next; and after the last. 15 digits are less than h11 accepts, and
# more than any server needs.
_BOUNDARY = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})\r\n")
_END = re.compile(rb"\r\n0{1,15}\r\n\r\n")
# The beginnings of both.
_INCOMPLETE = re.compile(rb"(?:\r(?:\n(?:[0-9A-Fa-f]{1,15}\r?|0{1,15}\r\n\r?)?)?)?")


class Body(Protocol):
    """The body of a response.

    Attributes:
        trailers: The trailer fields, once the body has ended.
    """

    trailers: HeaderList

    @property
    def is_clean(self) -> bool:
        """Whether the body has ended, nothing came after it, and more may follow on the connection."""
        ...

    def has_arrived(self) -> bool:
        """Return whether `take` would return data or the end."""
        ...

    def take(self) -> bytes | None:
        """Return the next data, `b""` at the body's end, or None if more has to arrive first.

        Raises:
            RemoteProtocolError: The body is malformed, or the stream has ended too early.
        """
        ...

    def take_whole(self) -> bytes | None:
        """Return the rest of the body, b"" included, if all of it has arrived; else None, and take nothing.

        Raises:
            RemoteProtocolError: The body is malformed, or the stream has ended too early.
        """
        ...

    def feed(self, data: bytes) -> None:
        """Add what has arrived, after `take` has returned None; `b""` for the end of the stream.

        Raises:
            RemoteProtocolError: The stream has ended too early.
        """
        ...


def body_of(received: ReceivedHead, method: bytes, limit: int) -> Body:
    """Return the body that follows a final head (RFC 9112, 6.3).

    Args:
        received: The head, and the bytes that came after it.
        method: The request's method.
        limit: The most bytes of a chunk's size line and of the trailers.
    """
    head, framing, rest = received
    if method == b"HEAD" or head.status in (204, 304):
        return SizedBody(0, rest)
    if framing.coded:
        return ChunkedBody(rest, limit)
    if framing.length is not None:
        return SizedBody(framing.length, rest)
    return UnsizedBody(rest)


class SizedBody:
    """A body of known length.

    Args:
        left: The length.
        arrived: The bytes that have arrived.
    """

    __slots__ = ("_arrived", "_left", "trailers")

    def __init__(self, left: int, arrived: bytes) -> None:
        self.trailers: HeaderList = _NO_TRAILERS
        self._left = left
        self._arrived = arrived

    @property
    def is_clean(self) -> bool:
        """Whether the body has ended, and nothing came after it."""
        return not (self._left or self._arrived)

    def has_arrived(self) -> bool:
        """Return whether `take` would return data or the end."""
        return not self._left or bool(self._arrived)

    def take(self) -> bytes | None:
        """Return the next data, `b""` at the body's end, or None if more has to arrive first."""
        left, data = self._left, self._arrived
        if not left:
            return b""
        if not data:
            return None
        # Keep the bytes after the body.
        self._arrived = data[left:]
        data = data[:left]
        self._left = left - len(data)
        return data

    def take_whole(self) -> bytes | None:
        """Return the rest of the body if all of it has arrived; else None."""
        if len(self._arrived) < self._left:
            return None
        return self.take()

    def feed(self, data: bytes) -> None:
        """Add what has arrived.

        Raises:
            RemoteProtocolError: The stream has ended too early.
        """
        if not data:
            raise RemoteProtocolError(
                f"the server closed the connection {self._left} bytes before the end of the body"
            )
        self._arrived = data


class UnsizedBody:
    """A body that ends with the connection.

    Args:
        arrived: The bytes that have arrived.
    """

    __slots__ = ("_arrived", "_ended", "trailers")

    is_clean = False

    def __init__(self, arrived: bytes) -> None:
        self.trailers: HeaderList = _NO_TRAILERS
        self._arrived = arrived
        self._ended = False

    def has_arrived(self) -> bool:
        """Return whether `take` would return data or the end."""
        return self._ended or bool(self._arrived)

    def take(self) -> bytes | None:
        """Return the next data, `b""` at the body's end, or None if more has to arrive first."""
        data, self._arrived = self._arrived, b""
        return data if data or self._ended else None

    def take_whole(self) -> bytes | None:
        """Return None: the end comes later than the data."""
        return None

    def feed(self, data: bytes) -> None:
        """Add what has arrived; `b""` ends the body."""
        self._arrived = data
        self._ended = not data


class ChunkedBody:
    """A chunked body.

    Args:
        arrived: The bytes that have arrived.
        limit: The most bytes of a chunk's size line and of the trailers.
    """

    __slots__ = ("_arrived", "_at", "_before", "_judge", "_left", "_limit", "_next", "trailers")

    def __init__(self, arrived: bytes, limit: int) -> None:
        self.trailers: HeaderList = _NO_TRAILERS
        self._limit = limit
        self._judge: ChunkJudge | None = None
        # The first `_before` bytes arrived earlier than the others, and `_at` of them all were taken.
        self._arrived = b"\r\n" + arrived
        self._before = 2
        self._at = 0
        # The number of bytes that are left of the current chunk.
        self._left = 0
        # The next piece, once `has_arrived` has found it.
        self._next: bytes | None = None

    @property
    def is_clean(self) -> bool:
        """Whether nothing came after the body, which has ended."""
        return self._at == len(self._arrived)

    def has_arrived(self) -> bool:
        """Return whether `take` would return data or the end.

        Raises:
            RemoteProtocolError: The body is malformed, or the stream has ended too early.
        """
        if self._next is None:
            self._next = self._parse()
        return self._next is not None

    def take(self) -> bytes | None:
        """Return the next data, `b""` at the body's end, or None if more has to arrive first.

        Raises:
            RemoteProtocolError: The body is malformed, or the stream has ended too early.
        """
        piece = self._next
        if piece is None:
            return self._parse()
        self._next = None
        return piece

    def take_whole(self) -> bytes | None:
        """Return the rest of the body if all of it has arrived; else None, and keep the data.

        Raises:
            RemoteProtocolError: The body is malformed, or the stream has ended too early.
        """
        piece = self.take()
        if not piece:
            return piece
        following = self._parse()
        if following == b"":
            return piece
        self._next = piece if following is None else piece + following
        return None

    def feed(self, data: bytes) -> None:
        """Add what has arrived; `b""` for the end of the stream."""
        judge = self._judge
        if judge is None:
            kept = self._arrived[self._at :]
            self._arrived = kept + data if kept else data
            self._before = len(kept)
            self._at = 0
            if data:
                return
            judge = self._call_judge()
        judge.feed(data)

    def _parse(self) -> bytes | None:
        if self._judge is not None:
            return self._parse_judged(self._judge)
        data, at, left = self._arrived, self._at, self._left
        arrived = len(data)
        if at == arrived:
            return None
        pieces: list[slice] = []
        while True:
            if not left:
                boundary = _BOUNDARY.match(data, at)
                if boundary is None or not (left := int(boundary[1], 16)):
                    break
                at = boundary.end()
            if at == arrived:
                break
            end = min(at + left, arrived)
            pieces.append(slice(at, end))
            left -= end - at
            at = end
        self._at, self._left = at, left
        if not pieces:
            return None if left else self._parse_end()
        if len(pieces) == 1:
            return data[pieces[0]]
        # Slices of the view are no copies.
        view = memoryview(data)
        return b"".join([view[piece] for piece in pieces])

    def _parse_end(self) -> bytes | None:
        end = _END.match(self._arrived, self._at)
        if end is not None:
            self._at = end.end()
            return b""
        if _INCOMPLETE.fullmatch(self._arrived, self._at):
            return None
        return self._parse_judged(self._call_judge())

    def _call_judge(self) -> ChunkJudge:
        judge = self._judge = ChunkJudge(self._limit)
        # In the pieces in which they arrived, since h11's error shows only the last.
        before, after = self._arrived[self._at : self._before], self._arrived[max(self._at, self._before) :]
        if before:
            judge.feed(before)
            judge.take()
        if after:
            judge.feed(after)
        return judge

    def _parse_judged(self, judge: ChunkJudge) -> bytes | None:
        data = judge.take()
        if data == b"":
            self.trailers = judge.trailers
            self._arrived, self._at = judge.rest, 0
        return data
