from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.harness.checks import assert_unharmed
from tests.harness.networks import Network
from tests.harness.peers import stall
from tests.harness.traces import Events, both_ends
from trio_exchange import ConnectError, ConnectionPool, ReadTimeout, RemoteProtocolError, WriteError
from trio_exchange._exceptions import ExchangeFailed
from trio_exchange._trace import Tracer, call_async, log_enabled, span, tracer_for
from trio_exchange.testing import MemoryConnector, ScriptedPeer

LOGGERS = ("trio_exchange", "trio_exchange.connection", "trio_exchange.http11")


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


async def return_seven() -> int:
    return 7


# -- Who looks.


def test_without_handler_and_log_there_is_no_tracer() -> None:
    assert not log_enabled()
    assert tracer_for({}) is None
    assert tracer_for({"trace": None}) is None


@pytest.mark.parametrize("name", LOGGERS)
def test_any_logger_at_debug_makes_a_tracer(name: str) -> None:
    logging.getLogger(name).setLevel(logging.DEBUG)
    assert log_enabled()
    tracer = tracer_for({})
    assert tracer is not None
    assert tracer.without_log() is None


def test_info_is_not_enough() -> None:
    logging.getLogger("trio_exchange").setLevel(logging.INFO)
    assert tracer_for({}) is None


