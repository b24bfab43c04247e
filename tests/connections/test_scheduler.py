"""The scheduler alone: each rule, then all of them together under random histories."""

import contextlib
import gc
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trio_exchange import ConnectionNotAvailable
from trio_exchange._connections import scheduler as scheduler_module
from trio_exchange._connections.scheduler import DIAL, Limits, Scheduler, Waiter, _Phase


class FakeConnection:
    """A connection as the scheduler's caller has it; it records that it was told to close."""

    def __init__(self, key: str, number: int) -> None:
        self.key = key
        self.number = number
        self.told_to_close = False

    def __repr__(self) -> str:
        return f"<{self.key}{self.number}>"


FakeWaiter = Waiter[FakeConnection]


class Pool:
    """A scheduler with a clock, and shorthand for what a pool does to it."""

    def __init__(
        self,
        connections: int = sys.maxsize,
        per_key: int = sys.maxsize,
        idle: int = sys.maxsize,
        expiry: float | None = None,
    ) -> None:
        self.scheduler: Scheduler[FakeConnection] = Scheduler(
            Limits(connections, per_key, idle, expiry), may_share=lambda key: key.startswith("h2")
        )
        self.now = 0.0
        self.woken: list[FakeWaiter] = []
        self.made = 0

    def request(self, key: str = "a", *, fresh: bool = False, first: bool = False) -> FakeWaiter:
        waiter: FakeWaiter = Waiter(key, lambda: self.woken.append(waiter))
        waiter.fresh = fresh
        self._close_all(self.scheduler.request(waiter, self.now, first=first))
        return waiter

    def connected(self, waiter: FakeWaiter, *, shared: bool = False) -> FakeConnection:
        assert waiter.grant is DIAL
        self.made += 1
        connection = FakeConnection(str(waiter.key), self.made)
        self._close_all(self.scheduler.connected(waiter.key, connection, self.now, shared=shared))
        return connection

    def connect(self, key: str = "a") -> FakeConnection:
        """A connection that is busy."""
        return self.connected(self.request(key))

    def connect_shared(self, capacity: int, key: str = "h2") -> FakeConnection:
        """A connection that carries one request, and can carry so many."""
        connection = self.connected(self.request(key), shared=True)
        self.set_capacity(connection, capacity)
        return connection

    def not_connected(self, key: object) -> None:
        self._close_all(self.scheduler.not_connected(key))

    def set_capacity(self, connection: FakeConnection, capacity: int) -> None:
        self._close_all(self.scheduler.capacity_changed(connection, capacity, self.now))

    def release(self, connection: FakeConnection, since: float | None = None) -> None:
        self._close_all(self.scheduler.released(connection, self.now if since is None else since))

    def close(self, connection: FakeConnection) -> None:
        """Close a connection without the scheduler having decided it."""
        connection.told_to_close = True
        self.closing(connection)

    def closing(self, connection: FakeConnection) -> None:
        self._close_all(self.scheduler.closing(connection))

    def closed(self, connection: FakeConnection) -> None:
        self._close_all(self.scheduler.closed(connection))

    def assert_makes_room(self, connection: FakeConnection, waiter: FakeWaiter) -> None:
        """The connection was told to close, and when it has, its slot is the waiter's."""
        assert connection.told_to_close
        assert waiter.grant is None
        self.closed(connection)
        assert waiter.grant is DIAL

    def _close_all(self, to_close: list[FakeConnection]) -> None:
        for connection in to_close:
            assert not connection.told_to_close, "each is returned once"
            assert self.scheduler.closing(connection) == [], "it counts as closing already"
            connection.told_to_close = True

    def idle(self, key: str = "a") -> FakeConnection:
        """A connection that was used before, and is idle."""
        connection = self.connect(key)
        self.release(connection)
        return connection

    def is_empty(self) -> bool:
        """Whether nothing at all is kept."""
        kept: dict[str, Any] = vars(self.scheduler)
        containers = ("_groups", "_awaiting_slot", "_records", "_idle", "_to_close")
        return not any(kept[name] for name in containers) and self.scheduler.slots == 0


def test_a_first_request_is_told_to_connect() -> None:
    pool = Pool()
    waiter = pool.request()
    assert waiter.grant is DIAL
    assert repr(waiter.grant) == "DIAL"
    assert (pool.scheduler.slots, pool.scheduler.connecting, len(pool.scheduler)) == (1, 1, 0)
    connection = pool.connected(waiter)
    assert (pool.scheduler.slots, pool.scheduler.connecting, len(pool.scheduler)) == (1, 0, 1)
    assert list(pool.scheduler) == [connection]
    assert pool.woken == []


def test_an_idle_connection_is_granted_to_its_own_group_only() -> None:
    pool = Pool()
    connection = pool.idle("a")
    assert pool.request("b").grant is DIAL
    assert pool.request("a").grant is connection
    assert pool.scheduler.idle == []


def test_the_connection_used_last_is_used_first() -> None:
    pool = Pool()
    one, two, three = (pool.connect() for _ in range(3))
    for connection in (two, three, one):
        pool.release(connection)
    assert pool.scheduler.idle == [two, three, one]
    assert [pool.request().grant for _ in range(3)] == [one, three, two]


def test_waiting_requests_are_served_in_the_order_of_their_arrival() -> None:
    pool = Pool(connections=2)
    busy = [pool.connect(), pool.connect()]
    waiting = [pool.request() for _ in range(4)]
    assert pool.scheduler.waiting == 4
    for number in range(4):
        pool.release(busy[number % 2])
    assert pool.woken == waiting
    assert [waiter.grant for waiter in waiting] == busy * 2
    assert pool.scheduler.waiting == 0


def test_a_request_that_had_its_turn_goes_to_the_head_of_the_queue() -> None:
    pool = Pool(connections=1)
    busy = pool.connect()
    second, first = pool.request(), pool.request(first=True)
    pool.release(busy)
    assert pool.woken == [first]
    pool.release(busy)
    assert pool.woken == [first, second]


def test_an_abandoned_place_is_passed_over() -> None:
    pool = Pool(connections=1)
    busy = pool.connect()
    gone, kept = pool.request(), pool.request()
    pool.scheduler.abandon(gone)
    assert pool.scheduler.waiting == 1
    pool.release(busy)
    assert pool.woken == [kept]
    assert gone.grant is None


