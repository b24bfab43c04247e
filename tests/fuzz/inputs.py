"""What an input means: taken apart the same way by the fuzzer and by the replay of its corpus."""

from __future__ import annotations

from dataclasses import dataclass

import hpack
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

#: In an answer over HTTP/1.1: what follows arrives on its own.
PIECE = b"\xff\xfd"
#: What follows is sent when the next request has come.
NEXT_REQUEST = b"\xff\xfe"


class Bytes:
    """An input, taken piece by piece; what is missing at its end is zero, or empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Some bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def number(self, size: int = 1) -> int:
        """A number of some bytes."""
        return int.from_bytes(self.take(size), "big")

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))


@dataclass(frozen=True)
class Script:
    """What a server sends.

    Attributes:
        options: Of the run, bit by bit.
        phases: What is sent after each request, in the pieces in which it arrives.
        ends: Whether the connection ends after the last, or is silent.
    """

    options: int
    phases: tuple[tuple[bytes, ...], ...]
    ends: bool


def http11_script(data: bytes) -> Script:
    """Answers over HTTP/1.1: two bytes of options, and then the bytes as they are."""
    source = Bytes(data)
    options, ends = source.number(), bool(source.number() & 1)
    phases = tuple(
        tuple(piece for piece in phase.split(PIECE) if piece) for phase in source.rest().split(NEXT_REQUEST)
    )
    return Script(options, phases, ends)


#: Fields to make header blocks of, by their number.
FIELDS: tuple[tuple[bytes, bytes], ...] = (
    (b":status", b"200"),
    (b":status", b"100"),
    (b":status", b"103"),
    (b":status", b"204"),
    (b":status", b"304"),
    (b":status", b"404"),
    (b":status", b"101"),
    (b":status", b"20"),
    (b":status", b"999"),
    (b":path", b"/"),
    (b"content-length", b"0"),
    (b"content-length", b"5"),
    (b"content-length", b"16384"),
    (b"content-length", b"-1"),
    (b"content-length", b"99999999999999999999"),
    (b"content-type", b"text/plain"),
    (b"Upper", b"case"),
    (b"", b"no name"),
    (b"x-long", b"x" * 5000),
    (b"x-bad", b"a\r\nb"),
    (b"x-space", b" padded "),
    (b"connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"trailer", b"x-sum"),
    (b"x-sum", b"1"),
    (b"set-cookie", b"a=b"),
    (b"x-null", b"\x00"),
    (b"x-utf8", "é".encode()),
)
_MOST_FRAMES = 200


class _Frames:
    """Makes frames of an input."""

    def __init__(self, source: Bytes) -> None:
        self._source = source
        self._encoder = hpack.Encoder()

    def next(self) -> bytes:
        """The next frame, or whatever stands for one."""
        source = self._source
        kind, stream = source.number() % 12, source.number()
        match kind:
            case 0:
                return self._headers(stream)
            case 1:
                return self._data(stream)
            case 2:
                return SettingsFrame(settings=self._settings()).serialize()
            case 3:
                return RstStreamFrame(stream, error_code=source.number()).serialize()
            case 4:
                return _window_update(stream, source.number(4) & 0x7FFFFFFF)
            case 5:
                return _goaway(source.number(), source.number(), source.take(source.number() % 64))
            case 6:
                flags = ["ACK"] if stream & 1 else []
                return PingFrame(opaque_data=source.take(8).ljust(8, b"."), flags=flags).serialize()
            case 7:
                pushed = PushPromiseFrame(stream or 1, promised_stream_id=2, flags=["END_HEADERS"])
                pushed.data = self._block()
                return pushed.serialize()
            case 8:
                return self._split_headers(stream or 1)
            case 9:
                return SettingsFrame(flags=["ACK"]).serialize()
            case 10:
                return self._anything(stream)
        return source.take(source.number())

    def _block(self) -> bytes:
        fields = [FIELDS[self._source.number() % len(FIELDS)] for _ in range(self._source.number() % 8)]
        return self._encoder.encode(fields)

    def _headers(self, stream: int) -> bytes:
        flags = self._source.number()
        frame = HeadersFrame(stream or 1, self._block())
        if flags & 1:
            frame.flags.add("END_STREAM")
        if not flags & 2:
            frame.flags.add("END_HEADERS")
        return frame.serialize()

    def _split_headers(self, stream: int) -> bytes:
        block = self._block()
        cut = self._source.number() % (len(block) + 1)
        first = HeadersFrame(stream, block[:cut])
        last = ContinuationFrame(stream, block[cut:], flags=["END_HEADERS"])
        return first.serialize() + last.serialize()

    def _data(self, stream: int) -> bytes:
        flags, size = self._source.number(), self._source.number(2) % 20_000
        frame = DataFrame(stream or 1, bytes((stream,)) * size)
        if flags & 1:
            frame.flags.add("END_STREAM")
        if flags & 2:
            frame.flags.add("PADDED")
            frame.pad_length = self._source.number()
        return frame.serialize()

    def _settings(self) -> dict[int, int]:
        return {self._source.number() % 10: self._source.number(4) for _ in range(self._source.number() % 6)}

    def _anything(self, stream: int) -> bytes:
        kind, flags, size = self._source.number(), self._source.number(), self._source.number()
        payload = self._source.take(size)
        return frame_header(len(payload), kind, flags, stream) + payload


def frame_header(size: int, kind: int, flags: int, stream: int) -> bytes:
    """The nine bytes before a frame's payload (RFC 9113, 4.1)."""
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")


def _window_update(stream: int, increment: int) -> bytes:
    return frame_header(4, WindowUpdateFrame.type or 8, 0, stream) + increment.to_bytes(4, "big")


def _goaway(last: int, code: int, debug: bytes) -> bytes:
    frame: Frame = GoAwayFrame(last_stream_id=last, error_code=code, additional_data=debug)
    return frame.serialize()


def http2_script(data: bytes) -> Script:
    """Frames: two bytes of options, and then each frame with a byte that says what follows it."""
    source = Bytes(data)
    options, ends = source.number(), bool(source.number() & 1)
    frames = _Frames(source)
    pieces = [b"" if options & 0x80 else SettingsFrame().serialize()]
    phases: list[list[bytes]] = [pieces]
    for _ in range(_MOST_FRAMES):
        if not source:
            break
        after = source.number()
        pieces[-1] += frames.next()
        if after & 1:
            pieces.append(b"")
        elif after & 2:
            pieces = [b""]
            phases.append(pieces)
    return Script(options, tuple(tuple(piece for piece in phase if piece) for phase in phases), ends)
