"""What an input means: taken apart the same way by the fuzzer and by the replay of its corpus."""

from __future__ import annotations

from dataclasses import dataclass

import hpack

from trio_exchange._http.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
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
        variant: Of the requests.
    """

    options: int
    phases: tuple[tuple[bytes, ...], ...]
    ends: bool
    variant: int = 0


def http11_script(data: bytes) -> Script:
    """Answers over HTTP/1.1: two bytes of options, and then the bytes as they are."""
    source = Bytes(data)
    options, more = source.number(), source.number()
    phases = tuple(
        tuple(piece for piece in phase.split(PIECE) if piece) for phase in source.rest().split(NEXT_REQUEST)
    )
    return Script(options, phases, bool(more & 1), more >> 1)


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
                return frame(SETTINGS, 0, stream, self._settings())
            case 3:
                return frame(RST_STREAM, 0, stream, source.number().to_bytes(4, "big"))
            case 4:
                return frame(WINDOW_UPDATE, 0, stream, source.take(4))
            case 5:
                last, code = source.number(), source.number()
                debug = source.take(source.number() % 64)
                return frame(GOAWAY, 0, stream, last.to_bytes(4, "big") + code.to_bytes(4, "big") + debug)
            case 6:
                return frame(PING, stream & ACK, 0, source.take(8).ljust(8, b"."))
            case 7:
                return frame(PUSH_PROMISE, END_HEADERS, stream, (2).to_bytes(4, "big") + self._block())
            case 8:
                return self._split_headers(stream)
            case 9:
                return frame(SETTINGS, ACK, 0, b"")
            case 10:
                return self._anything(stream)
        return source.take(source.number())

    def _block(self) -> bytes:
        fields = [FIELDS[self._source.number() % len(FIELDS)] for _ in range(self._source.number() % 8)]
        return self._encoder.encode(fields)

    def _headers(self, stream: int) -> bytes:
        flags = self._source.number()
        ends = END_STREAM if flags & 1 else 0
        whole = 0 if flags & 2 else END_HEADERS
        return frame(HEADERS, ends | whole, stream, self._block())

    def _split_headers(self, stream: int) -> bytes:
        block = self._block()
        cut = self._source.number() % (len(block) + 1)
        return frame(HEADERS, 0, stream, block[:cut]) + frame(CONTINUATION, END_HEADERS, stream, block[cut:])

    def _data(self, stream: int) -> bytes:
        flags, size = self._source.number(), self._source.number(2) % 20_000
        ends = END_STREAM if flags & 1 else 0
        payload = bytes((stream,)) * size
        if not flags & 2:
            return frame(DATA, ends, stream, payload)
        padding = self._source.number()
        return frame(DATA, ends | PADDED, stream, bytes((padding,)) + payload + bytes(padding))

    def _settings(self) -> bytes:
        count = self._source.number() % 6
        return b"".join(
            (self._source.number() % 10).to_bytes(2, "big") + self._source.take(4).ljust(4, b"\0")
            for _ in range(count)
        )

    def _anything(self, stream: int) -> bytes:
        kind, flags, size = self._source.number(), self._source.number(), self._source.number()
        return frame(kind, flags, stream, self._source.take(size))


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame (RFC 9113, 4.1), of sense or nonsense."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def http2_script(data: bytes) -> Script:
    """Frames: two bytes of options, and then each frame with a byte that says what follows it."""
    source = Bytes(data)
    options, ends = source.number(), bool(source.number() & 1)
    frames = _Frames(source)
    pieces = [b"" if options & 0x80 else frame(SETTINGS, 0, 0, b"")]
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