def test_an_abandoned_group_is_forgotten() -> None:
    pool = Pool(connections=1)
    busy = pool.connect("a")
    pool.scheduler.abandon(pool.request("b"))
    pool.closed(busy)
    assert pool.is_empty()


def test_a_slot_that_was_not_used_goes_to_the_next() -> None:
    pool = Pool(connections=1)
    failing = pool.request("a")
    waiting = pool.request("b")
    pool.not_connected(failing.key)
    assert pool.woken == [waiting]
    assert waiting.grant is DIAL
    pool.not_connected(waiting.key)
    assert pool.is_empty()


def test_a_closed_connection_gives_up_its_slot_whatever_it_was_doing() -> None:
    pool = Pool(connections=2)
    pool.connect()
    idle = pool.idle("b")
    pool.closed(idle)
    assert pool.scheduler.idle == []
    assert pool.request("c").grant is DIAL


def test_a_slot_stays_taken_until_the_socket_is_closed() -> None:
    pool = Pool(connections=1)
    connection = pool.idle()
    pool.close(connection)
    assert connection.told_to_close
    waiting = pool.request()
    assert waiting.grant is None
    pool.closed(connection)
    assert waiting.grant is DIAL


def test_a_connection_marked_for_closing_by_others_is_not_granted() -> None:
    pool = Pool()
    connection = pool.idle()
    pool.closing(connection)
    pool.closing(connection)
    assert pool.request().grant is DIAL
    pool.closed(connection)
    pool.closing(connection)  # too late to matter
    assert list(pool.scheduler) == []


def test_a_connection_marked_for_closing_under_way_does_not_become_idle() -> None:
    pool = Pool()
    connection = pool.idle()
    assert pool.scheduler.reserve(connection)
    pool.closing(connection)
    pool.release(connection)
    assert pool.scheduler.idle == []
    pool.closed(connection)
    pool.release(connection)
    assert pool.is_empty()


def test_free_slots_go_to_the_group_served_least_recently() -> None:
    pool = Pool(connections=3)
    busy = [pool.connect(key) for key in "abc"]
    waiters = [pool.request(key) for key in "aabbcc"]
    for _ in range(6):
        pool.closed(busy.pop(0))
        busy.append(pool.connected(pool.woken[-1]))
    assert [waiter.key for waiter in pool.woken] == ["a", "b", "c", "a", "b", "c"]
    assert all(waiter.grant is DIAL for waiter in waiters)


def test_the_connection_idle_longest_makes_room_for_another_group() -> None:
    pool = Pool(connections=3)
    connections = {key: pool.connect(key) for key in "abc"}
    for key in "bca":
        pool.release(connections[key])
    waiting = [pool.request("d"), pool.request("d")]
    assert [key for key in "abc" if connections[key].told_to_close] == ["b"]
    pool.closed(connections["b"])
    assert waiting[0].grant is DIAL
    # One waits still, so that one more is closed.
    assert [key for key in "abc" if connections[key].told_to_close] == ["b", "c"]


def test_one_connection_closes_for_one_group_that_awaits_a_slot() -> None:
    pool = Pool(connections=2)
    one, two = pool.connect("a"), pool.connect("b")
    pool.request("c")
    pool.release(one)
    pool.release(two)
    assert (one.told_to_close, two.told_to_close) == (True, False)


@pytest.mark.parametrize(
    "waits", [{"key": "b"}, {"fresh": True, "first": True}], ids=["other group", "fresh"]
)
def test_a_connection_released_while_others_wait_makes_room(waits: dict[str, Any]) -> None:
    pool = Pool(connections=1)
    connection = pool.connect("a")
    waiting = pool.request(**waits)
    pool.release(connection)
    pool.assert_makes_room(connection, waiting)


def test_nothing_is_closed_for_a_group_at_its_own_limit() -> None:
    pool = Pool(connections=2, per_key=1)
    busy = pool.connect("a")
    other = pool.idle("b")
    waiting = pool.request("a")
    assert waiting.grant is None
    assert not other.told_to_close
    pool.release(busy)
    assert waiting.grant is busy


def test_a_group_at_its_own_limit_leaves_the_slots_to_others() -> None:
    pool = Pool(connections=2, per_key=1)
    busy = pool.connect("a")
    waiting = pool.request("a")
    assert pool.request("b").grant is DIAL
    pool.closed(busy)
    assert waiting.grant is DIAL


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_no_group_starves_behind_a_busy_one(slots: int) -> None:
    pool = Pool(connections=slots)
    busy = [pool.connect("a") for _ in range(slots)]
    for _ in range(10 * slots):
        pool.request("a")
    starving = pool.request("b")
    for released in range(10 * slots):
        connection = busy[released % slots]
        pool.release(connection)
        if connection.told_to_close:
            break
    assert released == slots
    pool.closed(connection)
    assert starving.grant is DIAL


def test_a_starving_group_costs_a_busy_one_a_single_connection() -> None:
    """While one connection is closing for it, the others go on serving their own group."""
    pool = Pool(connections=3)
    busy = [pool.connect("a") for _ in range(3)]
    for _ in range(30):
        pool.request("a")
    pool.request("b")
    for _ in range(5):
        for connection in busy:
            if not connection.told_to_close:
                pool.release(connection)
    assert [connection.told_to_close for connection in busy].count(True) == 1


def test_a_fresh_waiter_is_only_granted_a_new_connection() -> None:
    pool = Pool(connections=2)
    idle = pool.idle()
    assert pool.request(fresh=True).grant is DIAL
    assert not idle.told_to_close


def test_room_is_made_for_a_fresh_waiter() -> None:
    pool = Pool(connections=1)
    idle = pool.idle()
    fresh = pool.request(fresh=True)
    assert fresh.grant is None
    pool.assert_makes_room(idle, fresh)


def test_room_is_made_for_a_fresh_waiter_in_a_full_group() -> None:
    pool = Pool(per_key=2)
    idle, busy = pool.idle(), pool.request(fresh=True)
    pool.release(pool.connected(busy))
    fresh = pool.request(fresh=True)
    assert fresh.grant is None
    assert [connection.told_to_close for connection in pool.scheduler] == [True, False]
    pool.closed(idle)
    assert fresh.grant is DIAL


