"""What the public coroutines do before they begin, and to an error on its way out.

A new user meets this library in its errors. So a program that runs without Trio is told so, in place of
whatever Trio function happens to be called first, and the traceback of an `ExchangeError` ends where the
user's code called this library: the frames below say nothing that the message doesn't. Of a callback's
exception nothing is taken away but the frames of this library above the callback, and of exceptions that are
no `ExchangeError` not even those.
"""

from __future__ import annotations

import sys
from types import TracebackType

import trio

from ._exceptions import ExchangeError


def check_runs_under_trio() -> None:
    """Check that this is called in a Trio task.

    Raises:
        RuntimeError: It is not. The message names asyncio if that is running.
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
    # Imported by those who run it.
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def drop_own_frames(error: ExchangeError) -> None:
    """Let the tracebacks of an error and of its cause begin below this library's own outermost frames.

    Called in an `except` clause that ends with a bare `raise`, which adds no frame.

    Args:
        error: The error that is about to leave this library.
    """
    error.__traceback__ = _without_own_frames(error.__traceback__)
    if error.__cause__ is not None:
        error.__cause__.__traceback__ = _without_own_frames(error.__cause__.__traceback__)


def _without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and _is_own(traceback):
        traceback = traceback.tb_next
    return traceback


def _is_own(traceback: TracebackType) -> bool:
    module = str(traceback.tb_frame.f_globals.get("__name__"))
    return module.startswith("trio_exchange.")
