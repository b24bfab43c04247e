"""The corpus: what is kept of the inputs that a fuzzer has found."""

from __future__ import annotations

import re
import shutil
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


def is_found(path: Path) -> bool:
    """Whether a fuzzer has found an input, which libFuzzer names after its SHA-1; others were written."""
    return re.fullmatch("[0-9a-f]{40}", path.name) is not None


def renew(target: str, function: Callable[[bytes], None], work: Path) -> list[Path]:
    """Fill up what was written with the best of what was found before, and lies in `work`."""
    written = [path for path in inputs(target) if not is_found(path)]
    before = [path for path in inputs(target) if is_found(path)]
    chosen = choose(function, written, [*before, *sorted(path for path in work.iterdir() if is_found(path))])
    for path in set(before) - set(chosen):
        path.unlink()
    for path in set(chosen) - set(before):
        shutil.copy(path, CORPUS / target)
    return inputs(target)


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
    """Of the inputs found, the few small ones that take the most steps that those kept don't take."""
    taken: set[Step] = set()
    files = size = 0
    for path in kept:
        taken |= steps(function, path.read_bytes())
        files, size = files + 1, size + path.stat().st_size
    candidates = {path: steps(function, path.read_bytes()) for path in found}
    chosen: list[Path] = []
    while candidates and files + len(chosen) < MOST_FILES:
        best = max(candidates, key=lambda path: (len(candidates[path] - taken), -path.stat().st_size))
        new = candidates.pop(best) - taken
        if not new:
            break
        if size + best.stat().st_size <= _MOST_BYTES:
            size += best.stat().st_size
            taken |= new
            chosen.append(best)
    return chosen
