from __future__ import annotations

import contextvars
import logging

import pytest
import trio
import trio.testing

from trio_exchange import ConnectionNotAvailable
from trio_exchange._connections.nursery import PoolNursery, PoolState

VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


class Idler:
    """A service that has nothing to do, and keeps what it is told."""

    def __init__(self, *, slow: bool = False) -> None:
        self.calls: list[str] = []
        self._slow = slow

    async def run(self) -> None:
        self.calls.append("started")
        await trio.sleep_forever()

    def stop(self) -> None:
        self.calls.append("stop")

    async def wait_stopped(self) -> None:
        if self._slow:
            await trio.sleep(1)
        self.calls.append("stopped")


class Faulty(Idler):
    """A service that fails to stop."""

    async def wait_stopped(self) -> None:
        raise ValueError("faulty")


async def started() -> PoolNursery:
    pool_nursery = PoolNursery()
    await pool_nursery.start(Idler())
    return pool_nursery


def state_of(pool_nursery: PoolNursery) -> str:
    # Type checkers believe that what was asserted of a property goes on being so.
    return pool_nursery.state.value


async def crash_when_cancelled(error: Exception) -> None:
    """Crash beside a task that is cancelled properly."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        try:
            await trio.sleep_forever()
        finally:
            raise error


async def test_its_life() -> None:
    pool_nursery = PoolNursery()
    assert state_of(pool_nursery) == "new"
    with pytest.raises(RuntimeError, match="the pool was not entered"):
        pool_nursery.check_open()
    services = Idler(), Idler()
    await pool_nursery.start(*services)
    await trio.testing.wait_all_tasks_blocked()
    assert state_of(pool_nursery) == "open"
    pool_nursery.check_open()
    with pytest.raises(RuntimeError, match="can be entered only once; this one is open, use it as it is"):
        await pool_nursery.start()
    pool_nursery.stop()
    assert state_of(pool_nursery) == "closed"
    # The rest of the stopping is the nursery's own task's.
    assert [service.calls for service in services] == [["started", "stop"], ["started"]]
    with pytest.raises(ConnectionNotAvailable, match="the connection pool is closed"):
        pool_nursery.check_open()
    with pytest.raises(RuntimeError, match="can be entered only once; this one was closed, make another one"):
        await pool_nursery.start()
    await pool_nursery.stop_and_wait()
    assert services[0].calls == ["started", "stop", "stop", "stopped"]
    assert services[1].calls == ["started", "stop", "stopped"]


async def test_services_are_stopped_in_order(autojump_clock: trio.testing.MockClock) -> None:
    slow, last = Idler(slow=True), Idler()
    pool_nursery = PoolNursery()
    await pool_nursery.start(slow, last)
    pool_nursery.stop()
    await trio.sleep(0.5)
    assert "stop" not in last.calls
    await pool_nursery.stop_and_wait()
    assert "stop" in last.calls


async def test_a_crash_comes_out_at_the_end_without_the_cancellations_beside_it() -> None:
    pool_nursery = await started()
    crash = ValueError("crash")
    pool_nursery.start_soon(crash_when_cancelled, crash)
    await trio.testing.wait_all_tasks_blocked()
    await pool_nursery.stop_and_wait()
    assert pool_nursery.take_crash() is crash
    assert pool_nursery.take_crash() is None


async def test_cancelling_a_task_that_has_a_nursery_is_no_crash() -> None:
    async def two_tasks() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    pool_nursery = await started()
    pool_nursery.start_soon(two_tasks)
    await trio.testing.wait_all_tasks_blocked()
    await pool_nursery.stop_and_wait()
    assert pool_nursery.take_crash() is None


async def test_the_first_crash_is_the_one_that_comes_out(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(error: Exception) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    async def crash_in_a_group(*errors: Exception) -> None:
        await trio.lowlevel.checkpoint()
        raise ExceptionGroup("several", errors)

    pool_nursery = await started()
    first = OSError("first")
    pool_nursery.start_soon(crash, first)
    await trio.testing.wait_all_tasks_blocked()
    pool_nursery.start_soon(crash, ValueError("second"))
    pool_nursery.start_soon(crash_in_a_group, ValueError("third"), ValueError("fourth"))
    await trio.testing.wait_all_tasks_blocked()
    # Each is logged at once, since a pool may stay open for long.
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3
    assert "OSError: first" in caplog.text
    assert "ValueError: fourth" in caplog.text
    await pool_nursery.stop_and_wait()
    assert pool_nursery.take_crash() is first


async def test_a_service_that_fails_to_stop_is_a_crash_and_everything_ends() -> None:
    pool_nursery = PoolNursery()
    other = Idler()
    await pool_nursery.start(Faulty(), other)
    await pool_nursery.stop_and_wait()
    assert isinstance(pool_nursery.take_crash(), ValueError)
    assert other.calls == ["started", "stop", "stopped"]


async def test_tasks_in_the_pools_context_and_in_the_callers() -> None:
    seen: list[str] = []

    async def look() -> None:
        await trio.lowlevel.checkpoint()
        seen.append(VARIABLE.get())

    pool_nursery = await started()
    VARIABLE.set("the caller's")
    pool_nursery.start_in_pool_context(look)
    await trio.testing.wait_all_tasks_blocked()
    pool_nursery.start_soon(look)
    await trio.testing.wait_all_tasks_blocked()
    assert seen == ["unset", "the caller's"]
    await pool_nursery.stop_and_wait()


async def test_cancelled_while_it_starts() -> None:
    pool_nursery = PoolNursery()
    with trio.CancelScope() as scope:
        scope.cancel()
        await pool_nursery.start(Idler())
    assert scope.cancelled_caught
    assert state_of(pool_nursery) == "open"
    await pool_nursery.stop_and_wait()


async def test_stopped_while_it_starts() -> None:
    class StopAtOnce(trio.abc.Instrument):
        """Acts before the task that was spawned runs."""

        def task_spawned(self, _: trio.lowlevel.Task) -> None:
            states.append(pool_nursery.state)
            if states != [PoolState.STARTING]:
                return
            with pytest.raises(RuntimeError, match="not entered"):
                pool_nursery.check_open()
            pool_nursery.stop()

    states: list[PoolState] = []
    pool_nursery = PoolNursery()
    instrument = StopAtOnce()
    trio.lowlevel.add_instrument(instrument)
    try:
        await pool_nursery.start(Idler())
    finally:
        trio.lowlevel.remove_instrument(instrument)
    await pool_nursery.wait_ended()
    assert state_of(pool_nursery) == "closed"
