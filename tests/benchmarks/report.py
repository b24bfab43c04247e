"""The measurements as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .cases import BARE, CASES, CLIENTS, OURS, TARGETS, Case, Ratio
from .runner import Effort, Result

PACKAGES = ("trio-exchange", "trio", "h11", "h2", "httpcore2", "aiohttp")
COLUMNS = ("case", *CLIENTS, "ours/bare", "httpcore2/ours", "ours/aiohttp")
MISSING = "-"


class Report:
    def __init__(self, results: Sequence[Result]) -> None:
        self._results = {(result.client, result.case): result for result in results}

    def median(self, client: str, case: str) -> float | None:
        """Median seconds of CPU per request."""
        samples = self._cpu(client, case)
        return statistics.median(samples) if samples else None

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> float | None:
        """The median over the rounds: what slows the machine slows the neighbours in a round alike."""
        pairs = list(zip(self._cpu(*over), self._cpu(*under), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def _cpu(self, client: str, case: str) -> list[float]:
        result = self._results.get((client, case))
        return [sample.cpu_per_request for sample in result.samples] if result else []

    def failures(self) -> list[Result]:
        return [result for result in self._results.values() if result.failed]

    def table(self) -> str:
        measured = {case for _, case in self._results}
        rows = [self._row(case.name) for case in CASES if case.name in measured]
        return _columns([list(COLUMNS), *rows])

    def _row(self, case: str) -> list[str]:
        ratios = ((OURS, BARE), ("httpcore2", OURS), (OURS, "aiohttp"))
        return [
            case,
            *(_duration(self.median(client, case)) for client in CLIENTS),
            *(_factor(self.ratio((over, case), (under, case))) for over, under in ratios),
        ]

    def rates(self) -> str:
        """What a second of CPU time is enough for."""
        measured = {case for _, case in self._results}
        rows = [self._rate_row(case) for case in CASES if case.name in measured]
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

    def _target_row(self, target: Ratio) -> list[str]:
        value = self.ratio(target.over, target.under)
        return [target.title, target.over[1], target.bound, _factor(value), _verdict(target, value)]

    def to_dict(self, effort: Effort) -> dict[str, Any]:
        return {
            "environment": _environment(),
            "effort": asdict(effort),
            "results": [self._result_dict(result) for result in self._results.values()],
            "targets": [self._target_dict(target) for target in TARGETS],
        }

    def _result_dict(self, result: Result) -> dict[str, Any]:
        return {**asdict(result), "median_cpu_per_request": self.median(result.client, result.case)}

    def _target_dict(self, target: Ratio) -> dict[str, Any]:
        value = self.ratio(target.over, target.under)
        return {
            **asdict(target),
            "measured": value,
            "met": None if value is None else target.is_met_by(value),
        }


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _verdict(target: Ratio, value: float | None) -> str:
    if value is None:
        return MISSING
    return "met" if target.is_met_by(value) else "MISSED"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"


def _factor(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
