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
UPLOAD_BODY = b"\0" * UPLOAD_SIZE
TIMEOUT_SECONDS = 5.0

HEADERS = [
    (b"User-Agent", b"benchmark"),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"identity"),
]
CLOSE_HEADERS = [*HEADERS, (b"Connection", b"close")]
UPLOAD_HEADERS = [*HEADERS, (b"Content-Length", str(UPLOAD_SIZE).encode())]

OURS = "trio_exchange"
BARE = "bare"
RAW = "raw_trio"
CLIENTS = (OURS, BARE, RAW, "httpcore2", "aiohttp", "pyreqwest")

# The first three are the methods of a client that a worker calls. "idle" is the memory that each idle
# connection takes, and "import" the CPU time of importing the client where Trio is imported already.
Operation = Literal["get", "download", "upload", "upload_bytes", "idle", "import"]

PATHS: dict[Operation, str] = {
    "get": "/1k",
    "download": "/100m",
    "upload": "/sink",
    "upload_bytes": "/sink",
    "idle": "/1k",
    "import": "/1k",
}


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        connections: How many are kept open; with `connect_each`, how many are open at once.
        connect_each: Each request has a connection of its own, which ends with it.
        beside: The case in whose rounds this one is measured too, so that the two compare well.
    """

    name: str
    operation: Operation = "get"
    tasks: int = 1
    connections: int = 1
    tls: bool = False
    timeouts: bool = False
    http2: bool = False
    proxy: bool = False
    chunked: bool = False
    connect_each: bool = False
    beside: str | None = None
    clients: tuple[str, ...] = CLIENTS

    @property
    def is_footprint(self) -> bool:
        """Whether each sample is that of a fresh process."""
        return self.operation in ("idle", "import")

    @property
    def unit(self) -> str:
        """What is counted for a rate."""
        return "MiB" if self.amount > 1 else "requests"

    @property
    def amount(self) -> float:
        """How much of that a request is."""
        if self.operation == "download":
            return DOWNLOAD_SIZE / MIB
        return UPLOAD_SIZE / MIB if self.operation.startswith("upload") else 1

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The header fields of a GET."""
        return CLOSE_HEADERS if self.connect_each else HEADERS

    def path(self, client: str) -> str:
        """The path and query of the URL that a client requests."""
        path = PATHS[self.operation]
        if self.chunked:
            return f"/chunked{path}"
        return f"/logged{path}?client={client}" if self.connect_each else path


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
        """How many tasks send requests: clients without a pool have no more than connections."""
        return self.case.connections if self.module in ("bare_h11", RAW) else self.case.tasks

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "case": Case(**fields["case"])})


HTTP_CLIENTS = (OURS, BARE, "httpcore2", "aiohttp", "pyreqwest")
POOL_CLIENTS = (OURS, "httpcore2", "aiohttp", "pyreqwest")
HTTP2_CLIENTS = (OURS, BARE, "httpcore2", "pyreqwest")
PROXY_CLIENTS = (OURS, "httpcore2")

CASES = (
    Case("get-1"),
    Case("get-20", tasks=20, connections=20),
    Case("get-20-timeouts", tasks=20, connections=20, timeouts=True, beside="get-20", clients=POOL_CLIENTS),
    Case("get-20-chunked", tasks=20, connections=20, chunked=True, clients=HTTP_CLIENTS),
    Case("get-100", tasks=100, connections=100),
    Case("get-10000-over-1000", tasks=10_000, connections=1000, beside="get-100", clients=(OURS,)),
    Case("get-1000", tasks=1000, connections=1000),
    Case("get-1000-over-50", tasks=1000, connections=50, clients=HTTP_CLIENTS),
    Case("get-20-tls", tasks=20, connections=20, tls=True),
    Case(
        "tunnel-get-20-tls",
        tasks=20,
        connections=20,
        tls=True,
        proxy=True,
        beside="get-20-tls",
        clients=PROXY_CLIENTS,
    ),
    Case("connect-each", tasks=20, connections=20, connect_each=True, clients=HTTP_CLIENTS),
    Case("connect-each-tls", tasks=20, connections=20, connect_each=True, tls=True, clients=HTTP_CLIENTS),
    Case("download-100MiB", "download", clients=HTTP_CLIENTS),
    Case("download-100MiB-chunked", "download", chunked=True, clients=HTTP_CLIENTS),
    Case("download-100MiB-tls", "download", tls=True, clients=HTTP_CLIENTS),
    Case(
        "tunnel-download-100MiB-tls",
        "download",
        tls=True,
        proxy=True,
        beside="download-100MiB-tls",
        clients=PROXY_CLIENTS,
    ),
    Case("upload-10MiB-iterator", "upload", clients=HTTP_CLIENTS),
    Case("upload-10MiB-bytes", "upload_bytes", clients=HTTP_CLIENTS),
    Case("h2-get-1", http2=True, clients=HTTP2_CLIENTS),
    Case("h2-get-20", tasks=20, http2=True, clients=HTTP2_CLIENTS),
    Case("h2-get-100", tasks=100, http2=True, clients=HTTP2_CLIENTS),
    Case("h2-download-100MiB", "download", http2=True, clients=HTTP2_CLIENTS),
    Case("h2-upload-10MiB", "upload", http2=True, clients=HTTP2_CLIENTS),
    Case("idle-1000", "idle", connections=1000, clients=(OURS, "httpcore2")),
    Case("idle-1000-burst", "idle", tasks=1000, connections=1000, clients=(OURS, "httpcore2", "aiohttp")),
    Case("import", "import", clients=POOL_CLIENTS),
)


