"""Starts the workers and lets them measure in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from ..interop.nginx import Nginx
from ..interop.process import Process
from .cases import OURS, Case, Work
from .loops import Sample

_WORKER = (sys.executable, "-m", f"{__package__}.worker")
# The name to import of each client.
MODULES = {
    OURS: "trio_exchange",
    "httpcore2": "httpcore2",
    "aiohttp": "aiohttp",
    "pyreqwest": "pyreqwest.client",
}
# Nothing but Trio is imported before, in an interpreter that has nothing else to do.
_IMPORT = """
import sys, time, trio
cpu, wall = time.process_time(), time.perf_counter()
__import__(sys.argv[1])
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
import json
print(json.dumps({"requests": 1, "cpu": cpu, "wall": wall}))
"""


@dataclass(frozen=True)
class Effort:
    rounds: int
    # How much CPU time a client is to spend in one round, and at most in all rounds of a case.
    round_seconds: float
    case_seconds: float


# Many short rounds, since what disturbs a measurement often lasts for seconds, and then a pair that is
# measured right after each other still has the right ratio.
FULL = Effort(rounds=15, round_seconds=0.1, case_seconds=25.0)
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
            [*_WORKER, work.to_json()],
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


class FreshContestant:
    """Starts a process for each sample."""

    def __init__(self, work: Work) -> None:
        self.result = Result(work.client, work.case.name)
        self._spent = 0.0
        if work.case.operation == "import":
            self._command = [sys.executable, "-c", _IMPORT, MODULES[work.client]]
        else:
            self._command = [*_WORKER, work.to_json()]
        # Bytecode is compiled by the first process alone, whatever the environment says of it.
        self._bytecode = tempfile.TemporaryDirectory(prefix="bytecode-")
        self._environment = {**os.environ, "PYTHONPYCACHEPREFIX": self._bytecode.name}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bytecode.cleanup()

    def wait_until_warm(self) -> None:
        self._sample()

    def measure(self, effort: Effort) -> None:
        if self.result.failed or self._spent >= effort.case_seconds:
            return
        sample = self._sample()
        if sample is not None:
            self._spent += sample.cpu
            self.result.samples.append(sample)

    def _sample(self) -> Sample | None:
        process = subprocess.run(
            self._command, env=self._environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if process.returncode:
            self.result.failed = True
            return None
        return Sample(**json.loads(process.stdout))


def run(
    server: Nginx, proxy: Process | None, cases: Sequence[Case], clients: Sequence[str], effort: Effort
) -> Iterator[list[Result]]:
    """The results group by group, as soon as each is there."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.beside or case.name, []).append(case)
    for group in groups.values():
        yield _run_group([work for case in group for work in _works(server, proxy, case, clients)], effort)


def _works(server: Nginx, proxy: Process | None, case: Case, clients: Sequence[str]) -> Iterator[Work]:
    base = server.https_url if case.tls else server.http2_url if case.http2 else server.http_url
    proxy_url = proxy.url if proxy is not None and case.proxy else None
    for client in clients:
        if client in case.clients:
            yield Work(client, case, base + case.path(client), server.ca_file, proxy_url)


def _start(stack: ExitStack, work: Work) -> Contestant | FreshContestant:
    if work.case.is_footprint:
        return stack.enter_context(FreshContestant(work))
    return stack.enter_context(Contestant(work))


def _run_group(works: list[Work], effort: Effort) -> list[Result]:
    with ExitStack() as stack:
        contestants = [_start(stack, work) for work in works]
        # They start and warm up side by side, and nothing is measured before all have finished.
        for contestant in contestants:
            contestant.wait_until_warm()
        for turn in range(effort.rounds):
            # The first of each round, and the predecessor of each, change from round to round.
            for contestant in _rotated(contestants, turn):
                contestant.measure(effort)
    return [contestant.result for contestant in contestants]


def _rotated(contestants: list[Contestant | FreshContestant], by: int) -> list[Contestant | FreshContestant]:
    start = by % len(contestants) if contestants else 0
    return contestants[start:] + contestants[:start]
