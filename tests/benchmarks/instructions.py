"""The regression guard: instructions per request, against those in `instructions.json`.

`python -m tests.benchmarks.instructions` fails if a scenario of `scenarios.py` takes 5 % more or less than
the file says; with `--update` it writes the file. It needs valgrind, whose tool callgrind counts.

A count is the difference between a run with many requests and one with few, per request, so that starting
and stopping cancel out. On one build of Python, in the same environment, two runs count the same, however
busy the machine is; other paths and environment variables change the counts by up to 0.3 %.

Another build of the same Python has other counts: they depend on the compiler and its options. So the
scenarios include a reference, a plain loop over h11 and Trio with the same peers, and without this client.
On the build that is named in the file, and with the same versions of the dependencies, counts are compared as
they are, that of the reference too. Elsewhere each is first multiplied by the file's count of the reference
over the one measured there. The output says so, since the ratio of two pieces of Python code depends on the
build too, if much less. Counts of different minor versions of Python are not compared: what their
interpreters do for the same code differs by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_name("instructions.json")
TOLERANCE = 0.05
REFERENCE = "reference"
# Enough for the differences to be steady, and few enough for a session of less than a minute.
FEW, MANY = 40, 140
# Each executes code of its own for a request.
PACKAGES = ("trio", "outcome", "sortedcontainers", "h11", "h2", "hpack", "hyperframe")

UPDATE = f"""\
If the change is intended, write the new counts with 'nox -s instructions -- --update', and commit
tests/benchmarks/{FILE.name} with it."""


@dataclass(frozen=True)
class Counts:
    """What was counted, and on what.

    Attributes:
        python: `sys.version` and the machine, which tell builds apart.
        packages: The versions of the dependencies.
        instructions: For one request of each scenario.
    """

    python: str
    packages: dict[str, str]
    instructions: dict[str, int]

    @property
    def minor(self) -> str:
        """Such as ``3.11``."""
        return ".".join(self.python.split(".")[:2])

    def is_like(self, other: Counts) -> bool:
        """Whether both were counted on the same build, with the same dependencies."""
        return (self.python, self.packages) == (other.python, other.packages)


@dataclass(frozen=True)
class Comparison:
    """The lines of a table, and a sentence for everything that is wrong."""

    lines: list[str]
    failures: list[str]


def compare(expected: Counts, measured: Counts) -> Comparison:
    """Hold measured counts against those of the file."""
    if expected.minor != measured.minor:
        wrong = f"the counts are those of Python {expected.minor}, and this is Python {measured.minor}"
        return Comparison([], [wrong])
    names = dict.fromkeys((*expected.instructions, *measured.instructions))
    failures = [f"{name}: not measured" for name in names if name not in measured.instructions]
    failures += [f"{name}: not in {FILE.name}" for name in names if name not in expected.instructions]
    if failures:
        return Comparison([], failures)
    lines, factor = [], 1.0
    if not expected.is_like(measured):
        factor = expected.instructions[REFERENCE] / measured.instructions[REFERENCE]
        lines.append(f"Not the build and dependencies of {FILE.name}: counts are multiplied by {factor:.3f},")
        lines.append(f"which makes those of '{REFERENCE}' equal.")
    for name in names:
        before, after = expected.instructions[name], round(measured.instructions[name] * factor)
        change = after / before - 1
        lines.append(f"{name:24}{before:12,}{after:12,}{change:+9.1%}")
        if abs(change) > TOLERANCE:
            failures.append(
                f"{name}: {before:,} instructions per request became {after:,}, which is {change:+.1%} and "
                f"beyond {TOLERANCE:.0%}"
            )
    return Comparison(lines, failures)


def read(text: str) -> Counts:
    return Counts(**json.loads(text))


def write(counts: Counts) -> str:
    return json.dumps(asdict(counts), indent=2) + "\n"


def count() -> Counts:
    """Run the scenarios under callgrind.

    Raises:
        subprocess.CalledProcessError: A scenario failed, and has said why on the standard error.
    """
    with tempfile.TemporaryDirectory(prefix="callgrind-") as folder:
        totals = _run_scenarios(Path(folder))
    return Counts(
        f"{sys.version} {platform.machine()}",
        {name: version(name) for name in PACKAGES},
        {name: round((totals[name, MANY] - totals[name, FEW]) / (MANY - FEW)) for name, _ in totals},
    )


def _run_scenarios(folder: Path) -> dict[tuple[str, int], int]:
    """The instructions of each run, and of the start that they all share."""
    callgrind = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={folder}/%p"]
    scenarios = ["-m", f"{__package__}.scenarios", str(FEW), str(MANY)]
    output = subprocess.run(
        [*callgrind, sys.executable, *scenarios],
        # The order of sets and dictionaries is that of hashes.
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    runs: Mapping[str, tuple[str, int]] = json.loads(output)
    return {(name, requests): _total(folder / process) for process, (name, requests) in runs.items()}


def _total(path: Path) -> int:
    found = re.search(r"^totals: (\d+)$", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no line with the total")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write the counts to {FILE.name}")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("valgrind is not installed: on Debian, apt-get install valgrind.")
    measured = count()
    if options.update:
        FILE.write_text(write(measured))
        print(FILE.read_text(), end="")
        return
    comparison = compare(read(FILE.read_text()), measured)
    print("\n".join(comparison.lines))
    if comparison.failures:
        sys.exit("\n".join(("", *comparison.failures, "", UPDATE)))


if __name__ == "__main__":
    main()
