"""TODO _connect.attempt."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import trio

from .._exceptions import ConnectError, ConnectTimeout
from .._timeouts import TimeBudget
from .._trace import Span, Tracer, span
from .network_stream import transport_over
from .transport import Transport


@dataclass(frozen=True)
class Connection:
    """An established connection.

    Attributes:
        transport: The bottom.
        stream: What HTTP speaks on: the transport, or TLS on it.
    """

    transport: Transport
    stream: trio.abc.Stream


class Attempt:
    """One try to establish a connection.

    Args:
        budget: The time that its steps may take in all.
        tracer: Who is told of each.

    Attributes:
        budget: As given.
        tracer: As given.
    """

    def __init__(self, budget: TimeBudget, tracer: Tracer | None) -> None:
        self.budget = budget
        self.tracer = tracer
        self._opened: list[Transport] = []

    def step(self, what: str, name: str, info: dict[str, Any]) -> Span:
        """Make the trace point of a step, whose time the code inside spends from the budget.

        What that code opens has to have an owner before the block ends, since the handler that is told of
        the end may raise.

        Args:
            what: What the step does, for the message of a timeout.
            name: The trace point.
            info: What the `started` event tells, but for the timeout.
        """
        info["timeout"] = self.budget.limit
        self.budget.spent_on = what
        return span(self.tracer, name, info)

    def own(self, stream: trio.abc.Stream) -> Transport:
        """Make a transport of a stream, and see to its closing if the attempt fails."""
        transport = transport_over(stream)
        self._opened.append(transport)
        return transport

    async def give_up(self) -> None:
        """Close what was opened."""
        for transport in reversed(self._opened):
            await close_forcefully(transport)


async def close_forcefully(transport: Transport) -> None:
    """Close a connection that is of no use, whatever the closing says."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        await trio.aclose_forcefully(transport)


Establish: TypeAlias = Callable[[Attempt], Awaitable[Connection]]


async def establish_once(budget: TimeBudget, tracer: Tracer | None, establish: Establish) -> Connection:
    """Establish a connection, or leave nothing open.

    Args:
        budget: For the attempt.
        tracer: Who is told.
        establish: Does it.
    """
    attempt = Attempt(budget, tracer)
    try:
        return await establish(attempt)
    except BaseException:
        await attempt.give_up()
        raise


async def establish_persistently(
    retries: int, timeout: float | None, tracer: Tracer | None, establish: Establish
) -> Connection:
    """Establish a connection, trying again if it fails.

    Args:
        retries: How often to try again.
        timeout: Seconds for each attempt, None for no limit.
        tracer: Who is told.
        establish: Makes an attempt.

    Raises:
        ConnectError: The last attempt failed.
        ConnectTimeout: The last attempt took too long.
    """
    delays = backoff()
    attempt = 0
    while True:
        budget = TimeBudget(timeout, ConnectTimeout)
        try:
            return await establish_once(budget, tracer, establish)
        except (ConnectError, ConnectTimeout) as exc:
            # A trace handler may raise the like.
            if exc is not budget.failure or attempt >= retries:
                raise
            attempt += 1
            delay = next(delays)
            info = {"attempt": attempt, "delay": delay, "exception": exc}
        try:
            async with span(tracer, "connection.retry", info):
                await trio.sleep(delay)
        finally:
            # The exception's traceback leads to this frame.
            del info


def backoff() -> Iterator[float]:
    """The seconds to wait before each further attempt: 0, 0.5, 1, 2, 4 and so on."""
    yield 0.0
    delay = 0.5
    while True:
        yield delay
        delay *= 2
