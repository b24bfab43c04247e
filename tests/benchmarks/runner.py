"""Starts the workers and lets them measure in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Self

from ..interop.nginx import Nginx
from ..interop.process import Process
from .cases import Case, Operation, Work
from .loops import Sample

PATHS: dict[Operation, str] = {"get": "/1k", "download": "/100m", "upload": "/sink"}
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Effort:
    rounds: int
    # How much CPU time a client is to spend in one round, and at most in all rounds of a case.
    round_seconds: float
    case_seconds: float


# Many short rounds, since what disturbs a measurement often lasts for seconds, and then a pair that is
# measured right after each other still has the right ratio.
FULL = Effort(rounds=25, round_seconds=0.15, case_seconds=10.0)
QUICK = Effort(rounds=5, round_seconds=0.06, case_seconds=1.0)


@dataclass
class Result:
    client: str
    case: str
    samples: list[Sample] = field(default_factory=list)
    failed: bool = False


class Contestant:
    """A worker process, and what it measured."""

    def __init__(self, work: Work) -> None:
        self.result = Result(work.client, work.case.name)
        self._lanes = work.lanes
        self._spent = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", work.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._last: Sample | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The end of its input ends it.
        self._process.communicate()

    def wait_until_warm(self) -> None:
        self._last = self._receive()

    def measure(self, effort: Effort) -> None:
        if self._last is None or self._spent >= effort.case_seconds:
            return
        wanted = round(effort.round_seconds / self._last.cpu_per_request)
        self._last = self._request(max(wanted, self._lanes))
        if self._last is not None:
            self._spent += self._last.cpu
            self.result.samples.append(self._last)

    def _request(self, requests: int) -> Sample | None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{requests}\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> Sample | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            # It has said why on the standard error.
            self.result.failed = True
            return None
        return Sample(**json.loads(line))


def run(
    server: Nginx, proxy: Process | None, cases: Sequence[Case], clients: Sequence[str], effort: Effort
) -> Iterator[list[Result]]:
    """The results group by group, as soon as each is there."""
    for _, group in groupby(cases, key=lambda case: case.group):
        yield _run_group([work for case in group for work in _works(server, proxy, case, clients)], effort)


def _works(server: Nginx, proxy: Process | None, case: Case, clients: Sequence[str]) -> Iterator[Work]:
    base = server.https_url if case.tls else server.http2_url if case.http2 else server.http_url
    url = base + PATHS[case.operation]
    proxy_url = proxy.url if proxy is not None and case.proxy else None
    for client in clients:
        if client in case.clients:
            yield Work(client, case, url, server.ca_file, proxy_url)


def _run_group(works: list[Work], effort: Effort) -> list[Result]:
    with ExitStack() as stack:
        contestants = [stack.enter_context(Contestant(work)) for work in works]
        # They start and warm up side by side, and nothing is measured before all have finished.
        for contestant in contestants:
            contestant.wait_until_warm()
        for turn in range(effort.rounds):
            # Nobody always follows the same neighbour, nor always comes first.
            for contestant in _rotated(contestants, turn):
                contestant.measure(effort)
    return [contestant.result for contestant in contestants]


def _rotated(contestants: list[Contestant], by: int) -> list[Contestant]:
    start = by % len(contestants) if contestants else 0
    return contestants[start:] + contestants[:start]
