"""The corpus: what is kept of the inputs that a fuzzer has found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

#: By target, in folders.
CORPUS = Path(__file__).parent / "corpus"
#: Of a target.
MOST_FILES = 20
_MOST_BYTES = 30 * 1024
_PACKAGE = str(Path(__file__).parents[2] / "trio_exchange")

Step = tuple[str, int, int]


def inputs(target: str) -> list[Path]:
    """The corpus of a target."""
    return sorted((CORPUS / target).iterdir())


def steps(function: Callable[[bytes], None], data: bytes) -> frozenset[Step]:
    """The steps from line to line that the package takes."""
    taken: set[Step] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        last = 0

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            taken.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(data)
    finally:
        sys.settrace(before)
    return frozenset(taken)


def choose(function: Callable[[bytes], None], kept: Iterable[Path], found: Iterable[Path]) -> list[Path]:
    """Those inputs that take the most steps between them, few and small; the ones kept come first."""
    chosen: list[Path] = []
    taken: set[Step] = set()
    size = 0
    candidates = {path: steps(function, path.read_bytes()) for path in [*kept, *found]}
    preferred = set(kept)
    while candidates and len(chosen) < MOST_FILES:
        best = max(
            candidates,
            key=lambda path: (len(candidates[path] - taken), path in preferred, -path.stat().st_size),
        )
        new = candidates.pop(best) - taken
        if not new:
            break
        if size + best.stat().st_size <= _MOST_BYTES:
            size += best.stat().st_size
            taken |= new
            chosen.append(best)
    return chosen
