"""The `timeout` request extension, the pool's default for it, and the cancel scopes that apply it.

Theory of operation. A timeout limits the waiting for the network, never the user's code: no trace handler and
no body iterator runs inside a timed scope. So a slow handler is not taken for a slow server, and a
`trio.TooSlowError` or a cancellation in user code is not taken for a timeout of this library. A timed scope
surrounds one operation, and only the scope's own `cancelled_caught` is turned into a `TimeoutException`.

`read` and `write` limit each single operation (`timed`). `connect` and `pool` limit a sum of operations, with
user code in between, so these are spent from a `TimeBudget`.

Without a timeout no cancel scope is made.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import trio

from ._exceptions import (
    ConnectTimeout,
    ExchangeError,
    PoolTimeout,
    ReadTimeout,
    TimeoutException,
    WriteTimeout,
)
from ._models import to_extensions

T = TypeVar("T")

#: The type of a `timeout` argument: a mapping of names to seconds, or seconds for each of the four names.
TimeoutTypes: TypeAlias = Mapping[str, float | None] | float


class Timeouts(NamedTuple):
    """The four timeouts of a request, in seconds. None stands for no limit."""

    connect: float | None = None
    read: float | None = None
    write: float | None = None
    pool: float | None = None


NO_TIMEOUTS = Timeouts()


def with_timeout(
    extensions: Mapping[str, Any] | None, timeout: TimeoutTypes | None
) -> Mapping[str, Any] | None:
    """Add a `timeout` argument to extensions.

    Args:
        extensions: The extensions.
        timeout: The argument. A number stands for each of the four names. None adds nothing.

    Returns:
        The extensions as given, or a copy with `timeout`. The contents of a mapping are not checked here, but
        by `parse_timeouts`.

    Raises:
        TypeError: The argument is neither a mapping nor a number. Or the extensions have a `timeout` too, or
            are not a mapping.
        ValueError: The number is negative, not a number (NaN), or too large for a float.
    """
    if timeout is None:
        return extensions
    copy = to_extensions(extensions)
    if copy.get("timeout") is not None:
        raise TypeError("give either the timeout argument or the timeout extension, not both")
    if not isinstance(timeout, Mapping):
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(
                f"timeout must be a mapping of names to seconds, a number of seconds or None, not {timeout!r}"
            )
        check_seconds("timeout", timeout)
        timeout = dict.fromkeys(Timeouts._fields, timeout)
    copy["timeout"] = timeout
    return copy


def parse_timeouts(extensions: Mapping[str, Any], defaults: Timeouts = NO_TIMEOUTS) -> Timeouts:
    """Read and check the `timeout` extension.

    Args:
        extensions: The request's extensions.
        defaults: The timeouts for names that are missing in the extension.

    Raises:
        TypeError: The extension is not a mapping, or a value is neither a number nor None.
        ValueError: A key is unknown, or a value is negative, not a number (NaN), or too large for a float.
    """
    given = extensions.get("timeout")
    if given is None:
        return defaults
    if not isinstance(given, Mapping):
        raise TypeError(f"the timeout extension must be a mapping of names to seconds, not {given!r}")
    for name, seconds in given.items():
        if name not in Timeouts._fields:
            expected = ", ".join(Timeouts._fields)
            raise ValueError(f"unknown timeout {name!r}, expected one of {expected}")
        # Most values are floats, and need no closer look. NaN is not at least zero.
        if not (type(seconds) is float and seconds >= 0):
            check_seconds(f"the {name} timeout", seconds)
    return Timeouts(
        given.get("connect", defaults.connect),
        given.get("read", defaults.read),
        given.get("write", defaults.write),
        given.get("pool", defaults.pool),
    )


def check_seconds(name: str, seconds: object) -> None:
    """Check that `seconds` is None or a non-negative number.

    Args:
        name: The name of the number, for the error message.
        seconds: The value to check.

    Raises:
        TypeError: The value is not a number.
        ValueError: The value is negative, not a number (NaN), or too large for a float.
    """
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or None, not {seconds!r}")
    try:
        is_nan = math.isnan(seconds)
    except OverflowError:
        # The message leaves out the number: Python refuses to convert more than 4300 digits.
        raise ValueError(f"{name} must be a number of seconds that a float can hold") from None
    if is_nan or seconds < 0:
        raise ValueError(f"{name} must be zero or more seconds, not {seconds!r}")


async def timed(
    seconds: float | None,
    error: type[TimeoutException],
    operation: Callable[..., Awaitable[T]],
    *args: Any,
) -> T:
    """Await `operation(*args)` for at most `seconds`.

    Args:
        seconds: The limit, None for no limit.
        error: The exception to raise when the time is up.
        operation: The asynchronous function to call.
        args: Its arguments.

    Raises:
        TimeoutException: The time is up. It is an instance of `error`.
    """
    if seconds is None:
        return await operation(*args)
    with trio.move_on_after(seconds):
        return await operation(*args)
    raise error(f"{_WAITED_FOR[error]} within {seconds:g} seconds")


_WAITED_FOR: dict[type[TimeoutException], str] = {
    ConnectTimeout: "the connection was not established",
    ReadTimeout: "the server sent nothing",
    WriteTimeout: "the server accepted no data",
    PoolTimeout: "no connection became available",
}


class TimeBudget:
    """A limit on the total duration of several operations, without the time between them.

    Attributes:
        limit: Seconds for all operations together, None for no limit.
        spent_on: The present operation, as the error message shall describe it.
    """

    __slots__ = ("_error", "_failure", "_spent", "limit", "spent_on")

    def __init__(self, seconds: float | None, error: type[TimeoutException]) -> None:
        self.limit = seconds
        self.spent_on = ""
        # A weak reference, because the traceback of the error refers to the budget.
        self._failure: weakref.ref[ExchangeError] | None = None
        self._error = error
        self._spent = 0.0

    @property
    def remaining(self) -> float:
        """The remaining seconds, infinity if there is no limit."""
        return math.inf if self.limit is None else max(0.0, self.limit - self._spent)

    @property
    def failure(self) -> ExchangeError | None:
        """The last `ExchangeError` that an operation raised. Code between operations does not count."""
        return None if self._failure is None else self._failure()

    async def spend(self, operation: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Await `operation(*args)` for at most the remaining time.

        Raises:
            TimeoutException: The budget is used up.
        """
        try:
            return await self._spend(operation, *args)
        except ExchangeError as exc:
            self._failure = weakref.ref(exc)
            raise

    async def _spend(self, operation: Callable[..., Awaitable[T]], *args: Any) -> T:
        if self.limit is None:
            return await operation(*args)
        started = trio.current_time()
        try:
            with trio.move_on_after(self.remaining):
                return await operation(*args)
        finally:
            self._spent += trio.current_time() - started
        at_last = f", at last {self.spent_on}" if self.spent_on else ""
        raise self._error(f"{_WAITED_FOR[self._error]} within {self.limit:g} seconds{at_last}")
