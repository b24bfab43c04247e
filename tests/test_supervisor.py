from __future__ import annotations

import contextvars

import pytest
import trio
import trio.testing

from trio_exchange import ConnectionNotAvailable
from trio_exchange._supervisor import Supervisor

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


async def crash_when_cancelled(error: Exception) -> None:
    """Crash beside a task that is cancelled properly."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        try:
            await trio.sleep_forever()
        finally:
            raise error


async def test_its_life() -> None:
    supervisor = Supervisor()
    assert supervisor.state == "new"
    with pytest.raises(RuntimeError, match="the pool was not entered"):
        supervisor.check_open()
    await supervisor.start(trio.sleep_forever, trio.sleep_forever)
    assert supervisor.state == "open"
    supervisor.check_open()
    with pytest.raises(RuntimeError, match="can be entered only once"):
        await supervisor.start()
    supervisor.stopping = True
    assert supervisor.state == "closed"
    with pytest.raises(ConnectionNotAvailable, match="the connection pool is closed"):
        supervisor.check_open()
    await supervisor.leave(None)


async def test_a_crash_comes_out_at_the_end_without_the_cancellations_beside_it() -> None:
    supervisor = Supervisor()
    await supervisor.start()
    crash = ValueError("crash")
    supervisor.start_soon(crash_when_cancelled, crash)
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(ValueError, match="crash") as info:
        await supervisor.leave(None)
    assert info.value is crash


async def test_the_first_crash_is_the_one_that_comes_out() -> None:
    async def crash(error: Exception) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    async def crash_in_a_group(*errors: Exception) -> None:
        await trio.lowlevel.checkpoint()
        raise ExceptionGroup("several", errors)

    supervisor = Supervisor()
    await supervisor.start()
    first = OSError("first")
    supervisor.start_soon(crash, first)
    await trio.testing.wait_all_tasks_blocked()
    supervisor.start_soon(crash, ValueError("second"))
    supervisor.start_soon(crash_in_a_group, ValueError("third"), ValueError("fourth"))
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(OSError, match="first") as info:
        await supervisor.leave(None)
    assert info.value is first


async def test_a_crash_does_not_replace_what_the_block_raised() -> None:
    supervisor = Supervisor()
    await supervisor.start()
    supervisor.start_soon(crash_when_cancelled, ValueError("crash"))
    await trio.testing.wait_all_tasks_blocked()
    await supervisor.leave(KeyError("the block's own"))


async def test_tasks_in_the_pools_context_and_in_the_callers() -> None:
    seen: list[str] = []

    async def look() -> None:
        await trio.lowlevel.checkpoint()
        seen.append(VARIABLE.get())

    supervisor = Supervisor()
    await supervisor.start()
    VARIABLE.set("the caller's")
    supervisor.start_in_pool_context(look)
    await trio.testing.wait_all_tasks_blocked()
    supervisor.start_soon(look)
    await trio.testing.wait_all_tasks_blocked()
    assert seen == ["unset", "the caller's"]
    await supervisor.leave(None)


async def test_cancelled_while_it_starts() -> None:
    supervisor = Supervisor()
    with trio.CancelScope() as scope:
        scope.cancel()
        await supervisor.start(trio.sleep_forever)
    assert scope.cancelled_caught
    assert supervisor.state == "closed"
