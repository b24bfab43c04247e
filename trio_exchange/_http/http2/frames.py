"""HTTP/2 frames as they arrive, before h2 sees them.

Theory of operation. h2 keeps the protocol's state and does most of the checks. This module handles the cases
in which h2 differs from the rules for a client:

- The first frame must be SETTINGS. A server that answers in text is recognized at once.
- A frame that is too large is rejected by its header, before its payload is buffered.
- A frame on a stream that was never opened is a connection error, for every type that RFC 9113 defines
  except PRIORITY. h2 ignores some of them.
- No other frame may come between the frames of a header block, and their number is limited.
- GOAWAY bypasses h2, which would end the connection although some streams may continue.
- DATA bypasses h2, whose processing would cost several times as much as all the rest. h2 is only told about
  the end of the stream.
- Header blocks bypass h2: a malformed response affects only its stream (RFC 9113, 8.1.1), but h2 ends the
  connection for some of them.
- The number of frames that serve no request is limited (`FloodGuard`).
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
# h2 has the same limit, but reports it as PROTOCOL_ERROR.
MOST_FRAMES_IN_BLOCK = 64
_HEADER_SIZE = 9
_PRIORITY_SIZE = 5
_GOAWAY = struct.Struct(">LL")
_HEADER = struct.Struct(">HBBBL")
_WINDOW_UPDATE = struct.Struct(">HBBBLL")


class Violation(Exception):
    """The server broke HTTP/2 in a way that ends the connection.

    Args:
        code: The error code of the GOAWAY to send.
        message: A description of the violation.
    """

    def __init__(self, code: ErrorCodes, message: str) -> None:
        super().__init__(message)
        self.code = code


class Frame(NamedTuple):
    """An HTTP/2 frame.

    Attributes:
        kind: The frame's type.
        flags: The frame's flags.
        stream_id: The id of its stream, 0 for the connection.
        raw: The frame as it was received, header included.
    """

    kind: int
    flags: int
    stream_id: int
    raw: bytes

    @property
    def length(self) -> int:
        """The length of the frame's payload."""
        return len(self.raw) - _HEADER_SIZE


class FrameSplitter:
    """A parser that splits received bytes into frames.

    Args:
        secure_url: The URL of the same port with TLS, for an error message. None if TLS is in use.
    """

    def __init__(self, secure_url: str | None = None) -> None:
        self._secure_url = secure_url
        self._buffer = b""
        self._preface_seen = False
        # The stream of an incomplete header block, and the number of its frames so far.
        self._block_stream: int | None = None
        self._block_frames = 0

    def split(self, data: bytes, highest_stream_id: int) -> Iterator[Frame]:
        """Iterate over the frames that `data` completes.

        Args:
            data: The received bytes.
            highest_stream_id: The highest id of the opened streams.

        Raises:
            Violation: A frame breaks the rules. The iterator raises it.
        """
        buffer = self._buffer + data if self._buffer else data
        if not self._preface_seen and self._secure_url is not None and buffer.startswith(TLS_ALERT):
            # An alert is shorter than a frame header, so the loop below would not see it.
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR,
                f"the server does not speak HTTP/2 on this port, but TLS (use {self._secure_url})",
            )
        start, size = 0, len(buffer)
        try:
            while size - start >= _HEADER_SIZE:
                high, low, kind, flags, stream_id = _HEADER.unpack_from(buffer, start)
                length = high << 8 | low
                end = start + _HEADER_SIZE + length
                stream_id &= 0x7FFFFFFF
                if not self._preface_seen:
                    self._check_preface(buffer, kind, flags)
                if length > MAX_FRAME_SIZE:
                    raise Violation(ErrorCodes.FRAME_SIZE_ERROR, f"the server sent a frame of {length} bytes")
                if end > size:
                    break
                frame = Frame(kind, flags, stream_id, buffer[start:end])
                start = end
                if (
                    kind
                    or self._block_stream is not None
                    or stream_id > highest_stream_id
                    or not stream_id & 1
                ):
                    # A DATA frame on a client's stream is in order outside of a header block.
                    self._check_order(frame, highest_stream_id)
                yield frame
        finally:
            self._buffer = buffer[start:]

    def _check_preface(self, buffer: bytes, kind: int, flags: int) -> None:
        """Check that the first frame is SETTINGS (RFC 9113, 3.4)."""
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
        """Check that a header block is contiguous and not too long (RFC 9113, 4.3 and 6.10)."""
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
    """The content of a GOAWAY frame (RFC 9113, 6.8).

    Attributes:
        last_stream_id: The server has not acted on streams above this id, and will not.
        code: The error code.
        debug_data: The server's additional debug data, often text.
    """

    last_stream_id: int
    code: int
    debug_data: bytes


