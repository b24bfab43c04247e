"""Frames of HTTP/2 as they arrive, before h2 sees them.

Theory of operation. h2 keeps the protocol's state and does most of the checking. This stands before it
where h2 would do something else than a client must:

- The first frame has to be SETTINGS, and a server that answers in text is told apart at once.
- A frame that is too large is refused by its header, before the rest of it is kept.
- Frames on streams that were never opened are a connection error, whatever their type; h2 ignores some.
- Nothing comes between the frames of a header block, of which there are not too many.
- GOAWAY goes past h2, for which it is the end of the connection, though streams may go on.
- DATA goes past h2 as well, which would cost several times what all the rest does. Of it, h2 is only told
  the end of a stream.
- So do header blocks, since a malformed response concerns its stream alone (RFC 9113, 8.1.1), while h2 gives
  up the connection for some.
- Frames that serve no request are limited (`FloodGuard`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from h2.errors import ErrorCodes

from ..._connect.transport import TLS_ALERT

# RFC 9113, 6.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20

MAX_FRAME_SIZE = 16384
# h2 has this limit too, but calls it a protocol error.
MOST_FRAMES_IN_BLOCK = 64
_HEADER_SIZE = 9
_PRIORITY_SIZE = 5
_GOAWAY = struct.Struct(">LL")
_WINDOW_UPDATE = struct.Struct(">HBBBLL")


class Violation(Exception):
    """The server broke HTTP/2 in a way that ends the connection.

    Args:
        code: Of the GOAWAY that says so.
        message: What it did.
    """

    def __init__(self, code: ErrorCodes, message: str) -> None:
        super().__init__(message)
        self.code = code


class Frame(NamedTuple):
    """One frame.

    Attributes:
        kind: Its type.
        flags: Its flags.
        stream_id: Its stream, 0 for the connection.
        raw: The frame as it was received.
    """

    kind: int
    flags: int
    stream_id: int
    raw: bytes

    @property
    def length(self) -> int:
        """The length of what follows the frame's header."""
        return len(self.raw) - _HEADER_SIZE


class FrameSplitter:
    """Splits what arrives into frames.

    Args:
        secure_url: The URL of the same port with TLS, None if there is TLS; for an error's message.
    """

    def __init__(self, secure_url: str | None = None) -> None:
        self._secure_url = secure_url
        self._buffer = b""
        self._preface_seen = False
        # The stream of a header block whose end is to come, and how many frames of it there were.
        self._block_stream: int | None = None
        self._block_frames = 0

    def split(self, data: bytes, highest_stream_id: int) -> Iterator[Frame]:
        """The frames that are complete with `data`.

        Args:
            data: What was received.
            highest_stream_id: Of the streams that were opened.

        Raises:
            Violation: From the iterator.
        """
        buffer = self._buffer + data if self._buffer else data
        if not self._preface_seen and self._secure_url is not None and buffer.startswith(TLS_ALERT):
            # It is shorter than the header of a frame.
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR,
                f"the server does not speak HTTP/2 on this port, but TLS (use {self._secure_url})",
            )
        start, size = 0, len(buffer)
        try:
            while size - start >= _HEADER_SIZE:
                end = start + _HEADER_SIZE + int.from_bytes(buffer[start : start + 3], "big")
                kind, flags = buffer[start + 3], buffer[start + 4]
                stream_id = int.from_bytes(buffer[start + 5 : start + 9], "big") & 0x7FFFFFFF
                if not self._preface_seen:
                    self._check_preface(buffer, kind, flags)
                if end - start - _HEADER_SIZE > MAX_FRAME_SIZE:
                    raise Violation(
                        ErrorCodes.FRAME_SIZE_ERROR,
                        f"the server sent a frame of {end - start - _HEADER_SIZE} bytes",
                    )
                if end > size:
                    break
                frame = Frame(kind, flags, stream_id, buffer[start:end])
                start = end
                self._check_order(frame, highest_stream_id)
                yield frame
        finally:
            self._buffer = buffer[start:]

    def _check_preface(self, buffer: bytes, kind: int, flags: int) -> None:
        """RFC 9113, 3.4."""
        self._preface_seen = True
        if buffer.startswith(b"HTTP/"):
            line = buffer.partition(b"\r\n")[0]
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR, f"the server does not speak HTTP/2: it sent {line[:40]!r}"
            )
        if kind != SETTINGS or flags & ACK:
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR,
                f"the server does not speak HTTP/2: instead of SETTINGS it sent {buffer[:20]!r}",
            )

    def _check_order(self, frame: Frame, highest_stream_id: int) -> None:
        self._check_header_block(frame)
        if frame.kind > CONTINUATION or frame.kind == PRIORITY:
            return
        if frame.stream_id and (frame.stream_id > highest_stream_id or frame.stream_id % 2 == 0):
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR,
                f"the server sent a frame of type {frame.kind} on stream {frame.stream_id}, "
                "which was never opened",
            )
        if frame.kind == SETTINGS and frame.flags & ACK and frame.length:
            raise Violation(
                ErrorCodes.FRAME_SIZE_ERROR, f"the server sent a SETTINGS ACK of {frame.length} bytes"
            )

    def _check_header_block(self, frame: Frame) -> None:
        """RFC 9113, 4.3 and 6.10."""
        if self._block_stream is not None or frame.kind == CONTINUATION:
            if frame.kind != CONTINUATION or frame.stream_id != self._block_stream:
                where = "outside" if self._block_stream is None else "in the middle"
                raise Violation(
                    ErrorCodes.PROTOCOL_ERROR,
                    f"the server sent a frame of type {frame.kind} {where} of a header block",
                )
        elif frame.kind in (HEADERS, PUSH_PROMISE):
            self._block_stream = frame.stream_id
            self._block_frames = 0
        else:
            return
        self._block_frames += 1
        if self._block_frames > MOST_FRAMES_IN_BLOCK:
            raise Violation(
                ErrorCodes.ENHANCE_YOUR_CALM,
                f"the server sent a header block of more than {MOST_FRAMES_IN_BLOCK} frames",
            )
        if frame.flags & END_HEADERS:
            self._block_stream = None


