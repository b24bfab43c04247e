"""The guard of the instructions per request: what it lets pass, and what it says of what it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from .benchmarks import instructions
from .benchmarks.instructions import FILE, REFERENCE, Counts, compare, read, write
from .benchmarks.scenarios import SCENARIOS

KEPT = Counts(
    "3.11.7 (main, May  9 2026) [GCC 12.2.0] x86_64",
    {"h11": "0.16.0", "trio": "0.35.0"},
    {REFERENCE: 600_000, "http11-get": 400_000, "http2-get": 1_000_000},
)


def with_counts(counts: Counts, **changed: int) -> Counts:
    names = {name.replace("_", "-"): count for name, count in changed.items()}
    return replace(counts, instructions={**counts.instructions, **names})


@pytest.mark.parametrize("count", [380_001, 400_000, 419_999])
def test_a_change_within_the_tolerance_passes(count: int) -> None:
    comparison = compare(KEPT, with_counts(KEPT, http11_get=count))
    assert comparison.failures == []
    assert len(comparison.lines) == 3


@pytest.mark.parametrize(("count", "change"), [(379_000, "-5.2%"), (421_000, "+5.2%")])
def test_a_change_beyond_the_tolerance_fails_either_way(count: int, change: str) -> None:
    assert compare(KEPT, with_counts(KEPT, http11_get=count)).failures == [
        f"http11-get: 400,000 instructions per request became {count:,}, which is {change} and beyond 5%"
    ]


def test_each_scenario_that_moved_is_named() -> None:
    comparison = compare(KEPT, with_counts(KEPT, http11_get=500_000, http2_get=2_000_000))
    assert [failure.partition(":")[0] for failure in comparison.failures] == ["http11-get", "http2-get"]


def test_a_scenario_that_is_missing_fails() -> None:
    less = replace(KEPT, instructions={REFERENCE: 600_000, "http2-get": 1_000_000})
    assert compare(KEPT, less).failures == ["http11-get: not measured"]
    assert compare(less, KEPT).failures == ["http11-get: not in instructions.json"]


def test_the_reference_must_not_move_on_the_same_build() -> None:
    (failure,) = compare(KEPT, with_counts(KEPT, reference=700_000)).failures
    assert failure.startswith("reference: 600,000 instructions per request became 700,000")


@pytest.mark.parametrize(
    "other",
    [
        replace(KEPT, python="3.11.9 (main, Jun  1 2026) [Clang 18] x86_64"),
        replace(KEPT, packages={"h11": "0.16.0", "trio": "0.36.0"}),
    ],
)
def test_another_build_is_compared_by_way_of_the_reference(other: Counts) -> None:
    twice = replace(other, instructions={name: 2 * count for name, count in KEPT.instructions.items()})
    comparison = compare(KEPT, twice)
    assert comparison.failures == []
    assert "counts are multiplied by 0.500" in comparison.lines[0]
    (failure,) = compare(KEPT, with_counts(twice, http11_get=900_000)).failures
    assert failure.startswith("http11-get: 400,000 instructions per request became 450,000, which is +12.5%")


def test_another_minor_version_of_python_is_not_compared() -> None:
    (failure,) = compare(KEPT, replace(KEPT, python="3.12.1 (main)")).failures
    assert failure == "the counts are those of Python 3.11, and this is Python 3.12"


def test_the_file_has_each_scenario() -> None:
    assert read(FILE.read_text()).instructions.keys() == SCENARIOS.keys()
    assert write(read(FILE.read_text())) == FILE.read_text()


def test_a_missing_valgrind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["instructions"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="apt-get install valgrind"):
        instructions.main()


@pytest.mark.parametrize("name", SCENARIOS)
async def test_scenarios_run_without_callgrind(name: str) -> None:
    # Each asserts that the responses are right.
    await SCENARIOS[name](3)
