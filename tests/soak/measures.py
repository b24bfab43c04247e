"""What a process holds: descriptors, tasks, objects and memory."""

from __future__ import annotations

import ctypes
import enum
import gc
import itertools
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from trio_exchange._connect import tls_sessions

_STATM = Path("/proc/self/statm")
_malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
#: By how much memory may grow.
RSS_GROWTH = 0.10
RSS_SLACK = 8 * 1024 * 1024
#: How many objects of a type may be more than before.
OBJECTS_SLACK = 4
# Kept in a cache of limited size, which fills slowly.
_CACHED = "trio_exchange._urls.ParsedURL"


@dataclass(frozen=True)
class Measure:
    """What the process held at a moment.

    Attributes:
        descriptors: How many are open.
        tasks: By the names of their functions.
        objects: Those of trio_exchange that the garbage collector knows, by type, without those that a
            cache of TLS sessions keeps.
        rss: Resident memory in bytes.
    """

    descriptors: int
    tasks: Counter[str]
    objects: Counter[str]
    rss: int

    def __str__(self) -> str:
        return (
            f"{self.descriptors} descriptors, {self.tasks.total()} tasks, "
            f"{self.objects.total()} objects, {self.rss / 2**20:.1f} MiB"
        )


def take() -> Measure:
    """Measure, after collecting garbage."""
    gc.collect()
    if _malloc_trim is not None:
        # Else the most that was ever needed at once would be measured, which goes on growing for a while.
        _malloc_trim(0)
    return Measure(_descriptors(), _tasks(), _objects(), _rss())


def _descriptors() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder))
    return 0


def _tasks() -> Counter[str]:
    tasks: Counter[str] = Counter()
    root = trio.lowlevel.current_root_task()
    left = [] if root is None else [root]
    while left:
        task = left.pop()
        tasks[task.name] += 1
        for nursery in task.child_nurseries:
            left += nursery.child_tasks
    return tasks


def _objects() -> Counter[str]:
    objects = gc.get_objects()
    cached = _cached_sessions(objects)
    return Counter(
        f"{kind.__module__}.{kind.__qualname__}"
        for kind, each in zip(map(type, objects), objects, strict=True)
        if kind.__module__.startswith("trio_exchange")
        and id(each) not in cached
        # The members of enums come with their modules, of which pools import some.
        and not issubclass(kind, enum.Enum)
    )


def _cached_sessions(objects: list[Any]) -> set[int]:
    """The ids of what the caches of TLS sessions keep, up to the bound of each."""
    cached = set()
    for cache in objects:
        if type(cache) is tls_sessions.TLSSessions:
            for key, kept in itertools.islice(cache._kept.items(), tls_sessions._MOST_SESSIONS):
                cached |= {id(key), id(key.peer), id(kept)}
    return cached


def _rss() -> int:
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    # The highest so far, in KiB but for macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def growth(before: Measure, after: Measure, *, rss: bool = True) -> Iterable[str]:
    """What there is more of than there may be."""
    if after.descriptors > before.descriptors:
        yield f"{after.descriptors} descriptors are open, not {before.descriptors}"
    if more := after.tasks - before.tasks:
        yield f"there are more tasks: {dict(more)}"
    more = after.objects - before.objects
    if left := {name: count for name, count in more.items() if count > OBJECTS_SLACK and name != _CACHED}:
        yield f"there are more objects: {left}"
    limit = before.rss * (1 + RSS_GROWTH) + RSS_SLACK
    if rss and after.rss > limit:
        yield f"memory has grown from {before.rss / 2**20:.1f} to {after.rss / 2**20:.1f} MiB"
