"""The measurements as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
import ssl
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import trio_exchange

from ..interop.nginx import nginx_version
from .cases import BARE, CASES, CLIENTS, KIB, OURS, RAW, TARGETS, Case, Target
from .runner import Effort, Result

PACKAGES = ("trio", "h11", "h2", "hpack", "httpcore2", "aiohttp", "pyreqwest")
RATIOS = ((OURS, BARE), (OURS, "httpcore2"), (OURS, "aiohttp"), (OURS, "pyreqwest"))
_CASES = {case.name: case for case in CASES}
MISSING = "-"
# Marks a median of fewer rounds than others have.
MARK = "~"

LEGEND = f"""\
{BARE}: a plain loop over h11 or h2, without a pool, and not the least possible.
{RAW}: a send and a receive of as many bytes, without HTTP: the limit of Trio itself.
get-N: 1 KiB GETs on N connections at once; h2-get-N: N streams of one connection.
connect-each: 20 tasks, a connection for each request.
idle-1000: memory for each of 1,000 idle connections, opened one after the other; idle-1000-burst: by 1,000
tasks at once, hence with the memory that the tasks have left unused.
import: CPU time of importing the client, where Trio is imported already."""


class Report:
    def __init__(self, results: Sequence[Result]) -> None:
        self._results = {(result.client, result.case): result for result in results}
        self._cases = [case for case in CASES if case.name in {result.case for result in results}]

    def median(self, client: str, case: str) -> float | None:
        """The median of what a request, or a connection, takes: seconds of CPU, or bytes."""
        costs = self._costs(client, case)
        return statistics.median(costs) if costs else None

    def measure(self, target: Target) -> float | None:
        """What is held against the bound of a target."""
        return self.median(*target.over) if target.under is None else self.ratio(target.over, target.under)

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        """The median over the rounds: what slows the machine slows the neighbours in a round alike."""
        pairs = list(zip(self._costs(*over), self._costs(*under), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def _costs(self, client: str, case: str) -> list[float]:
        result = self._results.get((client, case))
        if result is None:
            return []
        if _CASES[case].operation == "idle":
            return [sample.memory_per_request for sample in result.samples]
        return [sample.cpu_per_request for sample in result.samples]

    def failures(self) -> list[Result]:
        return [result for result in self._results.values() if result.failed]

    def table(self, effort: Effort) -> str:
        titles = ["case", *CLIENTS, *(f"ours/{under}" for _, under in RATIOS)]
        rows = [self._row(case, effort.rounds) for case in self._cases]
        note = f"\n{MARK}: a median of fewer rounds, each of which takes long." if MARK in str(rows) else ""
        return f"{_columns([titles, *rows])}\n\n{LEGEND}{note}"

    def _row(self, case: Case, rounds: int) -> list[str]:
        cells = []
        for client in CLIENTS:
            few = 0 < len(self._costs(client, case.name)) < rounds
            cells.append((MARK if few else "") + _amount(self.median(client, case.name), case))
        ratios = (self.ratio((over, case.name), (under, case.name)) for over, under in RATIOS)
        return [case.name, *cells, *map(_factor, ratios)]

    def rates(self) -> str:
        """What a second of CPU time is enough for."""
        rows = [self._rate_row(case) for case in self._cases if not case.is_footprint]
        return _columns([["per second of CPU", "", *CLIENTS], *rows])

    def _rate_row(self, case: Case) -> list[str]:
        medians = (self.median(client, case.name) for client in CLIENTS)
        rates = (MISSING if median is None else f"{case.amount / median:,.0f}" for median in medians)
        return [case.name, case.unit, *rates]

    def targets(self) -> str:
        rows = [self._target_row(target) for target in TARGETS]
        return _columns(
            [
                ["target", "case", "bound", "measured", ""],
                *(row for row in rows if MISSING not in row),
            ]
        )

    def _target_row(self, target: Target) -> list[str]:
        value = self.measure(target)
        case = _CASES[target.over[1]]
        sign = ">=" if target.at_most is None else "<="
        if target.under is None:
            bound, measured = f"{sign} {_amount(target.limit, case)}", _amount(value, case)
        else:
            bound, measured = f"{sign} {target.limit:g}", _factor(value)
        return [target.title, case.name, bound, measured, _verdict(target, value)]

    def to_dict(self, effort: Effort, environment: dict[str, Any]) -> dict[str, Any]:
        return {
            "environment": environment,
            "effort": asdict(effort),
            "results": [self._result_dict(result) for result in self._results.values()],
            "targets": [self._target_dict(target) for target in TARGETS],
        }

    def _result_dict(self, result: Result) -> dict[str, Any]:
        return {**asdict(result), "median": self.median(result.client, result.case)}

    def _target_dict(self, target: Target) -> dict[str, Any]:
        value = self.measure(target)
        return {
            **asdict(target),
            "measured": value,
            "met": None if value is None else target.is_met_by(value),
        }


def read_environment() -> dict[str, Any]:
    """The date, and the versions of all that is measured."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {
            "trio-exchange": trio_exchange.__version__,
            **{name: _version(name) for name in PACKAGES},
            "OpenSSL": ssl.OPENSSL_VERSION.removeprefix("OpenSSL ").partition(" ")[0],
            "nginx": nginx_version(),
        },
    }


def describe(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"Measured on {environment['date']} with Python {environment['python']}, {versions};\n"
        f"{environment['system']}, {environment['cpus']} CPUs."
    )


def describe_connections(log: list[list[str]]) -> str | None:
    """What the server logged of the requests that were each to have a connection of their own.

    Raises:
        ValueError: A connection carried more than one of them.
    """
    handshakes = Counter(client for client, _, session in log if session in ("r", "."))
    resumed = Counter(client for client, _, session in log if session == "r")
    for client, number, _ in log:
        if number != "1":
            raise ValueError(f"{client} sent request number {number} on a connection in connect-each")
    shares = [f"{client} {resumed[client] / count:.0%}" for client, count in handshakes.items()]
    return f"TLS sessions resumed in connect-each-tls: {', '.join(shares)}" if shares else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _verdict(target: Target, value: float | None) -> str:
    if value is None:
        return MISSING
    return "met" if target.is_met_by(value) else "MISSED"


def _amount(value: float | None, case: Case) -> str:
    """Bytes or seconds, in a unit that suits."""
    if value is None:
        return MISSING
    if case.operation == "idle":
        return f"{value / KIB:.1f} KiB"
    return f"{value * 1e6:.0f} µs" if value < 0.01 and not case.is_footprint else f"{value * 1e3:.1f} ms"


def _factor(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
