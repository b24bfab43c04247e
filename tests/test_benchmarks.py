"""The benchmark's tables are consistent, and its report judges as its targets say."""

from __future__ import annotations

import pytest

from .benchmarks.cases import CASES, CLIENTS, OURS, TARGETS, Case, Target, Work
from .benchmarks.loops import Sample
from .benchmarks.report import Report, describe_connections
from .benchmarks.runner import FULL, Result

BY_NAME = {case.name: case for case in CASES}


def group(case: str) -> str:
    return BY_NAME[case].beside or case


def result(client: str, case: str, *cpu: float, memory: int = 0) -> Result:
    return Result(client, case, [Sample(1, seconds, seconds, memory) for seconds in cpu])


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.title} {target.over[1]}")
def test_a_target_compares_what_is_measured_in_the_same_rounds(target: Target) -> None:
    compared = (target.over,) if target.under is None else (target.over, target.under)
    for client, case in compared:
        assert client in BY_NAME[case].clients
    assert len({group(case) for _, case in compared}) == 1
    assert (target.at_most is None) != (target.at_least is None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_worker_is_told_everything(case: Case) -> None:
    assert set(case.clients) <= set(CLIENTS)
    work = Work(OURS, case, "http://127.0.0.1/1k", "ca.pem", None)
    again = Work.from_json(work.to_json())
    assert (again.url, again.case.name, again.case.headers) == (work.url, case.name, case.headers)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    report = Report([result(OURS, "get-1", 1.0, 8.0, 3.0), result("aiohttp", "get-1", 2.0, 2.0, 2.0)])
    assert report.ratio((OURS, "get-1"), ("aiohttp", "get-1")) == 1.5
    assert report.ratio((OURS, "get-1"), ("pyreqwest", "get-1")) is None


@pytest.mark.parametrize(("cpu", "verdict"), [(0.84, "met"), (0.86, "MISSED")])
def test_a_target_is_met_or_missed(cpu: float, verdict: str) -> None:
    report = Report([result(OURS, "get-1", cpu), result("aiohttp", "get-1", 1.0)])
    (_, line) = report.targets().splitlines()
    assert line.split()[-3:] == ["0.85", f"{cpu:.2f}", verdict]


def test_absolute_bounds_and_memory() -> None:
    report = Report(
        [
            result(OURS, "import", 0.03),
            result(OURS, "idle-1000", 1.0, memory=2048),
            result("httpcore2", "idle-1000", 1.0, memory=4096),
        ]
    )
    table = report.targets()
    assert [line.split()[-2:] for line in table.splitlines()[1:]] == [["0.50", "met"], ["ms", "MISSED"]]
    assert "<= 25.0 ms   30.0 ms" in table
    assert "~2.0 KiB" in report.table(FULL)


def test_a_client_that_reuses_a_connection_it_was_to_close_is_found() -> None:
    log = [[OURS, "1", "."], [OURS, "1", "r"], ["aiohttp", "1", "."], ["aiohttp", "1", "-"]]
    expected = "TLS sessions resumed in connect-each-tls: trio_exchange 50%, aiohttp 0%"
    assert describe_connections(log) == expected
    assert describe_connections([]) is None
    with pytest.raises(ValueError, match="aiohttp sent request number 2 on a connection"):
        describe_connections([*log, ["aiohttp", "2", "."]])