async def test_without_log_the_handler_remains(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    events = Events()
    tracer = Tracer(events, log=True).without_log()
    assert tracer is not None
    await tracer.report("connection.close.started", {})
    assert events.names == ["connection.close.started"]
    assert caplog.records == []


@pytest.mark.parametrize("handler", ["print", 0, [], {"a": 1}])
def test_a_handler_that_is_not_callable(handler: object) -> None:
    with pytest.raises(TypeError, match="the trace extension must be an async function"):
        tracer_for({"trace": handler})


# -- One trace point.


async def test_a_trace_point_that_succeeds() -> None:
    events = Events()
    async with span(Tracer(events, log=False), "http11.x", {"a": 1}) as operation:
        operation.result = await return_seven()
    assert events.seen == [("http11.x.started", {"a": 1}), ("http11.x.complete", {"return_value": 7})]


async def test_a_trace_point_that_nobody_looks_at() -> None:
    operation = span(None, "http11.x", {})
    assert span(None, "http11.y", {}) is operation
    await operation.start()
    async with operation as inside:
        inside.result = await return_seven()
    # It is shared, and must not keep the result alive.
    assert inside.result is None
    await operation.complete()
    await operation.fail(KeyError("user"))


async def test_an_error_is_reported_in_place_of_what_a_connection_wraps_it_in() -> None:
    events = Events()
    failed = ExchangeFailed(WriteError("network"), unsent=True)
    with pytest.raises(ExchangeFailed):
        async with span(Tracer(events, log=False), "http11.x", {}):
            raise failed
    assert events.seen[1:] == [("http11.x.failed", {"exception": failed.error})]


async def test_a_trace_point_that_fails() -> None:
    error = KeyError("user")

    async def fail() -> None:
        raise error

    events = Events()
    with pytest.raises(KeyError) as info:
        async with span(Tracer(events, log=False), "http11.x", {}):
            await fail()
    assert info.value is error
    assert events.seen == [("http11.x.started", {}), ("http11.x.failed", {"exception": error})]


async def test_a_handler_that_is_cancelled_runs_to_its_first_checkpoint(autojump_clock: MockClock) -> None:
    seen = []

    async def handler(event: str, info: dict[str, Any]) -> None:
        seen.append(event)
        await trio.lowlevel.checkpoint()
        seen.append("after")

    with trio.move_on_after(1):
        async with span(Tracer(handler, log=False), "http11.x", {}):
            await trio.sleep_forever()
    assert seen == ["http11.x.started", "after", "http11.x.failed"]


@pytest.mark.parametrize("failing", ["started", "complete"])
async def test_what_a_handler_raises_ends_the_operation(failing: str) -> None:
    calls = []

    async def operation() -> None:
        calls.append("operation")

    async def handler(event: str, info: dict[str, Any]) -> None:
        if event.endswith(failing):
            raise LookupError("handler")

    with pytest.raises(LookupError, match="handler"):
        async with span(Tracer(handler, log=False), "http11.x", {}):
            await operation()
    assert calls == ([] if failing == "started" else ["operation"])


async def test_a_handler_that_raises_about_a_failure_keeps_it_as_context() -> None:
    async def handler(event: str, info: dict[str, Any]) -> None:
        if event.endswith("failed"):
            raise LookupError("handler")

    async def fail() -> None:
        raise WriteError("network")

    with pytest.raises(LookupError, match="handler") as info:
        async with span(Tracer(handler, log=False), "http11.x", {}):
            await fail()
    assert isinstance(info.value.__context__, WriteError)


# -- Asynchronous or not.


@pytest.mark.parametrize("function", [print, dict, lambda *args: None])
async def test_a_function_that_is_not_async(function: Any) -> None:
    with pytest.raises(TypeError, match="the so and so must be an async function"):
        await call_async("the so and so", function)


async def test_whatever_gives_an_awaitable_is_async() -> None:
    events = Events()
    await call_async("x", events, "a", {})
    await call_async("x", functools.partial(events, "b"), {})
    await call_async("x", lambda event, info: events(event, info), "c", {})
    assert events.names == ["a", "b", "c"]


async def test_a_handler_that_is_not_async_ends_the_request(network: Network) -> None:
    async with network.pool() as pool:
        with pytest.raises(TypeError, match="the trace extension must be an async function"):
            await pool.request("GET", "http://example.com/", extensions={"trace": lambda event, info: None})
        assert_unharmed(pool)
    assert network.dialled == []


# -- A request's trace.


async def get(pool: ConnectionPool, handler: Any = None, **more: Any) -> Any:
    return await pool.request("GET", "http://example.com/", extensions={"trace": handler, **more})


EXCHANGE = both_ends(
    "http11.send_request_headers",
    "http11.send_request_body",
    "http11.receive_response_headers",
    "http11.receive_response_body",
    "http11.response_closed",
)


async def test_the_events_of_a_request(network: Network) -> None:
    events = Events()
    async with network.pool() as pool:
        await get(pool, events)
        assert events.names == both_ends("connection.connect_tcp") + EXCHANGE
        again = Events()
        await get(pool, again)
        assert again.names == EXCHANGE
    info = events.info("connection.connect_tcp.started")
    assert info == {
        "host": "example.com",
        "port": 80,
        "local_address": None,
        "timeout": None,
        "socket_options": None,
    }
    started = events.info("http11.send_request_headers.started")
    assert repr(started) == "{'request': <Request [GET 'http://example.com/']>}"
    assert events.info("http11.receive_response_headers.complete") == {
        "return_value": (b"HTTP/1.1", 200, b"OK", [(b"Content-Length", b"0")])
    }
    for name in ("send_request_headers", "send_request_body", "receive_response_body", "response_closed"):
        assert events.info(f"http11.{name}.complete") == {"return_value": None}


async def test_the_timeout_is_in_the_info_of_connecting(network: Network) -> None:
    events = Events()
    async with network.pool() as pool:
        await get(pool, events, timeout={"connect": 7})
    assert events.info("connection.connect_tcp.started")["timeout"] == 7


async def test_a_failure_shows_its_exception_and_the_closing(network: Network) -> None:
    async def hang_up(peer: ScriptedPeer) -> None:
        await peer.receive_request()

    events = Events()
    async with network.pool(hang_up) as pool:
        with pytest.raises(RemoteProtocolError) as raised:
            await get(pool, events)
    assert events.info("http11.receive_response_headers.failed") == {"exception": raised.value}
    assert events.names[-2:] == both_ends("connection.close")


async def test_a_failed_dialling_shows_its_exception(network: Network) -> None:
    events = Events()
    network.failures.append(OSError("refused"))
    async with network.pool() as pool:
        with pytest.raises(ConnectError) as raised:
            await get(pool, events)
    assert events.names == ["connection.connect_tcp.started", "connection.connect_tcp.failed"]
    assert events.info("connection.connect_tcp.failed") == {"exception": raised.value}


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_a_trace_handlers_network_error_does_not_repeat_the_request(
    network: Network, method: str
) -> None:
    seen = []

    async def serve(peer: ScriptedPeer) -> None:
        async for request in peer:
            if request.target == b"/dies":
                return
            seen.append(request.method)
            await peer.send_response()

    async def handler(event: str, info: dict[str, Any]) -> None:
        if event == "http11.receive_response_headers.started":
            await pool.request("GET", "http://other.example/dies")

    async with network.pool(serve) as pool:
        await pool.request("GET", "http://origin.example/")
        with pytest.raises(RemoteProtocolError, match="without sending a response"):
            await pool.request(
                method, "http://origin.example/", content=b"once", extensions={"trace": handler}
            )
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
    assert seen.count(method.encode()) <= 1


ALL_EVENTS = both_ends("connection.connect_tcp") + EXCHANGE


@pytest.mark.parametrize("event", ALL_EVENTS)
async def test_a_handler_that_raises_ends_the_request_and_leaves_nothing(
    network: Network, event: str
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == event:
            raise LookupError(name)

    async with network.pool() as pool:
        with pytest.raises(LookupError, match=event):
            await get(pool, handler)
        await trio.testing.wait_all_tasks_blocked()
        numbers = pool.statistics()
        assert numbers.open == numbers.idle
        assert numbers.connecting == 0
        assert (await get(pool)).status == 200


@pytest.mark.parametrize("event", ALL_EVENTS)
async def test_a_slow_handler_uses_up_no_timeout(
    network: Network, autojump_clock: MockClock, event: str
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == event:
            await trio.sleep(100)

    timeout = {"connect": 1, "read": 1, "write": 1, "pool": 1}
    async with network.pool() as pool:
        assert (await get(pool, handler, timeout=timeout)).status == 200


async def test_a_handlers_too_slow_error_is_its_own(network: Network, autojump_clock: MockClock) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        with trio.fail_after(1):
            await trio.sleep_forever()

    async with network.pool() as pool:
        with pytest.raises(trio.TooSlowError):
            await get(pool, handler, timeout={"connect": 5, "read": 5, "write": 5, "pool": 5})


async def test_a_handler_runs_in_the_requesters_task(network: Network) -> None:
    tasks = set()

    async def handler(name: str, info: dict[str, Any]) -> None:
        tasks.add(trio.lowlevel.current_task())

    async with network.pool() as pool:
        await pool.request(
            "POST",
            "http://example.com/",
            content=[b"a" * 100_000, b"b"],
            extensions={"trace": handler},
        )
    assert tasks == {trio.lowlevel.current_task()}


async def test_a_read_timeout_is_shown_as_failed(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    events = Events()
    async with trio.open_nursery() as peers:
        async with ConnectionPool(connector=MemoryConnector(peers, stall)) as pool:
            with pytest.raises(ReadTimeout) as raised:
                await get(pool, events, timeout={"read": 3})
        peers.cancel_scope.cancel()
    assert events.info("http11.receive_response_headers.failed") == {"exception": raised.value}


# -- The log.


async def test_the_log_shows_the_same_events(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    events = Events()
    async with network.pool() as pool:
        await get(pool, events)
    logged = [record.getMessage().partition(" ")[0] for record in caplog.records]
    assert logged == events.names + both_ends("connection.close")
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert {record.name for record in caplog.records} == set(LOGGERS[1:])
    for record in caplog.records:
        assert record.name == "trio_exchange." + record.getMessage().partition(".")[0]


async def test_one_logger_alone(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange.connection")
    async with network.pool() as pool:
        await get(pool)
    assert {record.name for record in caplog.records} == {"trio_exchange.connection"}


async def test_nothing_is_logged_by_default(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    async with network.pool() as pool:
        await get(pool)
    assert caplog.records == []


@pytest.mark.parametrize("name", [b"Set-Cookie", b"SET-COOKIE2", b"Authorization", b"Proxy-Authorization"])
async def test_the_log_hides_secrets_of_responses(
    network: Network, caplog: pytest.LogCaptureFixture, name: bytes
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        async for _ in peer:
            await peer.send(b"HTTP/1.1 103 Early Hints\r\n%b: hunter2\r\n\r\n" % name)
            await peer.send_response(200, [(name, b"hunter2"), (b"X-Seen", b"plain")])

    caplog.set_level(logging.DEBUG, "trio_exchange")
    events = Events()
    async with network.pool(serve) as pool:
        response = await get(pool, events)
    assert (name, b"hunter2") in response.headers
    _, _, _, headers = events.info("http11.receive_response_headers.complete")["return_value"]
    assert (name, b"hunter2") in headers
    assert "hunter2" not in caplog.text
    assert caplog.text.count("[hidden]") == 2
    assert "plain" in caplog.text


async def test_the_log_hides_secrets_of_requests(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    headers = {"Authorization": "hunter2", "Cookie": "hunter2", "Proxy-Authorization": "hunter2"}
    async with network.pool() as pool:
        await pool.request("GET", "http://example.com/", headers=headers)
    assert caplog.records
    assert "hunter2" not in caplog.text


async def test_hiding_copies_and_leaves_other_values_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    headers = [(b"cookie", b"hunter2"), (b"a", b"b")]
    await Tracer(None, log=True).report("http11.x.started", {"headers": headers, "n": 1, "t": (1, [2])})
    assert headers == [(b"cookie", b"hunter2"), (b"a", b"b")]
    assert caplog.messages == [
        "http11.x.started {'headers': [(b'cookie', b'[hidden]'), (b'a', b'b')], 'n': 1, 't': (1, [2])}"
    ]