def test_who_waits_behind_a_fresh_waiter_is_passed_by_those_who_can_use_what_is_idle() -> None:
    pool = Pool(connections=2)
    pool.connect("b")
    idle = pool.idle()
    fresh = pool.request(fresh=True)
    assert idle.told_to_close
    assert pool.request().grant is None  # nothing is idle any more
    assert fresh.grant is None


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_no_more_connections_are_kept_idle_than_allowed(limit: int) -> None:
    pool = Pool(idle=limit)
    connections = [pool.connect() for _ in range(3)]
    for connection in connections:
        pool.release(connection)
    assert pool.scheduler.idle == connections[3 - limit :]
    assert [c.told_to_close for c in connections] == [True] * (3 - limit) + [False] * limit


def test_an_expired_connection_is_not_granted() -> None:
    pool = Pool(expiry=5.0)
    old, young = pool.connect(), pool.connect()
    pool.release(old)
    pool.now = 1.0
    pool.release(young)
    pool.now = 5.0
    assert pool.scheduler.expired(pool.now) == [old]
    assert pool.request().grant is young
    assert pool.request().grant is DIAL
    assert old.told_to_close
    assert not young.told_to_close


def test_connections_are_kept_for_ever_without_an_expiry() -> None:
    pool = Pool()
    connection = pool.idle()
    pool.now = 1e9
    assert pool.scheduler.expired(pool.now) == []
    assert pool.request().grant is connection


def test_a_reserved_connection_is_out_of_use() -> None:
    pool = Pool(connections=1)
    connection = pool.idle()
    assert pool.scheduler.reserve(connection)
    waiting = pool.request()
    assert pool.woken == []
    pool.release(connection)
    assert waiting.grant is connection
    assert not pool.scheduler.reserve(connection)


def test_since_when_a_connection_is_active() -> None:
    pool = Pool(connections=1)
    active_since = pool.scheduler.active_since
    connection = pool.connect()
    assert active_since(connection) == pool.now
    pool.now += 1
    waiting = pool.request()
    pool.now += 1
    # The next request begins when the one before it ends.
    pool.release(connection)
    assert waiting.grant is connection
    assert active_since(connection) == pool.now
    pool.release(connection)
    assert active_since(connection) is None
    # A reservation is no activity.
    assert pool.scheduler.reserve(connection)
    assert active_since(connection) is None
    pool.release(connection)
    pool.now += 1
    assert pool.request().grant is connection
    assert active_since(connection) == pool.now
    pool.closed(connection)
    assert active_since(connection) is None


def test_a_shared_connection_is_active_since_it_carries_any_request() -> None:
    pool = Pool()
    connection = pool.connect_shared(3)
    started = pool.now
    pool.now += 1
    pool.request("h2")
    pool.release(connection)
    assert pool.scheduler.active_since(connection) == started
    pool.release(connection)
    assert pool.scheduler.reserve(connection)
    pool.now += 1
    assert pool.request("h2").grant is connection
    assert pool.scheduler.active_since(connection) == pool.now
    pool.release(connection)
    assert pool.scheduler.active_since(connection) == pool.now


def test_how_many_slots_a_group_has() -> None:
    pool = Pool()
    pool.connect("a")
    pool.connect("a")
    pool.request("b")
    assert [pool.scheduler.slots_of(key) for key in ("a", "b", "c")] == [2, 1, 0]


def test_all_who_wait_are_refused_at_once() -> None:
    pool = Pool(connections=1)
    busy = pool.connect("a")
    waiting = [pool.request(key) for key in "aabc"]
    pool.scheduler.refuse_all(lambda: ConnectionNotAvailable("closed"))
    assert [waiter.key for waiter in pool.woken] == ["a", "a", "b", "c"]
    assert all(isinstance(waiter.grant, ConnectionNotAvailable) for waiter in waiting)
    assert len({id(waiter.grant) for waiter in waiting}) == 4
    assert pool.scheduler.waiting == 0
    pool.closed(busy)
    assert pool.is_empty()


# -- Connections that carry several requests.


def grants_of(waiters: Iterable[FakeWaiter]) -> list[object]:
    return [waiter.grant for waiter in waiters]


def closes(connection: FakeConnection) -> bool:
    return connection.told_to_close


def test_in_a_group_that_may_be_shared_one_request_leads() -> None:
    pool = Pool()
    leader, *others = (pool.request("h2") for _ in range(4))
    assert leader.grant is DIAL
    assert grants_of(others) == [None] * 3
    assert (pool.scheduler.slots, pool.scheduler.waiting) == (1, 3)
    # Another group has a leader of its own.
    assert pool.request("h2 too").grant is DIAL


def test_those_behind_the_leader_wait_until_the_capacity_is_known_and_share_it() -> None:
    pool = Pool()
    leader, *others = (pool.request("h2") for _ in range(4))
    connection = pool.connected(leader, shared=True)
    assert grants_of(others) == [None] * 3
    pool.set_capacity(connection, 100)
    assert pool.woken == others
    assert grants_of(others) == [connection] * 3
    assert pool.request("h2").grant is connection
    assert pool.scheduler.slots == 1


def test_beyond_the_capacity_the_next_one_leads() -> None:
    pool = Pool()
    leader, *others = (pool.request("h2") for _ in range(6))
    pool.set_capacity(one := pool.connected(leader, shared=True), 3)
    assert grants_of(others) == [one, one, DIAL, None, None]
    pool.set_capacity(two := pool.connected(others[2], shared=True), 3)
    assert grants_of(others[3:]) == [two, two]
    assert pool.request("h2").grant is DIAL
    assert pool.scheduler.slots == 3


def test_beyond_the_capacity_others_wait_in_order_where_no_slot_is_left() -> None:
    pool = Pool(connections=1)
    connection = pool.connect_shared(2)
    assert pool.request("h2").grant is connection
    waiting = [pool.request("h2") for _ in range(3)]
    assert grants_of(waiting) == [None] * 3
    pool.release(connection)
    assert pool.woken == waiting[:1]
    pool.release(connection)
    pool.release(connection)
    assert pool.woken == waiting


