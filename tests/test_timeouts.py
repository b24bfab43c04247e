from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType
from typing import Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints

import trio_exchange
from tests.harness.networks import Network
from tests.harness.peers import mute
from tests.harness.servers import serve_tcp
from trio_exchange import (
    ConnectionPool,
    ConnectTimeout,
    PoolTimeout,
    ReadTimeout,
    Request,
    Response,
    TimeoutException,
    WriteTimeout,
)
from trio_exchange._timeouts import TimeBudget, Timeouts, check_seconds, parse_timeouts, timed, with_timeout

URL = "http://example.com/"

# -- The extension.


@pytest.mark.parametrize("extensions", [{}, {"timeout": None}, {"timeout": {}}])
def test_no_timeout_is_no_limit(extensions: dict[str, Any]) -> None:
    assert parse_timeouts(extensions) == Timeouts(None, None, None, None)


@pytest.mark.parametrize("mapping", [dict, MappingProxyType])
def test_all_four_timeouts(mapping: Any) -> None:
    given = mapping({"connect": 1, "read": 2.5, "write": math.inf, "pool": 0})
    assert parse_timeouts({"timeout": given}) == Timeouts(connect=1, read=2.5, write=math.inf, pool=0)


def test_a_timeout_left_out_or_none_is_no_limit() -> None:
    assert parse_timeouts({"timeout": {"read": None, "write": 3}}) == Timeouts(write=3)


@pytest.mark.parametrize("given", [5, 5.0, "5", [("read", 5)], (1, 2, 3, 4), True])
def test_the_extension_must_be_a_mapping(given: object) -> None:
    with pytest.raises(TypeError, match="timeout extension must be a mapping"):
        parse_timeouts({"timeout": given})


@pytest.mark.parametrize("key", ["total", "Read", "", b"read", 1, None])
def test_an_unknown_key_is_named(key: object) -> None:
    with pytest.raises(ValueError, match="unknown timeout") as info:
        parse_timeouts({"timeout": {"read": 1, key: 1}})
    assert repr(key) in str(info.value)
    assert "connect, read, write, pool" in str(info.value)


@pytest.mark.parametrize("name", Timeouts._fields)
@pytest.mark.parametrize("seconds", [-1, -0.001, -math.inf, math.nan])
def test_a_negative_timeout_or_nan_is_named(name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"the {name} timeout must be zero or more"):
        parse_timeouts({"timeout": {name: seconds}})


@pytest.mark.parametrize("name", Timeouts._fields)
@pytest.mark.parametrize("seconds", [True, False, "1", b"1", 1j, [1]])
def test_a_timeout_that_is_no_number_is_named(name: str, seconds: object) -> None:
    with pytest.raises(TypeError, match=f"the {name} timeout must be a number"):
        parse_timeouts({"timeout": {name: seconds}})


# Python refuses to show the last two: they have too many digits.
@pytest.mark.parametrize("seconds", [10**400, -(10**400), 10**5000, -(10**5000)], ids=lambda _: "")
def test_seconds_too_large_for_a_float_are_named(seconds: int) -> None:
    for name in Timeouts._fields:
        with pytest.raises(ValueError, match=f"the {name} timeout must be a number of seconds that a float"):
            parse_timeouts({"timeout": {name: seconds}})
    with pytest.raises(ValueError, match="keepalive_expiry must be"):
        ConnectionPool(keepalive_expiry=seconds)
    with pytest.raises(ValueError, match="expect_continue_timeout must be"):
        ConnectionPool(expect_continue_timeout=seconds)
    with pytest.raises(ValueError, match="timeout must be a number of seconds that"):
        ConnectionPool(timeout=seconds)


@pytest.mark.parametrize("seconds", [None, 0, 0.0, 1, math.inf, 10**300])
def test_seconds_that_are_fine(seconds: object) -> None:
    check_seconds("x", seconds)


async def test_a_bad_timeout_is_found_before_anybody_is_dialled(network: Network) -> None:
    async with network.pool() as pool:
        with pytest.raises(ValueError, match="read timeout"):
            await pool.request("GET", "http://example.com/", extensions={"timeout": {"read": -1}})
    assert network.dialled == []


# -- The pool's default, and the argument.


def test_a_number_stands_for_all_four() -> None:
    given = with_timeout(None, 2.5)
    assert given is not None
    assert parse_timeouts(given) == Timeouts(2.5, 2.5, 2.5, 2.5)


def test_the_argument_is_added_to_the_extensions() -> None:
    extensions = {"trace": None, "timeout": None}
    assert with_timeout(extensions, {"read": 1}) == {"trace": None, "timeout": {"read": 1}}
    assert extensions == {"trace": None, "timeout": None}
    assert with_timeout(extensions, None) is extensions


@pytest.mark.parametrize("extensions", [{}, {"timeout": None}])
def test_a_request_without_timeouts_has_the_pools_as_they_are(extensions: dict[str, Any]) -> None:
    defaults = Timeouts(1, 2, 3, 4)
    assert parse_timeouts(extensions, defaults) is defaults


