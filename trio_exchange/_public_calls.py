"""Two things that the public coroutines do: check that Trio runs, and shorten tracebacks.

A program that runs without Trio gets an error that says so, instead of an error from whichever Trio function
is called first. The traceback of an `ExchangeError` ends where the user's code called this library, because
the frames below add nothing to the message. The traceback of a callback's `ExchangeError` keeps the frames of
the callback, and only loses this library's frames above it. Tracebacks of other exceptions are not changed.
"""

from __future__ import annotations

import sys
from types import TracebackType

import trio

from ._exceptions import ExchangeError


def check_runs_under_trio() -> None:
    """Check that the caller runs in a Trio task.

    Raises:
        RuntimeError: The caller does not. The message names asyncio if asyncio is running.
    """
    if trio.lowlevel.in_trio_task():
        return
    if _asyncio_is_running():
        raise RuntimeError(
            "trio_exchange needs trio.run: this code runs under asyncio; "
            "start the program by trio.run(main) instead of asyncio.run(main())"
        )
    raise RuntimeError("trio_exchange needs trio.run: this code runs outside of it; use trio.run(main)")


def _asyncio_is_running() -> bool:
    # A program that runs asyncio has imported it.
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def drop_library_frames(error: ExchangeError) -> None:
    """Remove this library's outermost frames from the tracebacks of an error and of its cause.

    Call it in an `except` clause that ends with a bare `raise`, which adds no frame.

    Args:
        error: The error that is about to leave this library.
    """
    error.__traceback__ = _without_library_frames(error.__traceback__)
    if error.__cause__ is not None:
        error.__cause__.__traceback__ = _without_library_frames(error.__cause__.__traceback__)


def _without_library_frames(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and _is_of_library(traceback):
        traceback = traceback.tb_next
    return traceback


def _is_of_library(traceback: TracebackType) -> bool:
    module = str(traceback.tb_frame.f_globals.get("__name__"))
    return module.startswith("trio_exchange.")
