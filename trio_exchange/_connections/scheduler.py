"""Decides which request uses which connection: pure policy, without I/O, tasks or a clock.

Theory of operation. The pool has at most `max_connections` *slots*. A connection takes up a slot from the
moment its dialling starts until its socket is closed. The connections with the same key, and the requests
that wait for one of them, form a *group*. A connection's *capacity* is the number of requests it can carry
at once: one for HTTP/1.1, the server's limit for HTTP/2. A request asks with a `Waiter`, which is granted
either a place on a connection of its group or a slot in which to dial a new one (`DIAL`). The grant is made
at once or later; if later, `Waiter.granted` is called.

The rules:

1. Requests of a group are served strictly in the order of their arrival.
2. A place that becomes free on a connection goes to the first waiter of its group. A new request joins a
   connection that carries other requests before it takes an idle one. Among idle connections it takes the
   one used most recently, so that connections the pool does not need can expire.
3. A group *awaits a slot* while it has waiters and may use another slot. A free slot goes to the group that
   awaits one and was served least recently. If all slots are taken, the connection that has been idle
   longest, in any group, is closed to make room.
4. No group waits for ever. Once as many grants as all slots could carry have been made since a group began
   to await a slot, and no connection is closing anyway, the next free connection of another group is
   *drained* instead of reused: it takes no more requests and is closed after its last one.
5. A *fresh* waiter (its request failed on a dead connection) is only ever granted `DIAL`. If its group can
   have no more slots, an idle connection of that group is closed to make room.
6. A group whose connections might be shared dials one connection at a time: while the capacity of one of
   its connections is unknown, it takes no further slot. Once the capacity is known, the waiters share the
   connection. If the connection turns out to carry one request at a time, the scheduler remembers this for
   the key, and the group takes as many slots as it needs. If dialling fails, the next waiter dials.

The scheduler never calls a connection. It decides that a connection is to be closed, counts it as closing
from then on, and returns it to the caller, who closes it. Every method that may decide this returns the
list.

Every operation takes the same time, however many connections and waiters there are: idle connections,
connections with free places, and waiters are kept in ordered dictionaries, as are the groups that await a
slot.

All methods are synchronous and leave a consistent state, so no lock is needed. Time is an argument.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from .._exceptions import ConnectionNotAvailable

C = TypeVar("C", bound=Hashable)

# For how many keys the scheduler remembers that their connections can't be shared.
_MOST_REMEMBERED = 10_000


class _Dial:
    def __repr__(self) -> str:
        return "DIAL"


#: The grant that tells a request to dial a new connection.
DIAL: Final = _Dial()


class Waiter(Generic[C]):
    """A request's place in the queue of its group.

    Attributes:
        key: The key of the group.
        fresh: Whether the request needs a new connection.
        grant: A connection, `DIAL`, an error, or None while the request waits.
        granted: Called when a waiting request gets its grant. None until the request has to wait.
    """

    __slots__ = ("fresh", "grant", "granted", "key")

    def __init__(self, key: Hashable, granted: Callable[[], object] | None = None) -> None:
        self.key = key
        self.granted = granted
        self.fresh = False
        self.grant: C | _Dial | ConnectionNotAvailable | None = None


@dataclass(frozen=True)
class Limits:
    """The limits of a pool.

    Attributes:
        connections: The most slots in use at once.
        per_key: The most of them with the same key.
        idle: The most idle connections that are kept.
        expiry: Seconds after which an idle connection expires, None for never.
    """

    connections: int = sys.maxsize
    per_key: int = sys.maxsize
    idle: int = sys.maxsize
    expiry: float | None = None


class _Group(Generic[C]):
    """The connections and the waiters of one key."""

    __slots__ = ("closing", "exclusive", "idle", "last_served", "partly_used", "pending", "slots", "waiters")

    def __init__(self, *, exclusive: bool) -> None:
        # Whether its connections carry one request at a time, as far as is known.
        self.exclusive = exclusive
        # The number of the group's slots. The number of those whose connection is being dialled or has an
        # unknown capacity, and of those whose connection is closing.
        self.slots = 0
        self.pending = 0
        self.closing = 0
        # The connections with a free place: those without requests, and those with some.
        self.idle: OrderedDict[C, None] = OrderedDict()
        self.partly_used: OrderedDict[C, None] = OrderedDict()
        self.waiters: OrderedDict[Waiter[C], None] = OrderedDict()
        # The scheduler's count of grants when the group was last served or began to await a slot.
        self.last_served = 0


class _Phase(enum.Enum):
    """The phase of a connection's life. Each connection passes through some of them, in this order."""

    # Its capacity is not known yet. It carries the request that dialled it.
    NEW = enum.auto()
    OPEN = enum.auto()
    # It takes no more requests and is closed after its last.
    DRAINING = enum.auto()
    CLOSING = enum.auto()


