"""One attempt to establish a connection: its time limit, its trace, and what to close when it fails.

Theory of operation. Establishing a connection takes several steps: dialling, a proxy's answer, one or more
TLS handshakes. They share an `Attempt`, which has the time budget for all of them, spent on the network and
not on trace handlers; the tracer; and every transport that a step has opened. `establish_once` closes these
transports when a step fails or is cancelled. After success the caller owns the connection.

All of this runs in the requesting task, so that its trace handlers are awaited inline and its cancel scopes
apply.
"""

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
class Established:
    """The streams of an established connection.

    Attributes:
        transport: The lowest stream that this connection uses; closing it closes the connection.
        stream: The stream that HTTP is spoken on: the transport, or TLS on top of it.
    """

    transport: Transport
    stream: trio.abc.Stream


class Attempt:
    """One attempt to establish a connection.

    Args:
        budget: The time limit for all steps together.
        tracer: Receives the trace events of each step; None for no tracing.

    Attributes:
        budget: As given.
        tracer: As given.
    """

    def __init__(self, budget: TimeBudget, tracer: Tracer | None) -> None:
        self.budget = budget
        self.tracer = tracer
        self._opened: list[Transport] = []

    def step(self, description: str, name: str, info: dict[str, Any]) -> Span:
        """Make the trace span of a step; the code inside spends its time from the budget.

        That code must hand over what it opens, by `own`, before the block ends: the trace handler that is
        called then may raise.

        Args:
            description: What the step does, for the message of a timeout, such as "connecting to host:80".
            name: The name of the trace event.
            info: The info of the event that starts the step; `timeout` is added to it.
        """
        info["timeout"] = self.budget.limit
        self.budget.spent_on = description
        return span(self.tracer, name, info)

    def own(self, stream: trio.abc.Stream) -> Transport:
        """Wrap a stream in a transport, which is closed if the attempt fails."""
        transport = transport_over(stream)
        self._opened.append(transport)
        return transport

    async def close_all(self) -> None:
        """Close every transport that the attempt owns, the last opened first."""
        for transport in reversed(self._opened):
            await close_forcefully(transport)


async def close_forcefully(transport: Transport) -> None:
    """Close a transport without waiting, and ignore errors of the network while doing so."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        await trio.aclose_forcefully(transport)


Establish: TypeAlias = Callable[[Attempt], Awaitable[Established]]


async def establish_once(budget: TimeBudget, tracer: Tracer | None, establish: Establish) -> Established:
    """Make one attempt to establish a connection; close everything it has opened if it fails.

    Args:
        budget: The time limit of the attempt.
        tracer: Receives the trace events; None for no tracing.
        establish: Makes the connection, within the attempt that it is given.
    """
    attempt = Attempt(budget, tracer)
    try:
        return await establish(attempt)
    except BaseException:
        await attempt.close_all()
        raise


async def establish_persistently(
    retries: int, timeout: float | None, tracer: Tracer | None, establish: Establish
) -> Established:
    """Establish a connection, with further attempts after failures.

    Args:
        retries: The number of further attempts.
        timeout: Seconds for each attempt; None for no limit.
        tracer: Receives the trace events; None for no tracing.
        establish: Makes the connection, within the attempt that it is given.

    Raises:
        ConnectError: The last attempt failed.
        ConnectTimeout: The last attempt took longer than `timeout`.
    """
    delays = backoff()
    attempt = 0
    while True:
        budget = TimeBudget(timeout, ConnectTimeout)
        try:
            return await establish_once(budget, tracer, establish)
        except (ConnectError, ConnectTimeout) as exc:
            # A trace handler may raise these too; its errors are not retried.
            if exc is not budget.failure or attempt >= retries:
                raise
            attempt += 1
            delay = next(delays)
            info = {"attempt": attempt, "delay": delay, "exception": exc}
        try:
            async with span(tracer, "connection.retry", info):
                await trio.sleep(delay)
        finally:
            # The exception's traceback refers to this frame: without this, a reference cycle.
            del info


def backoff() -> Iterator[float]:
    """Yield the seconds to wait before each further attempt: 0, 0.5, 1, 2, 4 and so on."""
    yield 0.0
    delay = 0.5
    while True:
        yield delay
        delay *= 2
