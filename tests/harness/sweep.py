"""Interrupting a scenario at each of its steps, one run for each, and looking at what is left.

A *step* is what a task does between two of Trio's checkpoints. An interruption happens after the step,
while the task waits for something, or before it, when what it waited for has happened already but it
doesn't know yet. Steps are not counted beforehand: the runs go on until one ends without having come to
the step in question, so nothing depends on the order in which Trio runs other tasks.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import h11
import trio
import trio.testing

from tests.harness.certificates import make_tls
from tests.harness.checks import open_sockets
from tests.harness.streams import TrackedStream
from trio_exchange import ConnectionPool, Connector, ExchangeError
from trio_exchange.testing import MemoryConnector, ScriptedPeer

# No scenario has as many steps; one that never ends fails.
_MOST_STEPS = 1000


class Trigger(trio.abc.Instrument):
    """Calls a function at one step of one task."""

    def __init__(self, step: int, *, before: bool) -> None:
        self._step = step
        self._before = before
        self._task: trio.lowlevel.Task | None = None
        self._act: Callable[[], object] | None = None
        self._steps = 0
        self.pulled = False

    def watch(self, act: Callable[[], object]) -> None:
        """From now on, count the steps of the calling task."""
        self._task = trio.lowlevel.current_task()
        self._act = act

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._steps += 1
            if self._before:
                self._pull()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task and not self._before:
            self._pull()

    def _pull(self) -> None:
        if self._steps == self._step and not self.pulled and self._act is not None:
            self.pulled = True
            self._act()


class Network(Connector):
    """Connections to a script, in memory or over sockets, none of which may be forgotten."""

    def __init__(self, nursery: trio.Nursery, script: Callable[[ScriptedPeer], Awaitable[object]]) -> None:
        self.failures: list[Exception] = []
        self.streams: list[TrackedStream] = []
        self.listeners: list[trio.SocketListener] | None = None
        self.closed = False
        self._memory = MemoryConnector(nursery, script)
        self._nursery = nursery
        self._script = script

    async def listen(self) -> None:
        """Use sockets from now on."""

        async def serve(stream: trio.SocketStream) -> None:
            async with ScriptedPeer(stream) as peer:
                await self._script(peer)

        self.listeners = await self._nursery.start(trio.serve_tcp, serve, 0)

    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        assert not self.closed, "nothing is dialled for a pool that was closed"
        if self.failures:
            await trio.lowlevel.checkpoint()
            raise self.failures.pop(0)
        if self.listeners is not None:
            _, port, *_ = self.listeners[0].socket.getsockname()
            return await super().connect_tcp("localhost", port, **options)
        stream = await self._memory.connect_tcp(host, port)
        assert isinstance(stream, trio.StapledStream)
        self.streams.append(TrackedStream(stream))
        return self.streams[-1]

    @property
    def open(self) -> int:
        """How many connections in memory are open."""
        return sum(not stream.closed for stream in self.streams)


@dataclass
class World:
    """What a scenario finds: a pool, and something to reach with it.

    Attributes:
        network: Where the pool's connections lead.
        pool: The pool.
        outside: A nursery that lives longer than the pool, for requests.
        extensions: For every request of the scenario.
        pause: A time in which everybody else comes to a rest, in seconds.
        tolerated: What may happen to others' requests.
        origin: Where the scenario's requests go.
    """

    network: Network
    pool: ConnectionPool
    outside: trio.Nursery
    extensions: dict[str, Any]
    pause: float
    tolerated: tuple[type[Exception], ...]
    origin: str


@contextlib.asynccontextmanager
async def nothing_special(_: World) -> AsyncIterator[None]:
    yield


@dataclass(frozen=True)
class Scenario:
    """Something to be interrupted.

    Attributes:
        run: The request, in a task of its own.
        setting: A context manager around it: what the pool is like.
        failures: What dialling fails with first.
        options: For the pool.
        origin: Where the requests go.
        way: What the request's trace handler and informational callback are told, as a shortened list.
    """

    run: Callable[[World], Awaitable[object]]
    setting: Callable[[World], contextlib.AbstractAsyncContextManager[None]] = nothing_special
    failures: Iterable[type[Exception]] = ()
    options: dict[str, Any] = field(default_factory=dict)
    origin: str = "http://origin.example"
    way: tuple[str | int, ...] = ()


class Interruption(enum.Enum):
    """What happens at a step."""

    CANCEL = "the request is cancelled"
    CLOSE = "another task closes the pool"
    LEAVE = "the pool's block ends"


def sweep(
    scenario: Scenario,
    script: Callable[[ScriptedPeer], Awaitable[object]],
    interruption: Interruption,
    *,
    extensions: dict[str, Any] | None = None,
    sockets: bool = False,
) -> int:
    """Run a scenario once for each step, interrupted there, and check what it leaves behind.

    Args:
        scenario: What is interrupted.
        script: The peers'.
        interruption: What happens.
        extensions: For the requests.
        sockets: Whether connections are no streams in memory.

    Returns:
        The number of steps.
    """
    steps = 0
    for before in (False, True):
        for step in itertools.count(1):
            assert step < _MOST_STEPS
            run = Run(scenario, script, extensions or {}, sockets=sockets)
            if not run.interrupted(Trigger(step, before=before), interruption):
                break
            steps += 1
    return steps


class Run:
    """One run of a scenario, in a Trio of its own."""

    def __init__(
        self,
        scenario: Scenario,
        script: Callable[[ScriptedPeer], Awaitable[object]],
        extensions: dict[str, Any],
        *,
        sockets: bool = False,
    ) -> None:
        self.scenario = scenario
        self.script = script
        self.extensions = extensions
        self.sockets = sockets
        self.error: Exception | None = None
        self.cancelled = False

    def interrupted(self, trigger: Trigger, interruption: Interruption) -> bool:
        """Run it, and check what must hold. Returns whether it was interrupted before its end."""
        self._in_trio(trigger, interruption)
        context = f"{interruption.value}, {vars(trigger)}"
        if interruption is Interruption.CANCEL or not trigger.pulled:
            assert self.error is None, context
        else:
            assert self.error is None or isinstance(self.error, ExchangeError), context
        assert not self.cancelled or interruption is Interruption.CANCEL, context
        return trigger.pulled

    def uninterrupted(self) -> Exception | None:
        """Run it, and check what must hold. Returns the exception that it ended with."""
        self._in_trio(Trigger(0, before=True), Interruption.CANCEL)
        assert not self.cancelled
        return self.error

    def _in_trio(self, trigger: Trigger, interruption: Interruption) -> None:
        # Sockets take real time; backing off and other pauses need not.
        clock = trio.testing.MockClock(**({"rate": 100} if self.sockets else {"autojump_threshold": 0}))
        sockets_before = open_sockets()
        trio.run(self._main, trigger, interruption, clock=clock, instruments=[trigger])
        assert open_sockets() == sockets_before

    async def _main(self, trigger: Trigger, interruption: Interruption) -> None:
        with trio.fail_after(1000 if self.sockets else 100):
            async with trio.open_nursery() as peers:
                network = Network(peers, self.script)
                if self.sockets:
                    await network.listen()
                async with trio.open_nursery() as outside:
                    options = dict(self.scenario.options)
                    if self.sockets:
                        # Small, so that sending has to wait.
                        options["socket_options"] = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)]
                    async with ConnectionPool(make_tls().client, connector=network, **options) as pool:
                        world = World(
                            network,
                            pool,
                            outside,
                            self.extensions,
                            0.1 if self.sockets else 1,
                            () if interruption is Interruption.CANCEL else (ExchangeError,),
                            self.scenario.origin,
                        )
                        await self._play(world, trigger, interruption)
                    assert_nothing_left(world)
                # Also when all requests have ended, those that the pool did not wait for.
                assert network.open == 0
                assert_nothing_under_way(pool)
                peers.cancel_scope.cancel()

    async def _play(self, world: World, trigger: Trigger, interruption: Interruption) -> None:
        pool = world.pool
        ended, interrupted = trio.Event(), trio.Event()

        async def request() -> None:
            with trio.CancelScope() as scope:
                act = scope.cancel if interruption is Interruption.CANCEL else interrupted.set
                trigger.watch(act)
                try:
                    await self.scenario.run(world)
                except Exception as exc:
                    self.error = exc
            self.cancelled = scope.cancelled_caught
            ended.set()
            interrupted.set()

        async with self.scenario.setting(world):
            world.network.failures = [failure() for failure in self.scenario.failures]
            world.outside.start_soon(request)
            if interruption is not Interruption.CANCEL:
                await interrupted.wait()
                world.network.closed = trigger.pulled
            if interruption is Interruption.CLOSE:
                await pool.aclose()
                assert_nothing_left(world)
            if interruption is not Interruption.LEAVE:
                await ended.wait()
        world.network.failures = []
        if interruption is Interruption.CANCEL:
            await assert_works(world)


async def assert_works(world: World) -> None:
    """The pool is as good as new."""
    response = await world.pool.request("GET", f"{world.origin}/after")
    assert response.status == 200
    for _ in range(100):
        if not world.pool.statistics().closing:
            break
        await trio.testing.wait_all_tasks_blocked()
    numbers = world.pool.statistics()
    assert (numbers.active, numbers.closing) == (0, 0)
    assert numbers.idle >= 1
    # Nothing is held of what the connections can carry.
    assert {record.used for record in world.pool._manager.scheduler._records.values()} == {0}
    assert_nothing_under_way(world.pool)
    if len(world.pool._managers) > 1:
        await assert_carriers_free(world)
    elif world.network.listeners is None:
        assert world.network.open == numbers.open


async def assert_carriers_free(world: World) -> None:
    """When what ran through tunnels has been closed, nothing holds the connections that carried them."""
    for manager in world.pool._managers:
        assert {record.used for record in manager.scheduler._records.values()} <= {0}
        for connection in manager.scheduler.idle:
            connection.close_soon()
        await manager.wait_stopped()
        for _ in range(3):
            await trio.lowlevel.checkpoint()
    assert_nothing_left(world)


def assert_nothing_left(world: World) -> None:
    assert [len(manager.scheduler) for manager in world.pool._managers if manager.scheduler] == []
    assert world.network.open == 0


def assert_nothing_under_way(pool: ConnectionPool) -> None:
    numbers = pool.statistics()
    assert (numbers.active, numbers.connecting, numbers.waiting) == (0, 0, 0)
    schedulers = [manager.scheduler for manager in pool._managers]
    assert {(scheduler.connecting, scheduler.waiting) for scheduler in schedulers} == {(0, 0)}


def forgiving(
    script: Callable[[ScriptedPeer], Awaitable[object]],
) -> Callable[[ScriptedPeer], Awaitable[None]]:
    """A script that ends where its client breaks off in the middle."""

    async def run(peer: ScriptedPeer) -> None:
        with contextlib.suppress(EOFError, h11.RemoteProtocolError, trio.BrokenResourceError):
            await script(peer)

    return run