def test_a_request_replaces_the_pools_timeouts_name_by_name() -> None:
    defaults = Timeouts(1, 2, 3, 4)
    assert parse_timeouts({"timeout": {"read": 5, "write": None}}, defaults) == Timeouts(1, 5, None, 4)
    assert parse_timeouts({"timeout": {}}, defaults) == defaults


def uses(pool: ConnectionPool, **options: Any) -> list[Callable[[], Awaitable[object]]]:
    """All that takes a timeout, of a pool and of the module."""

    async def enter(stream: Callable[..., AbstractAsyncContextManager[Response]]) -> None:
        async with stream("GET", URL, **options):
            pytest.fail("it must not get here")

    return [
        lambda: pool.request("GET", URL, **options),
        lambda: enter(pool.stream),
        lambda: pool.open_tcp_stream("example.com", 80, **options),
        lambda: trio_exchange.request("GET", URL, **options),
        lambda: enter(trio_exchange.stream),
    ]


@pytest.mark.parametrize(
    ("timeout", "error", "message"),
    [
        ({"total": 1}, ValueError, "unknown timeout 'total', expected one of connect, read, write, pool"),
        ({"read": -1}, ValueError, "the read timeout must be zero or more seconds, not -1"),
        ({"read": "1"}, TypeError, "the read timeout must be a number of seconds or None, not '1'"),
        (-1, ValueError, "timeout must be zero or more seconds, not -1"),
        (math.nan, ValueError, "timeout must be zero or more seconds, not nan"),
        (
            "5",
            TypeError,
            "timeout must be a mapping of names to seconds, a number of seconds or None, not '5'",
        ),
        (True, TypeError, "timeout must be a mapping of names to seconds, a number .*, not True"),
        ((1, 2, 3, 4), TypeError, "timeout must be a mapping of names to seconds, a number"),
    ],
)
async def test_bad_timeouts_of_a_pool_and_in_arguments(
    network: Network, timeout: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ConnectionPool(timeout=timeout)
    async with network.pool() as pool:
        for use in uses(pool, timeout=timeout):
            with pytest.raises(error, match=message):
                await use()
    assert network.dialled == []


@pytest.mark.parametrize("timeout", [1, {"read": 1}])
async def test_a_timeout_is_given_in_one_place(network: Network, timeout: Any) -> None:
    one = "give either the timeout argument or the timeout extension, not both"
    async with network.pool() as pool:
        for use in uses(pool, extensions={"timeout": {"read": 1}}, timeout=timeout):
            with pytest.raises(TypeError, match=one):
                await use()
        # A stream says so before it is entered.
        for stream in (pool.stream, trio_exchange.stream):
            with pytest.raises(TypeError, match=one):
                stream("GET", URL, extensions={"timeout": {"read": 1}}, timeout=timeout)
    assert network.dialled == []


async def time_of(error: type[TimeoutException], function: Any, *args: Any, **kwargs: Any) -> float:
    """The seconds until a call raises a timeout."""
    started = trio.current_time()
    with pytest.raises(error):
        await function(*args, **kwargs)
    return trio.current_time() - started


@pytest.mark.parametrize("timeout", [7, {"read": 7}])
async def test_the_pools_timeouts_hold_for_each_request(
    network: Network, autojump_clock: MockClock, timeout: Any
) -> None:
    async def open_stream(**options: Any) -> None:
        async with pool.stream("GET", URL, **options):
            pytest.fail("it must not get here")

    async with network.pool(mute, timeout=timeout) as pool:
        assert await time_of(ReadTimeout, pool.request, "GET", URL) == 7
        assert await time_of(ReadTimeout, pool.request, "GET", URL, timeout={"write": 1}) == 7
        assert await time_of(ReadTimeout, pool.request, "GET", URL, timeout={"read": 2}) == 2
        assert await time_of(ReadTimeout, pool.request, "GET", URL, timeout=3) == 3
        assert await time_of(ReadTimeout, open_stream) == 7
        assert await time_of(ReadTimeout, open_stream, timeout=4) == 4
        request = Request("GET", URL, extensions={"timeout": {"read": 5}})
        assert await time_of(ReadTimeout, pool.handle_async_request, request) == 5
        assert await time_of(ReadTimeout, pool.handle_async_request, Request("GET", URL)) == 7
        with trio.move_on_after(1000) as scope:
            await pool.request("GET", URL, timeout={"read": None})
        assert scope.cancelled_caught


async def test_the_pools_timeouts_cover_connecting_and_waiting(
    network: Network, autojump_clock: MockClock
) -> None:
    timeout = {"connect": 7, "pool": 2}
    async with network.pool(max_connections=1, timeout=timeout) as pool:
        stream = await pool.open_tcp_stream("example.com", 80)
        assert await time_of(PoolTimeout, pool.request, "GET", URL) == 2
        assert await time_of(PoolTimeout, pool.open_tcp_stream, "example.com", 80, timeout={"pool": 1}) == 1
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        network.gate = trio.Event()
        assert await time_of(ConnectTimeout, pool.open_tcp_stream, "example.com", 80) == 7
        assert await time_of(ConnectTimeout, pool.open_tcp_stream, "example.com", 80, timeout=3) == 3
        assert await time_of(ConnectTimeout, pool.request, "GET", URL) == 7


async def test_the_functions_of_the_module_take_a_timeout(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, mute)
    with pytest.raises(ReadTimeout, match=r"within 0\.01 seconds"):
        await trio_exchange.request("GET", server.url, timeout={"read": 0.01})
    with pytest.raises(ReadTimeout, match=r"within 0\.02 seconds"):
        async with trio_exchange.stream("GET", server.url, timeout={"read": 0.02}):
            pytest.fail("it must not get here")


# -- One operation.


async def sleep_and_return(seconds: float, value: str) -> str:
    await trio.sleep(seconds)
    return value


async def at_once() -> str:
    return "done"


async def slow() -> None:
    with trio.fail_after(1):
        await trio.sleep_forever()


async def test_timed_returns_what_the_operation_returns(autojump_clock: MockClock) -> None:
    assert await timed(2, ReadTimeout, sleep_and_return, 1, "done") == "done"
    assert await timed(None, ReadTimeout, sleep_and_return, 1e6, "done") == "done"


@pytest.mark.parametrize("error", [ConnectTimeout, ReadTimeout, WriteTimeout, PoolTimeout])
async def test_timed_raises_its_own_error_at_the_limit(error: Any, autojump_clock: MockClock) -> None:
    with pytest.raises(error, match=r"within 1\.5 seconds"):
        await timed(1.5, error, trio.sleep, 1000)
    assert trio.current_time() == 1.5


async def test_a_timeout_of_zero_is_an_attempt_that_may_not_wait(autojump_clock: MockClock) -> None:
    assert await timed(0, ReadTimeout, at_once) == "done"
    with pytest.raises(ReadTimeout, match="within 0 seconds"):
        await timed(0, ReadTimeout, trio.sleep, 1)


async def test_timed_lets_a_users_too_slow_error_pass(autojump_clock: MockClock) -> None:
    with pytest.raises(trio.TooSlowError):
        await timed(10, ReadTimeout, slow)
    assert trio.current_time() == 1


async def test_timed_lets_an_outer_cancellation_pass(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as outer:
        await timed(10, ReadTimeout, trio.sleep_forever)
    assert outer.cancelled_caught
    assert trio.current_time() == 1


async def test_an_outer_cancellation_at_the_very_limit_is_the_outer_ones(autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as outer:
        await timed(1, ReadTimeout, trio.sleep_forever)
    assert outer.cancelled_caught


async def test_timed_lets_the_operations_own_error_pass(autojump_clock: MockClock) -> None:
    async def fail() -> None:
        raise ReadTimeout("its own")

    with pytest.raises(ReadTimeout, match="its own"):
        await timed(10, ReadTimeout, fail)


# -- A sum of operations.


async def test_a_budget_is_spent_by_its_operations_alone(autojump_clock: MockClock) -> None:
    budget = TimeBudget(10, PoolTimeout)
    assert await budget.spend(sleep_and_return, 4, "a") == "a"
    await trio.sleep(1000)
    assert await budget.spend(sleep_and_return, 4, "b") == "b"
    with pytest.raises(PoolTimeout, match="within 10 seconds"):
        await budget.spend(trio.sleep, 4)
    assert trio.current_time() == 4 + 1000 + 4 + 2


async def test_an_overspent_budget_allows_what_does_not_wait(autojump_clock: MockClock) -> None:
    budget = TimeBudget(1, ConnectTimeout)

    async def overspend() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        return "late"

    assert await budget.spend(overspend) == "late"

    assert await budget.spend(at_once) == "done"
    with pytest.raises(ConnectTimeout):
        await budget.spend(trio.lowlevel.checkpoint)


async def test_a_failed_operation_is_paid_for_too(autojump_clock: MockClock) -> None:
    async def fail() -> None:
        await trio.sleep(9)
        raise KeyError("user")

    budget = TimeBudget(10, PoolTimeout)
    with pytest.raises(KeyError):
        await budget.spend(fail)
    with pytest.raises(PoolTimeout):
        await budget.spend(trio.sleep, 2)
    assert trio.current_time() == 10


async def test_a_budget_without_limit(autojump_clock: MockClock) -> None:
    budget = TimeBudget(None, PoolTimeout)
    for _ in range(3):
        assert await budget.spend(sleep_and_return, 1e6, "done") == "done"


async def test_a_budget_lets_outer_cancellation_and_too_slow_error_pass(autojump_clock: MockClock) -> None:
    budget = TimeBudget(10, PoolTimeout)
    with trio.move_on_after(1) as outer:
        await budget.spend(trio.sleep_forever)
    assert outer.cancelled_caught

    with pytest.raises(trio.TooSlowError):
        await budget.spend(slow)


@pytest.mark.parametrize("seconds", [None, 1])
async def test_neither_adds_nor_drops_checkpoints(seconds: float | None) -> None:
    with assert_checkpoints():
        await timed(seconds, ReadTimeout, trio.lowlevel.checkpoint)
    with trio.testing.assert_no_checkpoints():
        await timed(seconds, ReadTimeout, at_once)
