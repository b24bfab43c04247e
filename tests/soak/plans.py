"""What a request of the soak does, and what its server does to it: made from a seed and a number."""

from __future__ import annotations

import enum
import functools
import random
from dataclasses import dataclass

#: How much of a large upload no socket buffer holds.
LARGE_UPLOAD = 1024 * 1024


class Fault(enum.Enum):
    """What the server does wrong."""

    NONE = "none"
    #: The answer ends early: the stream is reset over HTTP/2, the connection closed over HTTP/1.1.
    CUT = "cut"
    #: There is no answer.
    SILENCE = "silence"
    #: The upload is not read.
    DEAF = "deaf"
    #: The stream is refused once (RFC 9113, 8.7). HTTP/1.1 has no such thing.
    REFUSE = "refuse"
    # The others end the whole connection, so that they are for the rough origins alone.
    #: It is reset.
    RESET = "reset"
    #: GOAWAY, and the answers to what was received; over HTTP/1.1 `Connection: close`.
    GOAWAY = "goaway"
    #: GOAWAY for streams up to one before this, and the end of the connection.
    GOAWAY_NOW = "goaway-now"
    #: The answer, and then the end of the connection without notice.
    HANG_UP = "hang-up"
    #: The answer, and the end of the server's side alone.
    HALF_CLOSE = "half-close"
    #: The answer, and bytes that mean nothing.
    GARBAGE = "garbage"


_CALM = (Fault.NONE,) * 16 + (Fault.CUT, Fault.SILENCE, Fault.REFUSE, Fault.DEAF)
_ROUGH = (Fault.NONE,) * 6 + tuple(fault for fault in Fault if fault is not Fault.NONE)


@dataclass(frozen=True)
class Kind:
    """A pool of the soak.

    Attributes:
        name: Of the pool.
        weight: How often it is chosen.
        http2: Whether it speaks HTTP/2 with origins that have TLS.
        http2_plain: The same for origins without TLS, by prior knowledge.
        shaky: Whether the proxy fails, so that every request may.
        forwards: Whether a proxy forwards requests to origins without TLS. The example's proxy forwards
            neither informational responses nor trailers.
        tls_only: Whether only origins with TLS are asked.
    """

    name: str
    weight: int
    http2: bool = False
    http2_plain: bool = False
    shaky: bool = False
    forwards: bool = False
    tls_only: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("http1", 8),
        Kind("narrow", 2),
        Kind("http2", 8, http2=True, http2_plain=True),
        Kind("alpn", 6, http2=True, tls_only=True),
        Kind("connect", 3, http2=True, forwards=True),
        Kind("socks", 2, http2=True),
        Kind("http2 proxy", 4, forwards=True),
        Kind("http2 in http2", 4, http2=True, tls_only=True),
        Kind("chain", 2, http2=True, forwards=True),
        Kind("shaky proxy", 3, http2=True, shaky=True, tls_only=True),
        Kind("own proxy", 3, http2=True, forwards=True),
        Kind("short-lived", 2),
    )
}


@dataclass(frozen=True)
class Upload:
    """The body of a request.

    Attributes:
        kind: `bytes`, `list` of bytes, `iterator` (asynchronous), or `failing` (an iterator that raises).
        size: In bytes.
        pause: Seconds between the pieces of an iterator.
        expects_continue: Whether it waits for `100 (Continue)`.
    """

    kind: str
    size: int
    pause: float
    expects_continue: bool


@dataclass(frozen=True)
class Plan:
    """A request, and its answer.

    Attributes:
        index: Its number.
        pool: The name of a `Kind`.
        rough: Whether it is sent to an origin that ends connections.
        tls: Whether to an origin with TLS.
        method: Such as `GET`.
        upload: Its body.
        traced: Whether it has a trace handler.
        consume: What is done with the response: `read`, `iterate`, `part` (closed after a piece),
            `unread`.
        cancel_after: Seconds until it is cancelled.
        timeout: Which timeout is short, and how short in seconds.
        close_after: Seconds until its pool is closed, if that is its own.
        fault: What the server does wrong.
        cut_at: At which part of the answer's body; less than 0 is before the head.
        status: Of the answer, as are the following.
        size: Of its body, in bytes.
        framing: `length`, `chunked` or `close`; HTTP/2 has one of its own.
        trailers: Whether there are some.
        informational: Statuses that come first.
        delay: Seconds before it.
        pause: Seconds between its pieces.
        early: Whether it is sent before the upload is read.
    """

    index: int
    pool: str
    rough: bool
    tls: bool
    method: str
    upload: Upload | None
    traced: bool
    consume: str
    cancel_after: float | None
    timeout: tuple[str, float] | None
    close_after: float | None
    fault: Fault
    cut_at: float
    status: int
    size: int
    framing: str
    trailers: bool
    informational: tuple[int, ...]
    delay: float
    pause: float
    early: bool

    @property
    def http2(self) -> bool:
        """Whether the origin is spoken to in HTTP/2."""
        kind = KINDS[self.pool]
        return kind.http2 if self.tls else kind.http2_plain

    @property
    def has_body(self) -> bool:
        """Whether the answer has a body."""
        return self.method != "HEAD" and self.status == 200

    @property
    def must_succeed(self) -> bool:
        """Whether no error is an excuse: nothing is done to this request, and others are no concern of it."""
        resent = self.upload is None or self.upload.kind in ("bytes", "list")
        return (
            not (self.rough or KINDS[self.pool].shaky)
            and (self.fault is Fault.NONE or (self.fault is Fault.REFUSE and resent))
            and self.cancel_after is None
            and self.timeout is None
            and self.close_after is None
            and not (self.upload is not None and self.upload.kind == "failing")
        )