def test_a_leader_released_before_the_capacity_is_known_leaves_the_connection_to_the_next() -> None:
    pool = Pool()
    leader, second, third = (pool.request("h2") for _ in range(3))
    connection = pool.connected(leader, shared=True)
    pool.release(connection)
    assert grants_of([second, third]) == [connection, None]
    pool.set_capacity(connection, 2)
    assert third.grant is connection


def test_who_comes_late_takes_the_undecided_connection_if_it_is_idle() -> None:
    pool = Pool()
    connection = pool.connected(pool.request("h2"), shared=True)
    pool.release(connection)
    assert pool.scheduler.idle == [connection]
    assert grants_of([pool.request("h2"), pool.request("h2")]) == [connection, None]


def test_if_the_leader_fails_the_next_one_leads() -> None:
    pool = Pool()
    leader, second, third = (pool.request("h2") for _ in range(3))
    pool.not_connected(leader.key)
    assert grants_of([second, third]) == [DIAL, None]
    pool.not_connected(second.key)
    assert third.grant is DIAL
    pool.not_connected(third.key)
    assert pool.is_empty()


def test_if_the_leaders_connection_is_closed_undecided_the_next_one_leads() -> None:
    pool = Pool()
    leader, second, third = (pool.request("h2") for _ in range(3))
    connection = pool.connected(leader, shared=True)
    pool.close(connection)
    assert grants_of([second, third]) == [DIAL, None]
    pool.set_capacity(connection, 100)  # too late to matter
    pool.release(connection)
    assert third.grant is None
    pool.closed(connection)
    pool.set_capacity(connection, 100)
    assert third.grant is None
    assert pool.scheduler.slots == 1


def test_with_one_slot_the_next_one_leads_once_the_undecided_connection_is_gone() -> None:
    pool = Pool(connections=1)
    leader, second = pool.request("h2"), pool.request("h2")
    connection = pool.connected(leader, shared=True)
    pool.close(connection)
    assert second.grant is None
    pool.closed(connection)
    assert second.grant is DIAL


def test_a_leader_that_waits_can_be_abandoned() -> None:
    pool = Pool()
    leader, second, third = (pool.request("h2") for _ in range(3))
    pool.scheduler.abandon(second)
    pool.not_connected(leader.key)
    assert pool.woken == [third]


def test_where_connections_are_for_one_request_the_group_takes_all_the_slots_it_needs() -> None:
    pool = Pool(connections=3)
    waiters = [pool.request("h2") for _ in range(5)]
    pool.connected(waiters[0], shared=False)
    assert grants_of(waiters) == [DIAL, DIAL, DIAL, None, None]


def test_that_they_are_for_one_request_is_remembered() -> None:
    pool = Pool()
    pool.closed(pool.connected(pool.request("h2"), shared=False))
    assert pool.is_empty()
    assert grants_of(pool.request("h2") for _ in range(3)) == [DIAL] * 3


def test_what_is_remembered_can_change() -> None:
    pool = Pool()
    pool.closed(pool.connected(pool.request("h2"), shared=False))
    pool.closed(pool.connected(pool.request("h2"), shared=True))
    assert grants_of(pool.request("h2") for _ in range(3)) == [DIAL, None, None]


def test_a_group_that_turns_out_to_be_shared_no_longer_has_a_turn_for_slots() -> None:
    pool = Pool(connections=3)
    pool.closed(pool.connected(pool.request("h2"), shared=False))
    one, two = pool.request("h2"), pool.request("h2")
    other = pool.connect("a")
    waiting = pool.request("h2")
    shared = pool.connected(one, shared=True)
    pool.closed(other)
    assert grants_of([waiting]) == [None], "two connections of the group are undecided"
    assert pool.request("b").grant is DIAL
    pool.set_capacity(shared, 10)
    assert waiting.grant is shared
    assert two.grant is DIAL


def test_groups_that_can_not_be_shared_anyway_are_not_remembered() -> None:
    pool = Pool()
    pool.connect("a")
    assert not pool.scheduler._exclusive


def test_no_more_groups_are_remembered_than_is_reasonable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_MOST_REMEMBERED", 3)
    pool = Pool()
    for key in ("h2 1", "h2 2", "h2 3", "h2 1", "h2 4"):
        pool.closed(pool.connected(pool.request(key), shared=False))
    # The one found longest ago is forgotten: there one request leads again.
    assert list(pool.scheduler._exclusive) == ["h2 3", "h2 1", "h2 4"]
    assert grants_of(pool.request("h2 2") for _ in range(2)) == [DIAL, None]
    assert grants_of(pool.request("h2 1") for _ in range(2)) == [DIAL, DIAL]


def test_a_connection_that_carries_others_is_joined_before_an_idle_one() -> None:
    pool = Pool()
    one, two = pool.connect_shared(1), pool.connect_shared(1)
    pool.set_capacity(one, 2)
    pool.set_capacity(two, 2)
    pool.release(one)
    assert grants_of(pool.request("h2") for _ in range(3)) == [two, one, one]


def test_of_several_idle_connections_the_one_used_last_is_taken() -> None:
    pool = Pool(expiry=5)
    one, two = pool.connect_shared(1), pool.connect_shared(1)
    pool.set_capacity(one, 9)
    pool.set_capacity(two, 9)
    pool.release(two)
    pool.now = 1
    pool.release(one)
    pool.now = 4.5
    assert grants_of(pool.request("h2") for _ in range(2)) == [one, one]
    pool.now = 5
    assert pool.scheduler.expired(pool.now) == [two]


def test_a_connection_is_idle_only_after_its_last_request() -> None:
    pool = Pool(expiry=5)
    connection = pool.connect_shared(3)
    pool.request("h2")
    pool.release(connection)
    assert pool.scheduler.idle == []
    pool.now = 2
    pool.release(connection)
    assert pool.scheduler.idle == [connection]
    assert pool.scheduler.idle_since(connection) == 2


def test_a_lowered_capacity_leaves_those_there_are_and_counts_them() -> None:
    pool = Pool(connections=1)
    connection = pool.connect_shared(3)
    pool.request("h2"), pool.request("h2")
    pool.set_capacity(connection, 1)
    waiting = pool.request("h2")
    pool.release(connection)
    pool.release(connection)
    assert waiting.grant is None
    pool.release(connection)
    assert waiting.grant is connection


