"""What is measured, and what is to be reached."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

KIB = 1024
MIB = 1024 * KIB

SMALL_SIZE = KIB
DOWNLOAD_SIZE = 100 * MIB
UPLOAD_SIZE = 10 * MIB
UPLOAD_CHUNK = b"\0" * (64 * KIB)
TIMEOUT_SECONDS = 5.0

HEADERS = [
    (b"User-Agent", b"benchmark"),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"identity"),
]
UPLOAD_HEADERS = [*HEADERS, (b"Content-Length", str(UPLOAD_SIZE).encode())]

OURS = "trio_exchange"
BARE = "bare"
CLIENTS = (OURS, BARE, "httpcore2", "aiohttp")

Operation = Literal["get", "download", "upload"]


@dataclass(frozen=True)
class Case:
    name: str
    operation: Operation = "get"
    tasks: int = 1
    connections: int = 1
    tls: bool = False
    timeouts: bool = False
    http2: bool = False
    proxy: bool = False
    clients: tuple[str, ...] = CLIENTS

    @property
    def unit(self) -> str:
        """What is counted for a rate."""
        return "requests" if self.operation == "get" else "MiB"

    @property
    def amount(self) -> float:
        """How much of that a request is."""
        return {"get": 1, "download": DOWNLOAD_SIZE / MIB, "upload": UPLOAD_SIZE / MIB}[self.operation]

    @property
    def group(self) -> tuple[Any, ...]:
        """Cases of one group are measured in the same rounds, so that they compare well."""
        return (self.operation, self.tasks, self.connections, self.tls, self.http2)


@dataclass(frozen=True)
class Work:
    """What one worker process does."""

    client: str
    case: Case
    url: str
    ca_file: str
    proxy_url: str | None = None

    @property
    def module(self) -> str:
        """The name of the client's module."""
        if self.client != BARE:
            return self.client
        return "bare_h2" if self.case.http2 else "bare_h11"

    @property
    def lanes(self) -> int:
        """How many tasks send requests: the bare h11 loop has no pool, hence no more than connections."""
        return self.case.connections if self.module == "bare_h11" else self.case.tasks

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        fields = json.loads(text)
        return cls(**{**fields, "case": Case(**fields["case"])})


HTTP2_CLIENTS = (OURS, BARE, "httpcore2")
PROXY_CLIENTS = (OURS, "httpcore2")

CASES = (
    Case("get-1"),
    Case("get-20", tasks=20, connections=20),
    Case(
        "get-20-timeouts",
        tasks=20,
        connections=20,
        timeouts=True,
        clients=(OURS, "httpcore2", "aiohttp"),
    ),
    Case("get-100", tasks=100, connections=100),
    Case("get-1000", tasks=1000, connections=1000),
    Case("get-1000-over-50", tasks=1000, connections=50),
    Case("get-20-tls", tasks=20, connections=20, tls=True),
    Case("tunnel-get-20-tls", tasks=20, connections=20, tls=True, proxy=True, clients=PROXY_CLIENTS),
    Case("download-100MiB", "download"),
    Case("download-100MiB-tls", "download", tls=True),
    Case("tunnel-download-100MiB-tls", "download", tls=True, proxy=True, clients=PROXY_CLIENTS),
    Case("upload-10MiB", "upload"),
    Case("h2-get-1", http2=True, clients=HTTP2_CLIENTS),
    Case("h2-get-20", tasks=20, http2=True, clients=HTTP2_CLIENTS),
    Case("h2-get-100", tasks=100, http2=True, clients=HTTP2_CLIENTS),
    Case("h2-download-100MiB", "download", http2=True, clients=HTTP2_CLIENTS),
    Case("h2-upload-10MiB", "upload", http2=True, clients=HTTP2_CLIENTS),
)


@dataclass(frozen=True)
class Ratio:
    """The CPU of one client in one case, over that of another: with a bound, a target."""

    title: str
    over: tuple[str, str]
    under: tuple[str, str]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def bound(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def is_met_by(self, value: float) -> bool:
        if self.at_most is not None:
            return value <= self.at_most
        return self.at_least is not None and value >= self.at_least


def _against_bare(case: str, at_most: float = 1.35) -> Ratio:
    return Ratio("ours / bare", (OURS, case), (BARE, case), at_most=at_most)


def _against_httpcore2(case: str, at_least: float) -> Ratio:
    return Ratio("httpcore2 / ours", ("httpcore2", case), (OURS, case), at_least=at_least)


TARGETS = (
    _against_bare("get-1"),
    _against_bare("get-20"),
    _against_bare("get-100"),
    _against_bare("get-1000"),
    _against_bare("get-1000-over-50"),
    _against_httpcore2("get-1", 2.5),
    _against_httpcore2("get-20", 2.5),
    _against_httpcore2("get-1000", 15),
    Ratio("with / without timeouts", (OURS, "get-20-timeouts"), (OURS, "get-20"), at_most=1.15),
    Ratio("ours / aiohttp", (OURS, "download-100MiB"), ("aiohttp", "download-100MiB"), at_most=2),
    Ratio("tunnel / without", (OURS, "tunnel-get-20-tls"), (OURS, "get-20-tls"), at_most=1.1),
    Ratio(
        "tunnel / without", (OURS, "tunnel-download-100MiB-tls"), (OURS, "download-100MiB-tls"), at_most=1.1
    ),
    _against_bare("h2-get-1", 1.4),
    _against_bare("h2-get-20", 1.4),
    _against_bare("h2-get-100", 1.4),
    _against_bare("h2-download-100MiB", 1.4),
    _against_bare("h2-upload-10MiB", 1.4),
    _against_httpcore2("h2-get-1", 1.8),
    _against_httpcore2("h2-get-20", 1.8),
    _against_httpcore2("h2-get-100", 1.8),
    _against_httpcore2("h2-download-100MiB", 3),
)