@functools.lru_cache(maxsize=256)
def make_plan(seed: int, index: int) -> Plan:
    """The plan of a request, the same for its client and its server."""
    chosen = random.Random(f"{seed}/{index}")
    (kind,) = chosen.choices(list(KINDS.values()), [kind.weight for kind in KINDS.values()])
    rough = chosen.random() < 0.25
    tls = kind.tls_only or chosen.random() < 0.5
    forwarded = kind.forwards and not tls
    http2 = kind.http2 if tls else kind.http2_plain
    fault = chosen.choice(_ROUGH if rough else _CALM)
    if forwarded and fault is Fault.DEAF:
        fault = Fault.NONE
    method = chosen.choice(("GET", "GET", "GET", "HEAD", "POST", "POST", "PUT"))
    upload = None
    if fault is Fault.DEAF:
        method, upload = "PUT", Upload("iterator", LARGE_UPLOAD, 0.0, False)
    elif method in ("POST", "PUT"):
        upload = Upload(
            chosen.choice(("bytes", "bytes", "list", "iterator", "iterator", "failing")),
            _size(chosen),
            chosen.choice((0.0, 0.0, 0.001, 0.01)),
            chosen.random() < 0.1,
        )
    timeout = None
    if fault is Fault.DEAF:
        timeout = ("write", chosen.uniform(0.02, 0.1))
    elif fault is Fault.SILENCE:
        timeout = ("read", chosen.uniform(0.02, 0.1))
    elif chosen.random() < 0.1:
        timeout = (chosen.choice(("connect", "read", "pool", "write")), chosen.choice((0.001, 0.01, 0.05)))
    cancel_after = None
    if chosen.random() < 0.2:
        cancel_after = chosen.choice((0.0, 0.0002, 0.001, 0.003, 0.01, 0.03, 0.1)) * chosen.random()
    early = fault is not Fault.DEAF and not forwarded and upload is not None and chosen.random() < 0.2
    framing = chosen.choice(("length", "length", "chunked", "close"))
    if framing == "close" and (early or fault is not Fault.NONE):
        # A body that the connection's end delimits can't be told from a part of it, and what was not
        # read of the upload makes that end a reset.
        framing = "length"
    plain = framing == "close" and not http2
    status = chosen.choice((200,) * 10 + (204, 304))
    informational: tuple[int, ...] = ()
    if not forwarded and not plain and chosen.random() < 0.2:
        informational = tuple(chosen.choice((100, 102, 103)) for _ in range(chosen.randint(1, 3)))
    chunked = http2 or framing == "chunked"
    return Plan(
        index=index,
        pool=kind.name,
        rough=rough,
        tls=tls,
        method=method,
        upload=upload,
        traced=chosen.random() < 0.2,
        consume=chosen.choice(("read", "read", "iterate", "iterate", "part", "unread")),
        cancel_after=cancel_after,
        timeout=timeout,
        close_after=chosen.uniform(0, 0.03) if kind.name == "short-lived" and chosen.random() < 0.5 else None,
        fault=fault,
        cut_at=chosen.choice((-1.0, 0.0, 0.5, 0.9)),
        status=status,
        size=_size(chosen),
        framing=framing,
        trailers=chunked and status == 200 and method != "HEAD" and not forwarded and chosen.random() < 0.3,
        informational=informational,
        delay=chosen.choice((0.0, 0.0, 0.0, 0.001, 0.02)) * chosen.random(),
        pause=chosen.choice((0.0, 0.0, 0.0, 0.001, 0.005)),
        early=early,
    )


def _size(chosen: random.Random) -> int:
    limit = chosen.choice((10, 1000, 1000, 20_000, 20_000, 300_000))
    return chosen.randint(1, limit)


def content(nonce: str, size: int) -> bytes:
    """A body that no other request has."""
    line = f"{nonce}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def pieces(body: bytes) -> list[bytes]:
    """A body in some pieces."""
    step = max(1, len(body) // 4)
    return [body[start : start + step] for start in range(0, len(body), step)]