@dataclass(frozen=True)
class Target:
    """A bound on what one client takes in one case, in the case's unit or over another's.

    Attributes:
        over: The client, and the case.
        under: The client and the case that it is divided by; None if the bound is absolute.
        at_most: The upper bound: a factor, or seconds.
        at_least: The lower bound.
    """

    title: str
    over: tuple[str, str]
    under: tuple[str, str] | None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def limit(self) -> float:
        limit = self.at_least if self.at_most is None else self.at_most
        assert limit is not None
        return limit

    def is_met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_most is None else value <= self.limit


def _ours_over(other: str, case: str, at_most: float) -> Target:
    return Target(f"ours / {other}", (OURS, case), (other, case), at_most=at_most)


def _httpcore2_over_ours(case: str, at_least: float) -> Target:
    return Target("httpcore2 / ours", ("httpcore2", case), (OURS, case), at_least=at_least)


def _ours_over_itself(title: str, case: str, other_case: str, at_most: float) -> Target:
    return Target(title, (OURS, case), (OURS, other_case), at_most=at_most)


TARGETS = (
    _ours_over("aiohttp", "get-1", 0.85),
    _ours_over(BARE, "get-1", 0.9),
    *(
        target
        for case in ("get-20", "get-100", "get-1000", "get-1000-over-50")
        for target in (_ours_over("aiohttp", case, 0.8), _ours_over("pyreqwest", case, 1.0))
    ),
    _ours_over("aiohttp", "get-20-chunked", 0.85),
    _ours_over_itself("with / without timeouts", "get-20-timeouts", "get-20", 1.08),
    _ours_over_itself("10,000 over 1,000 / 100 over 100", "get-10000-over-1000", "get-100", 1.15),
    _ours_over("aiohttp", "get-20-tls", 0.95),
    *(
        target
        for case in ("connect-each", "connect-each-tls")
        for target in (_ours_over("aiohttp", case, 1.0), _ours_over("httpcore2", case, 0.7))
    ),
    _ours_over("aiohttp", "download-100MiB", 1.0),
    _ours_over("aiohttp", "download-100MiB-chunked", 1.0),
    _ours_over("aiohttp", "download-100MiB-tls", 1.0),
    _ours_over("aiohttp", "upload-10MiB-iterator", 1.1),
    _ours_over("aiohttp", "upload-10MiB-bytes", 1.1),
    _ours_over(BARE, "h2-get-1", 1.1),
    _ours_over(BARE, "h2-get-20", 0.75),
    _ours_over(BARE, "h2-get-100", 0.75),
    _httpcore2_over_ours("h2-get-20", 2.5),
    _httpcore2_over_ours("h2-get-100", 2.5),
    _httpcore2_over_ours("h2-download-100MiB", 4),
    _httpcore2_over_ours("h2-upload-10MiB", 1.5),
    _ours_over_itself("tunnel / without", "tunnel-get-20-tls", "get-20-tls", 1.1),
    _ours_over_itself("tunnel / without", "tunnel-download-100MiB-tls", "download-100MiB-tls", 1.05),
    _ours_over("httpcore2", "idle-1000", 1.0),
    _ours_over("httpcore2", "idle-1000-burst", 1.0),
    Target("beyond Trio's", (OURS, "import"), None, at_most=0.025),
)