class Goaway(NamedTuple):
    """What a GOAWAY frame says (RFC 9113, 6.8).

    Attributes:
        last_stream_id: The server has not acted on streams above this, and will not.
        code: Why.
        debug_data: Why, in words.
    """

    last_stream_id: int
    code: int
    debug_data: bytes


def parse_goaway(frame: Frame) -> Goaway:
    """Read a GOAWAY frame.

    Raises:
        Violation: It is malformed.
    """
    if frame.stream_id:
        raise Violation(ErrorCodes.PROTOCOL_ERROR, "the server sent GOAWAY on a stream")
    if frame.length < _GOAWAY.size:
        raise Violation(ErrorCodes.FRAME_SIZE_ERROR, f"the server sent a GOAWAY of {frame.length} bytes")
    last_stream_id, code = _GOAWAY.unpack_from(frame.raw, _HEADER_SIZE)
    return Goaway(last_stream_id & 0x7FFFFFFF, code, frame.raw[_HEADER_SIZE + _GOAWAY.size :])


def content_of(frame: Frame) -> bytes:
    """What a DATA or HEADERS frame carries, without its padding (RFC 9113, 6.1 and 6.2).

    Raises:
        Violation: The padding is as long as the frame, or longer, or its length is missing.
    """
    if not frame.flags & PADDED:
        return frame.raw[_HEADER_SIZE:]
    if not frame.length:
        raise Violation(
            ErrorCodes.FRAME_SIZE_ERROR,
            f"the server sent a padded frame of type {frame.kind} without its padding's length",
        )
    padding = frame.raw[_HEADER_SIZE]
    if padding >= frame.length:
        raise Violation(
            ErrorCodes.PROTOCOL_ERROR,
            f"the server sent a frame of {frame.length} bytes, {padding} of padding",
        )
    return frame.raw[_HEADER_SIZE + 1 : len(frame.raw) - padding]


def fragment_of(frame: Frame) -> bytes:
    """The piece of a header block that a HEADERS or CONTINUATION frame carries (RFC 9113, 6.2 and 6.10).

    Raises:
        Violation: The padding or the priority does not fit into the frame.
    """
    if frame.kind == CONTINUATION:
        return frame.raw[_HEADER_SIZE:]
    content = content_of(frame)
    if not frame.flags & PRIORITIZED:
        return content
    if len(content) < _PRIORITY_SIZE:
        raise Violation(ErrorCodes.FRAME_SIZE_ERROR, "the server sent HEADERS without their priority")
    return content[_PRIORITY_SIZE:]


def window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame (RFC 9113, 6.9), for the connection if the stream is 0."""
    return _WINDOW_UPDATE.pack(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


def name_of(code: int) -> str:
    """The name of an error code (RFC 9113, 7)."""
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"error {code:#x}"


class FloodGuard:
    """Limits how many frames a server may send that serve no request (RFC 9113, 10.5).

    Frames that serve a request raise the limit again, so that many small ones on a busy connection are no
    offence. After a while the count starts anew.
    """

    LIMIT = 10_000
    EARNED = 10
    SECONDS = 10.0

    def __init__(self, now: float) -> None:
        self._left = self.LIMIT
        self._forgiven_at = now

    def earn(self) -> None:
        """Count a frame that served a request."""
        self._left = min(self.LIMIT, self._left + self.EARNED)

    def spend(self, now: float, cost: int = 1) -> None:
        """Count a frame that served no request, by the work that it made.

        Raises:
            Violation: The limit was reached.
        """
        self._left -= cost
        if self._left < 0:
            if now - self._forgiven_at < self.SECONDS:
                raise Violation(
                    ErrorCodes.ENHANCE_YOUR_CALM,
                    f"the server sent more than {self.LIMIT} frames that served no request",
                )
            self._left = self.LIMIT
            self._forgiven_at = now