class _Record(Generic[C]):
    """What the scheduler knows about a connection."""

    __slots__ = ("active_since", "capacity", "group", "key", "phase", "used")

    def __init__(self, key: Hashable, group: _Group[C], now: float, phase: _Phase) -> None:
        self.key = key
        self.group = group
        self.phase = phase
        # How many requests it can carry at once, and how many it carries. A reservation counts as a request,
        # but does not set `active_since`.
        self.capacity = 1
        self.used = 1
        self.active_since: float | None = now


class Scheduler(Generic[C]):
    """The state of a pool: its slots, its connections and their requests, and the waiters.

    Args:
        limits: The limits of the pool.
        may_share: Tells for a key whether its connections might carry several requests at once.
    """

    def __init__(self, limits: Limits, may_share: Callable[[Any], bool]) -> None:
        self._limits = limits
        self._may_share = may_share
        # The keys whose connections might have been shared, but turned out to carry one request at a time.
        self._exclusive: OrderedDict[Hashable, None] = OrderedDict()
        self._groups: dict[Hashable, _Group[C]] = {}
        self._awaiting_slot: OrderedDict[Hashable, _Group[C]] = OrderedDict()
        self._records: dict[C, _Record[C]] = {}
        # The idle connections, and since when each has been idle.
        self._idle: OrderedDict[C, float] = OrderedDict()
        self._closing = 0
        self._connecting = 0
        self._waiting = 0
        self._grants = 0
        # The connections that the present method has decided to close.
        self._to_close: list[C] = []

    # -- Inspection.

    @property
    def limits(self) -> Limits:
        """The limits of the pool."""
        return self._limits

    @property
    def slots(self) -> int:
        """How many slots are taken."""
        return len(self._records) + self._connecting

    @property
    def connecting(self) -> int:
        """How many slots are taken by connections that are being dialled."""
        return self._connecting

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._waiting

    def slots_of(self, key: Hashable) -> int:
        """How many slots are taken by connections with this key."""
        group = self._groups.get(key)
        return 0 if group is None else group.slots

    def active_since(self, connection: C) -> float | None:
        """When a connection last went from idle to active, None if it is not active."""
        record = self._records.get(connection)
        return None if record is None else record.active_since

    @property
    def idle(self) -> list[C]:
        """The idle connections, longest idle first."""
        return list(self._idle)

    def idle_since(self, connection: C) -> float | None:
        """When a connection became idle, None if it is not idle."""
        return self._idle.get(connection)

    def expired(self, now: float) -> list[C]:
        """The idle connections that have expired."""
        expired = []
        for connection, since in self._idle.items():
            if not self._has_expired(since, now):
                break
            expired.append(connection)
        return expired

    def __iter__(self) -> Iterator[C]:
        """All established connections, oldest first."""
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    # -- Called for requests.

    def request(self, waiter: Waiter[C], now: float, *, first: bool = False) -> list[C]:
        """Ask for a connection. The grant is made at once or later.

        Args:
            waiter: The request's place in the queue; it must not be waiting already.
            now: The time, in seconds.
            first: Whether to put the waiter at the head of its group's queue, because an earlier grant turned
                out to be useless.

        Returns:
            The connections to close.
        """
        waiter.grant = None
        group = self._groups.get(waiter.key)
        if group is None:
            group = self._groups[waiter.key] = _Group(exclusive=self._is_exclusive(waiter.key))
        # This overtakes no request: while the group has free places, only fresh waiters wait (rule 5).
        grant: C | _Dial | None = None if waiter.fresh else self._take_place(group, now)
        if grant is None and (first or not group.waiters):
            grant = self._take_free_slot(group)
        if grant is None:
            self._enqueue(waiter, group, first=first)
        else:
            self._count_grant(waiter.key, group)
            waiter.grant = grant
        return self._take_to_close()

    def abandon(self, waiter: Waiter[C]) -> None:
        """Remove a waiter from its queue. It must be waiting."""
        group = self._groups[waiter.key]
        del group.waiters[waiter]
        self._waiting -= 1
        self._update_awaiting_slot(waiter.key, group)
        self._forget_if_empty(waiter.key, group)

    def refuse_all(self, error: Callable[[], ConnectionNotAvailable]) -> None:
        """Grant an error to every waiter.

        Args:
            error: Makes the error, one for each waiter.
        """
        for key, group in list(self._groups.items()):
            while group.waiters:
                waiter = self._pop_waiter(group)
                self._wake(waiter, error())
            self._update_awaiting_slot(key, group)
            self._forget_if_empty(key, group)

    def connected(self, key: Hashable, connection: C, now: float, *, shared: bool) -> list[C]:
        """Put a new connection into the slot of a `DIAL` grant. It carries the request that dialled it.

        Args:
            key: The key of the grant.
            connection: The connection.
            now: The time, in seconds.
            shared: Whether it can carry several requests. `capacity_changed` tells later how many.

        Returns:
            The connections to close.
        """
        group = self._groups[key]
        self._connecting -= 1
        self._records[connection] = _Record(key, group, now, _Phase.NEW if shared else _Phase.OPEN)
        if shared:
            group.exclusive = False
            self._exclusive.pop(key, None)
            self._update_awaiting_slot(key, group)
        else:
            group.exclusive = True
            if self._may_share(key):
                self._remember_exclusive(key)
            self._settle_pending(key, group)
        return self._take_to_close()

    def not_connected(self, key: Hashable) -> list[C]:
        """Free the slot of a `DIAL` grant, because dialling failed.

        Returns:
            The connections to close.
        """
        self._connecting -= 1
        self._groups[key].pending -= 1
        self._free_slot(key)
        return self._take_to_close()

    # -- Called for connections.

    def released(self, connection: C, now: float) -> list[C]:
        """Note that a request has left a connection, or that a reservation has ended.

        Returns:
            The connections to close.
        """
        record = self._records.get(connection)
        if record is not None:
            record.used -= 1
            was_reserved = record.active_since is None
            if not record.used:
                record.active_since = None
                if record.phase is _Phase.DRAINING:
                    self._close(connection, record)
            self._offer(connection, record, now)
            if not record.used and record.phase is not _Phase.CLOSING:
                self._keep_idle(connection, now, was_reserved=was_reserved)
        return self._take_to_close()

    def capacity_changed(self, connection: C, capacity: int, now: float) -> list[C]:
        """Set how many requests a shared connection can carry. It keeps those it carries already.

        Returns:
            The connections to close.
        """
        record = self._records.get(connection)
        if record is not None and record.phase in (_Phase.NEW, _Phase.OPEN):
            is_new = record.phase is _Phase.NEW
            record.phase = _Phase.OPEN
            record.capacity = capacity
            self._offer(connection, record, now)
            if is_new:
                self._settle_pending(record.key, record.group)
        return self._take_to_close()

    def reserve(self, connection: C) -> bool:
        """Reserve an idle connection, so that no request gets it while its liveness is checked.

        Returns:
            Whether the connection was idle. If so, soon either call `released`, with the time since when it
            had been idle, or close the connection.
        """
        if connection not in self._idle:
            return False
        self._use(connection, self._records[connection], None)
        return True

    def closing(self, connection: C) -> list[C]:
        """Note that a connection is being closed. No request gets it any more.

        Returns:
            Other connections to close.
        """
        record = self._records.get(connection)
        if record is not None and record.phase is not _Phase.CLOSING:
            self._mark_closing(connection, record)
        return self._take_to_close()

    def closed(self, connection: C) -> list[C]:
        """Free the slot of a connection whose socket is closed.

        Returns:
            Other connections to close.
        """
        record = self._records[connection]
        if record.phase is not _Phase.CLOSING:
            self._mark_closing(connection, record)
        del self._records[connection]
        self._closing -= 1
        record.group.closing -= 1
        self._free_slot(record.key)
        return self._take_to_close()

    def _take_to_close(self) -> list[C]:
        to_close, self._to_close = self._to_close, []
        return to_close

    # -- Waiters and grants.

    def _enqueue(self, waiter: Waiter[C], group: _Group[C], *, first: bool) -> None:
        group.waiters[waiter] = None
        if first:
            group.waiters.move_to_end(waiter, last=False)
        self._waiting += 1
        self._update_awaiting_slot(waiter.key, group)
        self._make_room()
        self._make_room_in(group)

    def _pop_waiter(self, group: _Group[C]) -> Waiter[C]:
        waiter, _ = group.waiters.popitem(last=False)
        self._waiting -= 1
        return waiter

    def _grant_to_first(self, key: Hashable, group: _Group[C], grant: C | _Dial) -> None:
        waiter = self._pop_waiter(group)
        self._count_grant(key, group)
        self._update_awaiting_slot(key, group)
        self._wake(waiter, grant)

    def _wake(self, waiter: Waiter[C], grant: C | _Dial | ConnectionNotAvailable) -> None:
        waiter.grant = grant
        if waiter.granted is not None:
            waiter.granted()

    def _count_grant(self, key: Hashable, group: _Group[C]) -> None:
        """Count a grant, and move the group to the end of those that await a slot."""
        self._grants += 1
        group.last_served = self._grants
        if key in self._awaiting_slot:
            self._awaiting_slot.move_to_end(key)

    def _update_awaiting_slot(self, key: Hashable, group: _Group[C]) -> None:
        if group.waiters and self._may_dial(group):
            if key not in self._awaiting_slot:
                group.last_served = self._grants
                self._awaiting_slot[key] = group
        else:
            self._awaiting_slot.pop(key, None)

    def _forget_if_empty(self, key: Hashable, group: _Group[C]) -> None:
        if group.slots == 0 and not group.waiters:
            self._groups.pop(key, None)

    # -- Slots.

    def _may_dial(self, group: _Group[C]) -> bool:
        return group.slots < self._limits.per_key and (group.exclusive or not group.pending)

    def _take_free_slot(self, group: _Group[C]) -> _Dial | None:
        # The groups that await a slot come before a new request.
        if self._awaiting_slot or self.slots >= self._limits.connections or not self._may_dial(group):
            return None
        self._take_slot(group)
        return DIAL

    def _take_slot(self, group: _Group[C]) -> None:
        group.slots += 1
        group.pending += 1
        self._connecting += 1

    def _settle_pending(self, key: Hashable, group: _Group[C]) -> None:
        """Note that one pending slot's connection has a known capacity now, or is closing."""
        group.pending -= 1
        self._update_awaiting_slot(key, group)
        self._grant_free_slots()
        self._make_room()

    def _free_slot(self, key: Hashable) -> None:
        group = self._groups[key]
        group.slots -= 1
        self._update_awaiting_slot(key, group)
        self._grant_free_slots()
        self._make_room()
        self._forget_if_empty(key, group)

    def _grant_free_slots(self) -> None:
        while self._awaiting_slot and self.slots < self._limits.connections:
            key, group = next(iter(self._awaiting_slot.items()))
            self._take_slot(group)
            self._grant_to_first(key, group, DIAL)

    def _make_room(self) -> None:
        """Close idle connections until as many are closing as there are groups that await a slot."""
        while self._idle and self._closing < len(self._awaiting_slot):
            self._close_longest_idle(self._idle)

    def _make_room_in(self, group: _Group[C]) -> None:
        """Close an idle connection of a full group if a fresh waiter needs its slot.

        A waiter that is not fresh would have got the idle connection.
        """
        if group.idle and not group.closing and group.slots >= self._limits.per_key:
            self._close_longest_idle(group.idle)

    def _is_exclusive(self, key: Hashable) -> bool:
        return key in self._exclusive or not self._may_share(key)

    def _remember_exclusive(self, key: Hashable) -> None:
        self._exclusive[key] = None
        self._exclusive.move_to_end(key)
        if len(self._exclusive) > _MOST_REMEMBERED:
            self._exclusive.popitem(last=False)

    # -- Connections.

    def _take_place(self, group: _Group[C], now: float) -> C | None:
        """Use a free place on one of the group's connections, if it has one."""
        while group.partly_used:
            connection = next(iter(group.partly_used))
            record = self._records[connection]
            if not self._must_drain(record):
                self._use(connection, record, now)
                return connection
            self._drain(connection, record)
        while group.idle:
            connection = next(reversed(group.idle))
            record = self._records[connection]
            if not self._has_expired(self._idle[connection], now):
                self._use(connection, record, now)
                return connection
            self._close(connection, record)
        return None

    def _offer(self, connection: C, record: _Record[C], now: float) -> None:
        """Grant a connection's free places to the waiters of its group."""
        group = record.group
        while group.waiters and record.used < record.capacity:
            if next(iter(group.waiters)).fresh or self._must_drain(record):
                self._drain(connection, record)
            else:
                self._use(connection, record, now)
                self._grant_to_first(record.key, group, connection)
        if record.phase is not _Phase.CLOSING:
            self._update_free_places(connection, record)

    def _use(self, connection: C, record: _Record[C], active_since: float | None) -> None:
        record.used += 1
        if record.active_since is None:
            record.active_since = active_since
        self._idle.pop(connection, None)
        self._update_free_places(connection, record)

    def _update_free_places(self, connection: C, record: _Record[C]) -> None:
        """Put a connection where its group looks for free places, or take it away."""
        group = record.group
        if record.used >= record.capacity:
            group.idle.pop(connection, None)
            group.partly_used.pop(connection, None)
        elif record.used:
            group.idle.pop(connection, None)
            group.partly_used[connection] = None
        else:
            group.partly_used.pop(connection, None)
            group.idle[connection] = None

    def _keep_idle(self, connection: C, since: float, *, was_reserved: bool) -> None:
        latest = next(reversed(self._idle.values())) if self._idle else since
        # After a request, an earlier time means that the clock has stepped back.
        self._idle[connection] = since if was_reserved else max(since, latest)
        if was_reserved and since < latest:
            # Reservations are rare, so the cost of sorting does not matter.
            self._idle = OrderedDict(sorted(self._idle.items(), key=lambda item: item[1]))
        if len(self._idle) > self._limits.idle:
            self._close_longest_idle(self._idle)
        self._make_room()

    def _has_expired(self, idle_since: float, now: float) -> bool:
        expiry = self._limits.expiry
        return expiry is not None and now - idle_since >= expiry

    def _must_drain(self, record: _Record[C]) -> bool:
        """Whether a connection has to give up its slot to the group that has awaited one longest (rule 4)."""
        # A connection that is closing already frees a slot for that group.
        if self._closing or not self._awaiting_slot:
            return False
        key, group = next(iter(self._awaiting_slot.items()))
        return key != record.key and (
            self._grants - group.last_served >= self._limits.connections * max(1, record.capacity)
        )

    def _drain(self, connection: C, record: _Record[C]) -> None:
        """Let a connection take no more requests, and close it after its last one."""
        if not record.used:
            self._close(connection, record)
            return
        record.phase = _Phase.DRAINING
        record.capacity = 0
        self._update_free_places(connection, record)
        if self._awaiting_slot:
            # The slot will go to the group that awaits one longest. Its count starts again, so that no other
            # connection is drained for it at once.
            next(iter(self._awaiting_slot.values())).last_served = self._grants

    def _close_longest_idle(self, idle: OrderedDict[C, Any]) -> None:
        connection = next(iter(idle))
        self._close(connection, self._records[connection])

    def _close(self, connection: C, record: _Record[C]) -> None:
        self._to_close.append(connection)
        self._mark_closing(connection, record)

    def _mark_closing(self, connection: C, record: _Record[C]) -> None:
        is_new = record.phase is _Phase.NEW
        record.phase = _Phase.CLOSING
        record.capacity = 0
        self._closing += 1
        record.group.closing += 1
        self._idle.pop(connection, None)
        self._update_free_places(connection, record)
        if is_new:
            self._settle_pending(record.key, record.group)