def test_a_capacity_of_nothing_is_respected_until_there_is_some_again() -> None:
    pool = Pool(connections=1)
    connection = pool.connect_shared(2)
    pool.set_capacity(connection, 0)
    waiting = [pool.request("h2") for _ in range(3)]
    assert grants_of(waiting) == [None] * 3
    pool.set_capacity(connection, 3)
    assert grants_of(waiting) == [connection, connection, None]
    assert not connection.told_to_close


def test_an_idle_connection_without_capacity_is_not_granted_but_goes_on_being_idle() -> None:
    pool = Pool(connections=2, expiry=5)
    connection = pool.connect_shared(1)
    pool.set_capacity(connection, 0)
    pool.release(connection)
    assert pool.scheduler.idle == [connection]
    pool.now = 1
    pool.set_capacity(connection, 2)
    pool.set_capacity(connection, 0)
    assert pool.scheduler.idle_since(connection) == 0
    leader = pool.request("h2")
    assert leader.grant is DIAL
    pool.not_connected(leader.key)
    pool.set_capacity(connection, 1)
    assert pool.request("h2").grant is connection


def test_an_idle_connection_without_capacity_makes_room_for_its_own_group() -> None:
    pool = Pool(connections=1)
    connection = pool.connect_shared(0)
    waiting = pool.request("h2")
    assert not closes(connection)
    pool.release(connection)
    pool.assert_makes_room(connection, waiting)


def test_a_reserved_connection_without_capacity_stays_out_of_use() -> None:
    pool = Pool()
    connection = pool.connect_shared(0)
    pool.release(connection)
    assert pool.scheduler.reserve(connection)
    assert pool.scheduler.idle == []
    pool.release(connection)
    assert pool.scheduler.idle == [connection]
    assert pool.request("h2").grant is DIAL


def test_a_reserved_connection_can_be_shared_meanwhile() -> None:
    pool = Pool()
    connection = pool.connect_shared(2)
    pool.release(connection)
    assert pool.scheduler.reserve(connection)
    assert not pool.scheduler.reserve(connection)
    assert pool.request("h2").grant is connection
    pool.release(connection)
    assert pool.scheduler.idle == []
    pool.release(connection)
    assert pool.scheduler.idle == [connection]


def test_a_connection_that_is_closing_has_no_capacity() -> None:
    pool = Pool(connections=1)
    connection = pool.connect_shared(9)
    pool.request("h2")
    pool.close(connection)
    pool.set_capacity(connection, 9)
    waiting = pool.request("h2")
    pool.release(connection)
    pool.release(connection)
    assert waiting.grant is None
    assert pool.scheduler.idle == []
    pool.closed(connection)
    assert waiting.grant is DIAL


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("capacity", [1, 3, 10])
def test_no_group_starves_behind_a_shared_one(slots: int, capacity: int) -> None:
    """As many grants as all slots could carry, then a connection is drained: closed after its last."""
    pool = Pool(connections=slots)
    busy = []
    for _ in range(slots):
        connection = pool.connect_shared(capacity)
        busy += [connection] * capacity
        for _ in range(capacity - 1):
            assert pool.request("h2").grant is connection
    for _ in range(10 * slots * capacity):
        pool.request("h2")
    starving = pool.request("b")
    # Those who leave are followed by others, until it was enough.
    for _ in range(slots * capacity):
        pool.release(busy[0])
    assert len(pool.woken) == slots * capacity
    pool.release(busy[0])
    assert len(pool.woken) == slots * capacity
    # It takes nobody, but those it carries go on.
    assert busy[0].told_to_close is (capacity == 1)
    pool.set_capacity(busy[0], 100)
    assert len(pool.woken) == slots * capacity
    for _ in range(capacity - 1):
        assert not busy[0].told_to_close
        pool.release(busy[0])
    assert busy[0].told_to_close
    assert not any(connection.told_to_close for connection in busy if connection is not busy[0])
    pool.closed(busy[0])
    assert starving.grant is DIAL


def test_a_new_request_does_not_join_a_connection_while_another_group_starves() -> None:
    pool = Pool(connections=1)
    connection = pool.connect_shared(4)
    starving = pool.request("b")
    joined = 0
    while pool.request("h2").grant is connection:
        joined += 1
        pool.release(connection)
    assert joined == 4
    assert not closes(connection)
    pool.release(connection)
    pool.assert_makes_room(connection, starving)


def test_a_drained_connection_is_help_enough_for_as_many_grants_again() -> None:
    pool = Pool(connections=3)
    one, two = pool.connect_shared(1), pool.connect_shared(1)
    for connection in (one, two):
        pool.set_capacity(connection, 2)
    assert grants_of(pool.request("h2") for _ in range(2)) == [one, two]
    pool.connect("a")
    starving = pool.request("b")
    for _ in range(20):
        pool.request("h2")
    for _ in range(6):
        pool.release(one)
    pool.release(one)
    assert len(pool.woken) == 6
    for _ in range(6):
        pool.release(two)
    assert len(pool.woken) == 12
    assert not one.told_to_close
    # Nothing has become of the first: another one has to help.
    pool.release(two)
    pool.release(two)
    assert two.told_to_close
    assert len(pool.woken) == 12
    pool.closed(two)
    assert starving.grant is DIAL


def test_a_fresh_waiter_does_not_share() -> None:
    pool = Pool()
    connection = pool.connect_shared(9)
    assert pool.request("h2", fresh=True).grant is DIAL
    assert pool.request("h2").grant is connection


def test_for_a_fresh_waiter_that_waits_a_connection_is_drained() -> None:
    pool = Pool(connections=1)
    connection = pool.connect_shared(9)
    assert pool.request("h2").grant is connection
    fresh = pool.request("h2", fresh=True)
    pool.release(connection)
    assert not closes(connection)
    pool.release(connection)
    pool.assert_makes_room(connection, fresh)


def test_all_who_wait_behind_a_leader_are_refused_at_once() -> None:
    pool = Pool()
    leader, *others = (pool.request("h2") for _ in range(3))
    pool.scheduler.refuse_all(lambda: ConnectionNotAvailable("closed"))
    assert pool.woken == others
    pool.not_connected(leader.key)
    assert pool.is_empty()


# -- Cost.