def parse_goaway(frame: Frame) -> Goaway:
    """Parse a GOAWAY frame.

    Raises:
        Violation: The frame is malformed.
    """
    if frame.stream_id:
        raise Violation(ErrorCodes.PROTOCOL_ERROR, "the server sent GOAWAY on a stream")
    if frame.length < _GOAWAY.size:
        raise Violation(ErrorCodes.FRAME_SIZE_ERROR, f"the server sent a GOAWAY of {frame.length} bytes")
    last_stream_id, code = _GOAWAY.unpack_from(frame.raw, _HEADER_SIZE)
    return Goaway(last_stream_id & 0x7FFFFFFF, code, frame.raw[_HEADER_SIZE + _GOAWAY.size :])


def content_of(frame: Frame) -> bytes:
    """Return the payload of a DATA or HEADERS frame without padding (RFC 9113, 6.1 and 6.2).

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
    """Return the field block fragment of a HEADERS or CONTINUATION frame (RFC 9113, 6.2 and 6.10).

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


def header_frames(stream_id: int, block: bytes, most: int, *, end_stream: bool) -> bytes:
    """Make the HEADERS frame of a header block, and CONTINUATION frames if it needs them (RFC 9113, 6.2).

    Args:
        stream_id: The id of the stream.
        block: The encoded header block.
        most: The most bytes in a frame.
        end_stream: Whether the block ends this side of the stream.
    """
    flags = END_STREAM if end_stream else 0
    if len(block) <= most:
        return frame_header(len(block), HEADERS, flags | END_HEADERS, stream_id) + block
    frames = [frame_header(most, HEADERS, flags, stream_id), block[:most]]
    for start in range(most, len(block), most):
        part = block[start : start + most]
        ends = END_HEADERS if start + most >= len(block) else 0
        frames += (frame_header(len(part), CONTINUATION, ends, stream_id), part)
    return b"".join(frames)


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """Make the header of a frame (RFC 9113, 4.1)."""
    return _HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream_id)


def window_update(stream_id: int, increment: int) -> bytes:
    """Make a WINDOW_UPDATE frame (RFC 9113, 6.9), for the connection if `stream_id` is 0."""
    return _WINDOW_UPDATE.pack(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


def name_of(code: int) -> str:
    """Return the name of an error code (RFC 9113, 7)."""
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"error {code:#x}"


class FloodGuard:
    """A limit on the frames that serve no request (RFC 9113, 10.5).

    Each frame that serves a request earns part of the allowance back, so that a busy connection may receive
    many small frames. The allowance is restored if it lasted for at least `SECONDS`.
    """

    LIMIT = 10_000
    EARNED = 10
    SECONDS = 10.0

    def __init__(self, now: float) -> None:
        self._left = self.LIMIT
        self._forgiven_at = now

    def earn(self) -> None:
        """Count a frame that served a request."""
        if self._left < self.LIMIT:
            self._left = min(self.LIMIT, self._left + self.EARNED)

    def spend(self, now: float, cost: int = 1) -> None:
        """Count a frame that served no request, at the cost of the work that it caused.

        Raises:
            Violation: The server has exceeded the limit.
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
