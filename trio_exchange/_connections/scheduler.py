"""Which request gets which connection: pure policy, without I/O, tasks or a clock.

Theory of operation. There are *slots*, at most `max_connections` of them, each of which holds one
connection from the moment that somebody sets out to dial it until its socket is closed. Connections with
the same route (key) and the requests that wait for one form a *lane*. A connection has a *capacity*, how
many requests it can carry at once: one for HTTP/1.1, as many as the server allows for HTTP/2. A request
brings a `Ticket`; it is granted either a share in a connection of its lane or a slot to dial a new one in
(`CONNECT`), at once or later, and `Ticket.granted` is called when it was later.

The rules:

1. Within a lane requests are served strictly in the order of their arrival.
2. What a connection can carry goes to the first request that waits in its lane. A new request joins a
   connection that carries others before it takes an idle one, and of those the one that was used last, so
   that those not needed can expire.
3. A lane that has waiting requests and may have more slots is *hungry*. A free slot goes to the hungry
   lane that was served least recently. Where all slots are taken, the connection that has been idle
   longest, of whatever lane, is closed to make room.
4. No lane starves: a connection that would go to its own lane's next request is *retired* instead, to
   make room, once a hungry lane has gone without for as many grants as all slots could carry, and nothing
   is closing anyway. A retired connection takes no more requests and is closed after its last.
5. A *fresh* ticket (a request whose connection turned out to be dead) is only ever granted `CONNECT`.
   Where its own lane has no slot left, an idle connection of that lane is closed to make room.
6. In a lane whose connections may be shared one request *leads*: while there is a slot whose connection's
   capacity is not known yet, the lane takes no other. When it is known, whoever waits shares it; where
   the connection turns out to be for one request at a time, this is remembered, and the lane takes as many
   slots as it needs. If the leader fails, the next one leads.

Every operation takes the same time however many connections and waiting requests there are: idle and
shared connections and waiting tickets are in ordered dictionaries, and lanes that may take a slot are kept
in the order of their turn.

All methods are synchronous and leave the state consistent; that is why no lock exists. Time is an
argument.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from .._exceptions import ConnectionNotAvailable


class Closable(Protocol):
    """What the scheduler must be able to do to a connection."""

    def close_soon(self) -> None:
        """Mark the connection for closing; its owner closes it and then tells `Scheduler.closed`."""


C = TypeVar("C", bound=Closable)

# How many lanes that can't be shared are remembered.
_MOST_REMEMBERED = 10_000


class _Dial:
    def __repr__(self) -> str:
        return "CONNECT"


#: The grant that says: dial a connection of your own.
DIAL: Final = _Dial()


class Waiter(Generic[C]):
    """One request's place in a queue.

    Attributes:
        key: The lane.
        fresh: Whether only a new connection will do.
        grant: A connection, `CONNECT`, an error, or None while it waits.
        granted: Called when a ticket that waited got its grant.
    """

    __slots__ = ("fresh", "grant", "granted", "key")

    def __init__(self, key: Hashable, granted: Callable[[], object]) -> None:
        self.key = key
        self.granted = granted
        self.fresh = False
        self.grant: C | _Dial | ConnectionNotAvailable | None = None


@dataclass(frozen=True)
class Limits:
    """How many connections there may be, and for how long.

    Attributes:
        connections: Slots in all.
        per_lane: Slots of one lane.
        idle: Connections kept without a request.
        expiry: Seconds for which they are kept, None for ever.
    """

    connections: int = sys.maxsize
    per_lane: int = sys.maxsize
    idle: int = sys.maxsize
    expiry: float | None = None


class _Lane(Generic[C]):
    __slots__ = ("closing", "exclusive", "idle", "served", "shared", "slots", "undecided", "waiting")

    def __init__(self, *, exclusive: bool) -> None:
        # Whether every request needs a connection of its own, as far as is known.
        self.exclusive = exclusive
        self.slots = 0
        # How many of the slots have a connection of unknown capacity, or none yet.
        self.undecided = 0
        # How many of the slots are about to become free.
        self.closing = 0
        # Connections that can take a request: those without one, and those with.
        self.idle: OrderedDict[C, None] = OrderedDict()
        self.shared: OrderedDict[C, None] = OrderedDict()
        self.waiting: OrderedDict[Waiter[C], None] = OrderedDict()
        # The count of grants, over all lanes, when this lane was last served or became hungry.
        self.served = 0


class _Held(Generic[C]):
    """What is known of a connection."""

    __slots__ = ("capacity", "closing", "decided", "draining", "key", "lane", "since", "used")

    def __init__(self, key: Hashable, lane: _Lane[C], now: float, *, decided: bool) -> None:
        self.key = key
        self.lane = lane
        self.capacity = 1
        # How many requests it carries, and since when there has been one. A hold counts, but sets no time.
        self.used = 1
        self.since: float | None = now
        self.decided = decided
        self.draining = False
        self.closing = False


class Scheduler(Generic[C]):
    """The state of a pool: slots, connections and what they carry, waiting requests.

    Args:
        limits: How many connections there may be.
        may_share: Whether the connections of a lane might carry several requests at once.
    """

    def __init__(self, limits: Limits, may_share: Callable[[Any], bool]) -> None:
        self._limits = limits
        self._may_share = may_share
        # Lanes that might have been shared but can't be, as was found out; the last ones found.
        self._exclusive: OrderedDict[Hashable, None] = OrderedDict()
        self._lanes: dict[Hashable, _Lane[C]] = {}
        self._hungry: OrderedDict[Hashable, _Lane[C]] = OrderedDict()
        self._held: dict[C, _Held[C]] = {}
        self._idle: OrderedDict[C, float] = OrderedDict()
        self._closing = 0
        self._connecting = 0
        self._waiting = 0
        self._grants = 0

    # -- What is there.

    @property
    def limits(self) -> Limits:
        """How many connections there may be."""
        return self._limits

    @property
    def slots(self) -> int:
        """How many slots are taken."""
        return len(self._held) + self._connecting

    @property
    def connecting(self) -> int:
        """How many slots are taken for a connection that is being dialled."""
        return self._connecting

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._waiting

    def slots_of(self, key: Hashable) -> int:
        """How many of the slots are taken by one lane."""
        lane = self._lanes.get(key)
        return 0 if lane is None else lane.slots

    def active_since(self, connection: C) -> float | None:
        """Since when a connection has carried requests without a pause, None if it carries none."""
        held = self._held.get(connection)
        return None if held is None else held.since

    @property
    def idle(self) -> list[C]:
        """The idle connections, longest idle first."""
        return list(self._idle)

    def __iter__(self) -> Iterator[C]:
        """All connections, oldest first."""
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    # -- What a request does.

    def request(self, waiter: Waiter[C], now: float, *, first: bool = False) -> None:
        """Ask for a connection; the grant is set at once or later.

        Args:
            waiter: The request's place, not waiting yet.
            now: The time, in seconds.
            first: Whether it goes to the head of its lane's queue, because it had its turn before and
                got a connection that was of no use.
        """
        waiter.grant = None
        lane = self._lanes.get(waiter.key)
        if lane is None:
            lane = self._lanes[waiter.key] = _Lane(exclusive=self._is_exclusive(waiter.key))
        # Where connections can take a request, whoever waits in the lane can't use them (rule 5), so that
        # this is not pushing in.
        grant: C | _Dial | None = None if waiter.fresh else self._connection_for(lane, now)
        if grant is None and (first or not lane.waiting):
            grant = self._slot_for(lane)
        if grant is not None:
            self._serve(waiter.key, lane)
            waiter.grant = grant
            return
        lane.waiting[waiter] = None
        if first:
            lane.waiting.move_to_end(waiter, last=False)
        self._waiting += 1
        self._update_hunger(waiter.key, lane)
        self._make_room()
        self._make_room_in(lane)

    def _is_exclusive(self, key: Hashable) -> bool:
        return key in self._exclusive or not self._may_share(key)

    def _connection_for(self, lane: _Lane[C], now: float) -> C | None:
        while lane.shared:
            connection = next(iter(lane.shared))
            held = self._held[connection]
            if not self._another_starves(held):
                self._use(connection, held, now)
                return connection
            self._drain(connection, held)
        while lane.idle:
            connection = next(reversed(lane.idle))
            if not self._has_expired(self._idle[connection], now):
                self._use(connection, self._held[connection], now)
                return connection
            self.close(connection)
        return None

    def _slot_for(self, lane: _Lane[C]) -> _Dial | None:
        # A hungry lane has its turn before a new request.
        if self._hungry or self.slots >= self._limits.connections or not self._may_dial(lane):
            return None
        self._take_slot(lane)
        return DIAL

    def abandon(self, waiter: Waiter[C]) -> None:
        """Give up a place in the queue. The ticket must be waiting."""
        lane = self._lanes[waiter.key]
        del lane.waiting[waiter]
        self._waiting -= 1
        self._update_hunger(waiter.key, lane)
        self._forget_if_empty(waiter.key, lane)

    def connected(self, key: Hashable, connection: C, now: float, *, shared: bool) -> None:
        """A `CONNECT` was used: the slot holds this connection, busy with the request that dialled it.

        Args:
            key: The lane.
            connection: The connection.
            now: The time, in seconds.
            shared: Whether it can carry several requests, once `capacity_changed` has told how many.
        """
        lane = self._lanes[key]
        self._connecting -= 1
        self._held[connection] = _Held(key, lane, now, decided=not shared)
        if shared:
            lane.exclusive = False
            self._exclusive.pop(key, None)
            self._update_hunger(key, lane)
        else:
            lane.exclusive = True
            if self._may_share(key):
                self._remember_exclusive(key)
            self._decided(key, lane)

    def _remember_exclusive(self, key: Hashable) -> None:
        self._exclusive[key] = None
        self._exclusive.move_to_end(key)
        if len(self._exclusive) > _MOST_REMEMBERED:
            self._exclusive.popitem(last=False)

    def not_connected(self, key: Hashable) -> None:
        """A `CONNECT` could not be used: its slot is free."""
        self._connecting -= 1
        self._lanes[key].undecided -= 1
        self._free_slot(key)

    # -- What a connection does.

    def released(self, connection: C, now: float) -> None:
        """A request has left a connection, or it is held no more."""
        held = self._held.get(connection)
        if held is None:
            return
        held.used -= 1
        if not held.used:
            held.since = None
            if held.draining:
                self._close(connection, held)
        self._offer(connection, held, now)

    def capacity_changed(self, connection: C, capacity: int, now: float) -> None:
        """A shared connection can carry so many requests from now on; those it carries it keeps."""
        held = self._held.get(connection)
        if held is None or held.closing or held.draining:
            return
        held.capacity = capacity
        self._offer(connection, held, now)
        if not held.decided:
            held.decided = True
            self._decided(held.key, held.lane)

    def _decided(self, key: Hashable, lane: _Lane[C]) -> None:
        lane.undecided -= 1
        self._update_hunger(key, lane)
        self._hand_out_slots()
        self._make_room()

    def _offer(self, connection: C, held: _Held[C], now: float) -> None:
        """Let those who wait have what a connection can carry, then put it where it can be found."""
        lane = held.lane
        while lane.waiting and held.used < held.capacity and not held.closing:
            if next(iter(lane.waiting)).fresh or self._another_starves(held):
                self._drain(connection, held)
            else:
                self._use(connection, held, now)
                self._hand_over(held.key, lane, connection)
        if held.closing:
            return
        self._place(connection, held)
        if not held.used and connection not in self._idle:
            self._keep_idle(connection, now)

    def _keep_idle(self, connection: C, now: float) -> None:
        out_of_order = self._idle and now < next(reversed(self._idle.values()))
        self._idle[connection] = now
        if out_of_order:
            # One that was held. This is rare, so that putting it into its place may cost something.
            self._idle = OrderedDict(sorted(self._idle.items(), key=lambda item: item[1]))
        if len(self._idle) > self._limits.idle:
            self.close(next(iter(self._idle)))
        self._make_room()

    def _another_starves(self, held: _Held[C]) -> bool:
        # What is closing already makes room for the first.
        if self._closing or not self._hungry:
            return False
        first, lane = next(iter(self._hungry.items()))
        return first != held.key and (
            self._grants - lane.served >= self._limits.connections * max(1, held.capacity)
        )

    def _drain(self, connection: C, held: _Held[C]) -> None:
        """Let a connection carry no more requests than it does, and close it after the last."""
        held.draining = True
        held.capacity = 0
        self._place(connection, held)
        if not held.used:
            self._close(connection, held)
        elif self._hungry:
            # This is the starving lane's help for now.
            next(iter(self._hungry.values())).served = self._grants

    def close(self, connection: C) -> None:
        """Close a connection, whatever it is doing."""
        self._close(connection, self._held[connection])

    def hold(self, connection: C) -> bool:
        """Take an idle connection out of use, to look after it.

        Returns:
            Whether it was idle. If so, `released` (with the time since when it was) or `close` it soon.
        """
        if connection not in self._idle:
            return False
        self._use(connection, self._held[connection], None)
        return True

    def idle_since(self, connection: C) -> float | None:
        """Since when a connection has been idle, None if it is not."""
        return self._idle.get(connection)

    def expired(self, now: float) -> list[C]:
        """The idle connections that have been so for too long."""
        expired = []
        for connection, since in self._idle.items():
            if not self._has_expired(since, now):
                break
            expired.append(connection)
        return expired

    def closing(self, connection: C) -> None:
        """A connection has been marked for closing, by whomever; it is used no more."""
        held = self._held.get(connection)
        if held is None or held.closing:
            return
        held.closing = True
        held.capacity = 0
        self._closing += 1
        held.lane.closing += 1
        self._idle.pop(connection, None)
        self._place(connection, held)
        if not held.decided:
            held.decided = True
            self._decided(held.key, held.lane)

    def closed(self, connection: C) -> None:
        """A connection's socket is closed: its slot is free."""
        self.closing(connection)
        held = self._held.pop(connection)
        self._closing -= 1
        held.lane.closing -= 1
        self._free_slot(held.key)

    def refuse_all(self, error: Callable[[], ConnectionNotAvailable]) -> None:
        """Grant every waiting request an error."""
        for key, lane in list(self._lanes.items()):
            while lane.waiting:
                waiter = self._pop_waiting(lane)
                waiter.grant = error()
                waiter.granted()
            self._update_hunger(key, lane)
            self._forget_if_empty(key, lane)

    # -- State changes that the above are made of.

    def _has_expired(self, idle_since: float, now: float) -> bool:
        expiry = self._limits.expiry
        return expiry is not None and now - idle_since >= expiry

    def _use(self, connection: C, held: _Held[C], since: float | None) -> None:
        held.used += 1
        if held.since is None:
            held.since = since
        self._idle.pop(connection, None)
        self._place(connection, held)

    def _place(self, connection: C, held: _Held[C]) -> None:
        """Put a connection among those of its lane that can take a request, or away."""
        lane = held.lane
        if held.used >= held.capacity:
            lane.idle.pop(connection, None)
            lane.shared.pop(connection, None)
        elif held.used:
            lane.idle.pop(connection, None)
            lane.shared[connection] = None
        else:
            lane.shared.pop(connection, None)
            lane.idle[connection] = None

    def _close(self, connection: C, held: _Held[C]) -> None:
        self.closing(connection)
        connection.close_soon()

    def _pop_waiting(self, lane: _Lane[C]) -> Waiter[C]:
        waiter, _ = lane.waiting.popitem(last=False)
        self._waiting -= 1
        return waiter

    def _serve(self, key: Hashable, lane: _Lane[C]) -> None:
        """Count a grant, and send the lane to the end of the hungry ones."""
        self._grants += 1
        lane.served = self._grants
        if key in self._hungry:
            self._hungry.move_to_end(key)

    def _hand_over(self, key: Hashable, lane: _Lane[C], grant: C | _Dial) -> None:
        waiter = self._pop_waiting(lane)
        self._serve(key, lane)
        self._update_hunger(key, lane)
        waiter.grant = grant
        waiter.granted()

    def _may_dial(self, lane: _Lane[C]) -> bool:
        return lane.slots < self._limits.per_lane and (lane.exclusive or not lane.undecided)

    def _take_slot(self, lane: _Lane[C]) -> None:
        lane.slots += 1
        lane.undecided += 1
        self._connecting += 1

    def _free_slot(self, key: Hashable) -> None:
        lane = self._lanes[key]
        lane.slots -= 1
        self._update_hunger(key, lane)
        self._hand_out_slots()
        self._make_room()
        self._forget_if_empty(key, lane)

    def _hand_out_slots(self) -> None:
        while self._hungry and self.slots < self._limits.connections:
            key, lane = next(iter(self._hungry.items()))
            self._take_slot(lane)
            self._hand_over(key, lane, DIAL)

    def _make_room(self) -> None:
        """Close idle connections for the hungry lanes, one for each that no closing one will serve."""
        while self._idle and self._closing < len(self._hungry):
            self.close(next(iter(self._idle)))

    def _make_room_in(self, lane: _Lane[C]) -> None:
        """Close an idle connection of a full lane, for the fresh ticket that waits in spite of it."""
        if lane.idle and not lane.closing and lane.slots >= self._limits.per_lane:
            self.close(next(iter(lane.idle)))

    def _update_hunger(self, key: Hashable, lane: _Lane[C]) -> None:
        if lane.waiting and self._may_dial(lane):
            if key not in self._hungry:
                lane.served = self._grants
                self._hungry[key] = lane
        else:
            self._hungry.pop(key, None)

    def _forget_if_empty(self, key: Hashable, lane: _Lane[C]) -> None:
        if lane.slots == 0 and not lane.waiting:
            self._lanes.pop(key, None)