def calls_of(action: Callable[[], object]) -> int:
    """How many functions an action calls, Python's and C's, those of methods included."""
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    # What the garbage collection calls (Hypothesis measures it) is no cost of the action.
    gc.disable()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def turnover(size: int, groups: int) -> Callable[[], object]:
    """Every operation on a full pool in which `size` connections are busy and `size` requests wait."""
    pool = Pool(connections=size)
    busy = [pool.connect(f"group {number % groups}") for number in range(size)]
    waiting = [pool.request(f"group {number % groups}") for number in range(size)]

    def operations() -> None:
        pool.release(busy[0])
        pool.scheduler.abandon(waiting[size // 2])
        pool.close(busy[1])
        pool.closed(busy[1])
        pool.connected(pool.woken[-1])
        pool.closing(busy[2])
        pool.closed(busy[2])
        pool.not_connected(pool.woken[-1].key)
        pool.request("new")
        pool.request("group 0", first=True)
        assert len(pool.woken) == 4

    return operations


def reuse(size: int, groups: int) -> Callable[[], object]:
    """Every operation on a full pool in which `size` connections are idle."""
    pool = Pool(connections=size, idle=size, expiry=5.0)
    busy = [pool.connect(f"group {number % groups}") for number in range(size)]
    for connection in busy[:-2]:
        pool.release(connection)
    pool.now = 1.0
    for connection in busy[-2:]:
        pool.release(connection)
    pool.now = 2.0

    def operations() -> None:
        assert pool.request(str(busy[-1].key)).grant is busy[-1]
        pool.release(busy[-1])
        assert pool.scheduler.expired(pool.now) == []
        assert pool.scheduler.reserve(busy[-2])
        pool.release(busy[-2])
        waiting = pool.request("new")
        assert busy[0].told_to_close
        pool.closed(busy[0])
        pool.connected(waiting)

    return operations


def sharing(size: int, groups: int) -> Callable[[], object]:
    """Every operation on a full pool of `size` shared connections, for which `size` requests wait."""
    pool = Pool(connections=size + 1)
    keys = [f"h2 {number % groups}" for number in range(size)]
    shared = [pool.connect_shared(1, key) for key in keys]
    leader = pool.request(keys[0])
    waiting = [pool.request(key) for key in keys]
    undecided = pool.connected(leader, shared=True)

    def operations() -> None:
        pool.release(shared[0])
        pool.set_capacity(shared[1], 2)
        pool.set_capacity(shared[2], 0)
        pool.release(shared[2])
        pool.scheduler.abandon(waiting[size // 2])
        pool.set_capacity(undecided, 2)
        pool.closed(shared[2])
        pool.set_capacity(pool.connected(pool.woken[-1], shared=True), 2)
        pool.close(shared[3])
        pool.closed(shared[3])
        pool.not_connected(pool.woken[-1].key)
        pool.connected(pool.woken[-1], shared=False)
        pool.request("h2 new")
        pool.request(keys[0], first=True)
        assert len(pool.woken) >= 5

    return operations


def joining(size: int, groups: int) -> Callable[[], object]:
    """Every operation on a full pool of `size` connections that have room."""
    pool = Pool(connections=size, expiry=5.0)
    keys = [f"h2 {number % groups}" for number in range(size)]
    shared = [pool.connect_shared(1, key) for key in keys]
    for connection in shared:
        pool.set_capacity(connection, 3)
    for connection in shared[: size // 2]:
        pool.release(connection)

    def operations() -> None:
        connections = grants_of(pool.request(keys[0]) for _ in range(3))
        for connection in connections:
            assert isinstance(connection, FakeConnection)
            pool.release(connection)
        assert pool.scheduler.reserve(shared[0])
        pool.release(shared[0])
        pool.set_capacity(shared[1], 0)
        pool.set_capacity(shared[1], 1)
        waiting = pool.request("h2 new")
        assert shared[1].told_to_close
        pool.closed(shared[1])
        pool.set_capacity(pool.connected(waiting, shared=True), 2)

    return operations


@pytest.mark.parametrize("scenario", [turnover, reuse, sharing, joining])
@pytest.mark.parametrize("many_groups", [False, True])
def test_the_cost_does_not_grow_with_the_pool(
    scenario: Callable[[int, int], Callable[[], object]], many_groups: bool
) -> None:
    small, large = (calls_of(scenario(size, size if many_groups else 1)) for size in (100, 10_000))
    assert large == small


# -- All rules at once.

KEYS = st.sampled_from(["a", "b", "h2 a", "h2 b"])


@dataclass
class Known:
    """What the model knows of a connection.

    Attributes:
        used: How many requests it carries, a reservation included.
        capacity: How many it can carry.
        decided: Whether this is known already.
    """

    used: int
    capacity: int
    decided: bool


class History(RuleBasedStateMachine):
    """Random histories of a small pool, checked against what everybody could observe.

    The model knows what each waiter and connection is doing, and the order of each group's queue; the
    decisions themselves are only checked, not predicted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slots = 0
        self.pool = Pool()
        self.queues: dict[str, list[FakeWaiter]] = {key: [] for key in ("a", "b", "h2 a", "h2 b")}
        # Lanes of which it is known that every request needs a connection of its own.
        self.exclusive = {"a", "b"}
        self.dialling: list[FakeWaiter] = []
        self.open_: dict[FakeConnection, Known] = {}
        self.closing: list[FakeConnection] = []
        # Each connection once for each request that it carries, and for a reservation; also those that were
        # closed under a request.
        self.users: list[FakeConnection] = []
        self.idle: dict[FakeConnection, float] = {}
        # A connection of which something becomes free: the next request may have it whatever the expiry.
        self.passing: FakeConnection | None = None

    @precondition(lambda self: not self.slots)
    @rule(
        slots=st.integers(1, 5),
        per_key=st.integers(1, 5),
        idle=st.integers(0, 5),
        expiry=st.none() | st.integers(0, 3),
    )
    def open(self, slots: int, per_key: int, idle: int, expiry: int | None) -> None:
        self.slots, self.per_key, self.idle_limit, self.expiry = slots, per_key, idle, expiry
        self.pool = Pool(slots, per_key, idle, expiry)

    # What the pool may do.

    @precondition(lambda self: self.slots)
    @rule(key=KEYS, fresh=st.booleans(), first=st.booleans())
    def request(self, key: str, fresh: bool, first: bool) -> None:
        queue = self.queues[key]
        waited = list(queue)
        waiter = self.pool.request(key, fresh=fresh, first=first)
        queue.insert(0 if first else len(queue), waiter)
        if waiter.grant is not None:
            if waiter.grant is DIAL:
                assert first or not waited
            self.take(waiter)
        self.settle()

    @precondition(lambda self: self.slots)
    @rule(key=KEYS, count=st.integers(2, 8))
    def burst(self, key: str, count: int) -> None:
        for _ in range(count):
            self.request(key, fresh=False, first=False)

    @precondition(lambda self: any(self.queues.values()))
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from([t for queue in self.queues.values() for t in queue]))
        self.queues[str(waiter.key)].remove(waiter)
        self.pool.scheduler.abandon(waiter)
        self.settle()

    @precondition(lambda self: self.dialling)
    @rule(data=st.data(), shared=st.booleans())
    def connected(self, data: st.DataObject, shared: bool) -> None:
        self.connect(data.draw(st.sampled_from(self.dialling)), shared=shared)

    def connect(self, waiter: FakeWaiter, *, shared: bool) -> None:
        key = str(waiter.key)
        shared = shared and key.startswith("h2")
        self.dialling.remove(waiter)
        if shared:
            self.exclusive.discard(key)
        else:
            self.exclusive.add(key)
        connection = self.pool.connected(waiter, shared=shared)
        self.open_[connection] = Known(1, 1, decided=not shared)
        self.users.append(connection)
        self.settle()

    @precondition(lambda self: self.dialling)
    @rule(data=st.data())
    def not_connected(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.dialling))
        self.dialling.remove(waiter)
        self.pool.not_connected(waiter.key)
        self.settle()

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def released(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(self.users)))

    def release(self, connection: FakeConnection) -> None:
        self.users.remove(connection)
        if connection in self.open_:
            self.open_[connection].used -= 1
            if not self.open_[connection].used:
                self.idle[connection] = self.pool.now
        with self.passed_on(connection):
            self.pool.release(connection)

    @precondition(lambda self: any(connection.key.startswith("h2") for connection in self.open_))
    @rule(data=st.data(), capacity=st.integers(0, 5))
    def capacity_changed(self, data: st.DataObject, capacity: int) -> None:
        candidates = [connection for connection in self.open_ if connection.key not in self.exclusive]
        if candidates:
            self.change(data.draw(st.sampled_from(candidates)), capacity)

    def change(self, connection: FakeConnection, capacity: int) -> None:
        known = self.open_[connection]
        known.capacity, known.decided = capacity, True
        with self.passed_on(connection):
            self.pool.set_capacity(connection, capacity)

    @contextlib.contextmanager
    def passed_on(self, connection: FakeConnection) -> Iterator[None]:
        self.passing = connection
        yield
        self.settle()
        self.passing = None

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(list(self.idle)))
        assert self.pool.scheduler.reserve(connection)
        self.use(connection)
        self.settle()

    @precondition(lambda self: self.open_ or self.closing)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from([*self.open_, *self.closing]))
        self.pool.close(connection)
        self.settle()

    @precondition(lambda self: self.closing)
    @rule(data=st.data())
    def closed(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.closing)))

    @precondition(lambda self: self.open_)
    @rule(data=st.data())
    def crashed(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(list(self.open_))))

    def end(self, connection: FakeConnection) -> None:
        if connection in self.closing:
            self.closing.remove(connection)
        self.open_.pop(connection, None)
        self.idle.pop(connection, None)
        self.pool.closed(connection)
        self.settle()

    @precondition(lambda self: self.slots)
    @rule(seconds=st.integers(1, 2))
    def time_passes(self, seconds: int) -> None:
        self.pool.now += seconds
        expired = self.pool.scheduler.expired(self.pool.now)
        assert set(expired) == {connection for connection in self.idle if self.has_expired(connection)}
        for connection in expired:
            self.pool.close(connection)
        self.settle()

    @precondition(lambda self: self.slots)
    @rule()
    def time_passes_unnoticed(self) -> None:
        self.pool.now += 1

    @precondition(lambda self: any(self.queues.values()))
    @rule()
    def refuse_all(self) -> None:
        self.pool.scheduler.refuse_all(lambda: ConnectionNotAvailable("closed"))
        for queue in self.queues.values():
            for waiter in queue:
                assert isinstance(waiter.grant, ConnectionNotAvailable)
                self.pool.woken.remove(waiter)
            queue.clear()
        self.settle()

    # What it finds.

    def has_expired(self, connection: FakeConnection) -> bool:
        return self.expiry is not None and self.pool.now - self.idle[connection] >= self.expiry

    def use(self, connection: FakeConnection) -> None:
        self.open_[connection].used += 1
        self.users.append(connection)
        self.idle.pop(connection, None)

    def take(self, waiter: FakeWaiter) -> None:
        """A waiter got its grant: check that it may have it."""
        key = str(waiter.key)
        queue = self.queues[key]
        grant = waiter.grant
        if grant is DIAL:
            assert waiter is queue[0]
            assert key in self.exclusive or not self.undecided(key), "another one leads"
            self.dialling.append(waiter)
        else:
            assert isinstance(grant, FakeConnection)
            assert not waiter.fresh
            assert all(other.fresh for other in queue[: queue.index(waiter)])
            assert grant.key == waiter.key
            assert grant in self.open_, "it is closed"
            assert not grant.told_to_close
            assert self.open_[grant].used < self.open_[grant].capacity, "it can't carry more"
            assert grant is self.passing or grant not in self.idle or not self.has_expired(grant)
            self.use(grant)
        queue.remove(waiter)

    def undecided(self, key: str) -> int:
        """How many slots of a group have a connection of unknown capacity, or none yet."""
        connections = [c for c, known in self.open_.items() if not (known.decided or c.told_to_close)]
        return sum(c.key == key for c in connections) + sum(waiter.key == key for waiter in self.dialling)

    def settle(self) -> None:
        """Take note of who was woken, and of what was told to close."""
        woken, self.pool.woken = self.pool.woken, []
        for waiter in woken:
            self.take(waiter)
        for connection in [connection for connection in self.open_ if connection.told_to_close]:
            del self.open_[connection]
            self.idle.pop(connection, None)
            self.closing.append(connection)

    # What must hold at any time.

    @invariant()
    def the_counts_are_right(self) -> None:
        scheduler = self.pool.scheduler
        established = [*self.open_, *self.closing]
        assert set(scheduler) == set(established)
        assert len(scheduler) == len(established)
        assert scheduler.connecting == len(self.dialling)
        assert scheduler.slots == len(established) + len(self.dialling)
        assert scheduler.waiting == sum(map(len, self.queues.values()))
        assert scheduler.idle == sorted(self.idle, key=lambda connection: self.idle[connection])

    @invariant()
    def the_limits_hold(self) -> None:
        if self.slots:
            assert self.pool.scheduler.slots <= self.slots
            assert len(self.idle) <= self.idle_limit
            assert all(self.slots_of(key) <= self.per_key for key in self.queues)

    def slots_of(self, key: str) -> int:
        established = [*self.open_, *self.closing]
        return sum(connection.key == key for connection in established) + sum(
            waiter.key == key for waiter in self.dialling
        )

    def is_drained(self, connection: FakeConnection) -> bool:
        return self.pool.scheduler._records[connection].phase is _Phase.DRAINING

    @invariant()
    def what_is_drained_is_in_use(self) -> None:
        assert not any(self.is_drained(connection) for connection in self.idle)

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        """Whoever waits, waits for something that will happen."""
        for key, queue in self.queues.items():
            if not queue:
                continue
            own = {connection: known for connection, known in self.open_.items() if connection.key == key}
            if not all(waiter.fresh for waiter in queue):
                for connection, known in own.items():
                    assert known.used >= known.capacity or self.is_drained(connection), "there is room"
            if self.slots_of(key) == self.per_key:
                # A slot will be free, a request will leave, or the server will take some again.
                if not any(known.used or not known.capacity for known in own.values()):
                    others = [connection.key for connection in self.closing]
                    assert key in others or key in (waiter.key for waiter in self.dialling)
            elif key in self.exclusive or not self.undecided(key):
                assert self.pool.scheduler.slots == self.slots, "there is a free slot"
                assert self.closing or not self.idle, "there is an idle connection to make room with"

    def teardown(self) -> None:
        """Let everything end well: every request is served, and nothing remains."""
        for count in range(10_000):
            starved = [connection for connection, known in self.open_.items() if not known.capacity]
            undecided = [connection for connection, known in self.open_.items() if not known.decided]
            if self.closing:
                self.end(self.closing[0])
            elif self.dialling:
                self.connect(self.dialling[0], shared=count % 2 == 0)
            elif undecided or starved:
                self.change((undecided or starved)[0], 2)
            elif self.users:
                self.release(self.users[0])
            else:
                break
        assert not any(self.queues.values())
        for connection in list(self.idle):
            self.end(connection)
        assert self.pool.is_empty()


TestHistories = History.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_no_group_waits_for_more_than_its_turn(seed: int, capacity: int) -> None:
    """While connections are released in turn, a group's first request waits a bounded number of grants."""
    chance = random.Random(seed)
    slots, keys = 4, ["a" if capacity == 1 else "h2", *"bcdef"]
    pool = Pool(connections=slots)
    grants = 0
    waiting: dict[FakeWaiter, int] = {}
    busy: list[FakeConnection] = []
    longest = 0

    def ask(key: str) -> None:
        waiter = pool.request(key)
        waiting[waiter] = grants
        if waiter.grant is not None:
            pool.woken.append(waiter)

    for _ in range(3000):
        # The first group asks all the time, the others now and then, one request at a time.
        while sum(waiter.key == keys[0] for waiter in waiting) < 2 * slots * capacity:
            ask(keys[0])
        for key in keys[1:]:
            if chance.random() < 0.1 and all(waiter.key != key for waiter in waiting):
                ask(key)
        if busy:
            pool.release(busy.pop(chance.randrange(len(busy))))
        for connection in list(pool.scheduler):
            if connection.told_to_close:
                pool.closed(connection)
        while pool.woken:
            waiter = pool.woken.pop(0)
            since = waiting.pop(waiter)
            grants += 1
            if waiter.key != keys[0]:
                longest = max(longest, grants - since)
            granted = waiter.grant
            if isinstance(granted, FakeConnection):
                busy.append(granted)
            else:
                busy.append(pool.connected(waiter, shared=waiter.key == "h2"))
                if waiter.key == "h2":
                    pool.set_capacity(busy[-1], capacity)
    assert grants > 2000
    assert 0 < longest <= capacity * slots + 2 * len(keys) * capacity


def test_a_reserved_connection_keeps_its_place_in_the_order_of_expiry() -> None:
    pool = Pool(expiry=10)
    first, second, third = (pool.connect() for _ in range(3))
    for time, connection in enumerate((first, second, third)):
        pool.release(connection, time)
    since = pool.scheduler.idle_since(first)
    assert since == 0
    assert pool.scheduler.reserve(first)
    assert pool.scheduler.idle_since(first) is None
    pool.release(first, since)
    assert pool.scheduler.idle == [first, second, third]
    assert pool.scheduler.expired(10) == [first]


def test_a_waiter_that_is_not_waiting_yet_gets_its_grant_without_being_woken() -> None:
    pool = Pool(1)
    connection = pool.connect()
    waiter: FakeWaiter = Waiter("a")
    assert pool.scheduler.request(waiter, pool.now) == []
    pool.release(connection)
    assert waiter.grant is connection
    assert pool.woken == []


def test_a_clock_that_steps_back_does_not_disorder_the_idle_connections() -> None:
    pool = Pool(expiry=10)
    first, second, third, reserved = (pool.connect() for _ in range(4))
    pool.release(reserved, 99)
    assert pool.scheduler.reserve(reserved)
    pool.release(first, 100)
    kept = pool.scheduler._idle
    pool.release(second, 40)
    pool.release(third, 41)
    assert pool.scheduler._idle is kept, "it was sorted"
    assert pool.scheduler.idle == [first, second, third]
    assert [pool.scheduler.idle_since(each) for each in (first, second, third)] == [100, 100, 100]
    # A reservation ends with a time of the past whatever the clock does.
    pool.release(reserved, 99)
    assert pool.scheduler.idle == [reserved, first, second, third]
    assert pool.scheduler.expired(109) == [reserved]
    assert pool.scheduler.expired(110) == [reserved, first, second, third]
