"""Which request gets which connection: pure policy, without I/O, tasks or a clock.

Theory of operation. There are *slots*, at most `max_connections` of them, each of which holds one
connection from the moment that somebody sets out to dial it until its socket is closed. Connections with
the same route (key) and the requests that wait for one form a *lane*. A request brings a `Ticket`; it is
granted either an idle connection of its lane or a slot to dial a new one in (`CONNECT`), at once or
later, and `Ticket.granted` is called when it was later.

The rules:

1. Within a lane requests are served strictly in the order of their arrival.
2. A released connection goes to the first request that waits in its lane, else it becomes idle. The
   idle connection that was used last is used first, so that those not needed can expire.
3. A lane that has waiting requests and may have more slots is *hungry*. A free slot goes to the hungry
   lane that was served least recently. Where all slots are taken, the connection that has been idle
   longest, of whatever lane, is closed to make room.
4. No lane starves: a connection that is released to its own lane's next request is closed instead, to
   make room, once a hungry lane has gone without for as many grants as there are slots, and nothing is
   closing anyway.
5. A *fresh* ticket (a request whose connection turned out to be dead) is only ever granted `CONNECT`.
   Where its own lane has no slot left, an idle connection of that lane is closed to make room.

Every operation takes the same time however many connections and waiting requests there are: idle
connections and waiting tickets are in ordered dictionaries, and lanes that may take a slot are kept in
the order of their turn.

All methods are synchronous and leave the state consistent; that is why no lock exists. Time is an
argument.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from ._exceptions import ConnectionNotAvailable


class Closable(Protocol):
    """What the scheduler must be able to do to a connection."""

    def close_soon(self) -> None:
        """Mark the connection for closing; its owner closes it and then tells `Scheduler.closed`."""


C = TypeVar("C", bound=Closable)


class _Connect:
    def __repr__(self) -> str:
        return "CONNECT"


#: The grant that says: dial a connection of your own.
CONNECT: Final = _Connect()


class Ticket(Generic[C]):
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
        self.grant: C | _Connect | ConnectionNotAvailable | None = None


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
    __slots__ = ("closing", "idle", "served", "slots", "waiting")

    def __init__(self) -> None:
        self.slots = 0
        # How many of the slots are about to become free.
        self.closing = 0
        self.idle: OrderedDict[C, None] = OrderedDict()
        self.waiting: OrderedDict[Ticket[C], None] = OrderedDict()
        # The count of grants, over all lanes, when this lane was last served or became hungry.
        self.served = 0


class Scheduler(Generic[C]):
    """The state of a pool: slots, idle connections, waiting requests."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lanes: dict[Hashable, _Lane[C]] = {}
        self._hungry: OrderedDict[Hashable, _Lane[C]] = OrderedDict()
        self._connections: dict[C, Hashable] = {}
        self._idle: OrderedDict[C, float] = OrderedDict()
        self._closing: set[C] = set()
        self._connecting = 0
        self._waiting = 0
        self._grants = 0

    # -- What is there.

    @property
    def slots(self) -> int:
        """How many slots are taken."""
        return len(self._connections) + self._connecting

    @property
    def connecting(self) -> int:
        """How many slots are taken for a connection that is being dialled."""
        return self._connecting

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._waiting

    @property
    def idle(self) -> list[C]:
        """The idle connections, longest idle first."""
        return list(self._idle)

    def __iter__(self) -> Iterator[C]:
        """All connections, oldest first."""
        return iter(self._connections)

    def __len__(self) -> int:
        return len(self._connections)

    # -- What a request does.

    def request(self, ticket: Ticket[C], now: float, *, first: bool = False) -> None:
        """Ask for a connection; the grant is set at once or later.

        Args:
            ticket: The request's place, not waiting yet.
            now: The time, in seconds.
            first: Whether it goes to the head of its lane's queue, because it had its turn before and
                got a connection that was of no use.
        """
        ticket.grant = None
        lane = self._lanes.get(ticket.key)
        if lane is None:
            lane = self._lanes[ticket.key] = _Lane()
        grant: C | _Connect | None = self._idle_for(ticket, lane, now)
        if grant is None and (first or not lane.waiting):
            grant = self._slot_for(ticket.key, lane)
        if grant is not None:
            self._serve(ticket.key, lane)
            ticket.grant = grant
            return
        lane.waiting[ticket] = None
        if first:
            lane.waiting.move_to_end(ticket, last=False)
        self._waiting += 1
        self._update_hunger(ticket.key, lane)
        self._make_room()
        self._make_room_in(lane)

    def _idle_for(self, ticket: Ticket[C], lane: _Lane[C], now: float) -> C | None:
        # Where there are idle connections, whoever waits in the lane can't use them (rule 5), so that
        # taking one is not pushing in.
        while lane.idle and not ticket.fresh:
            connection = next(reversed(lane.idle))
            expired = self._has_expired(self._idle[connection], now)
            self._forget_idle(connection, lane)
            if not expired:
                return connection
            self._close(connection)
        return None

    def _slot_for(self, key: Hashable, lane: _Lane[C]) -> _Connect | None:
        # A hungry lane has its turn before a new request.
        if self._hungry or self.slots >= self._limits.connections:
            return None
        if lane.slots >= self._limits.per_lane:
            return None
        self._take_slot(lane)
        return CONNECT

    def abandon(self, ticket: Ticket[C]) -> None:
        """Give up a place in the queue. The ticket must be waiting."""
        lane = self._lanes[ticket.key]
        del lane.waiting[ticket]
        self._waiting -= 1
        self._update_hunger(ticket.key, lane)
        self._forget_if_empty(ticket.key, lane)

    def connected(self, key: Hashable, connection: C) -> None:
        """A `CONNECT` was used: the slot holds this connection, busy with the request that dialled it."""
        self._connecting -= 1
        self._connections[connection] = key

    def not_connected(self, key: Hashable) -> None:
        """A `CONNECT` could not be used: its slot is free."""
        self._connecting -= 1
        self._free_slot(key)

    # -- What a connection does.

    def released(self, connection: C, now: float) -> None:
        """A busy or held connection can take another request, unless it was marked for closing meanwhile."""
        if connection in self._closing or connection not in self._connections:
            return
        key = self._connections[connection]
        lane = self._lanes[key]
        if not lane.waiting:
            self._keep_idle(connection, lane, now)
        elif next(iter(lane.waiting)).fresh or self._another_starves(key):
            self._close(connection)
        else:
            self._hand_over(key, lane, connection)

    def _keep_idle(self, connection: C, lane: _Lane[C], now: float) -> None:
        out_of_order = self._idle and now < next(reversed(self._idle.values()))
        self._idle[connection] = now
        lane.idle[connection] = None
        if out_of_order:
            # One that was held. This is rare, so that putting it into its place may cost something.
            self._idle = OrderedDict(sorted(self._idle.items(), key=lambda item: item[1]))
        if len(self._idle) > self._limits.idle:
            self.close(next(iter(self._idle)))
        self._make_room()

    def _another_starves(self, key: Hashable) -> bool:
        # What is closing already makes room for the first.
        if self._closing or not self._hungry:
            return False
        first, lane = next(iter(self._hungry.items()))
        return first != key and self._grants - lane.served >= self._limits.connections

    def close(self, connection: C) -> None:
        """Close a connection, whatever it is doing."""
        if connection in self._idle:
            self._forget_idle(connection, self._lanes[self._connections[connection]])
        self._close(connection)

    def hold(self, connection: C) -> bool:
        """Take an idle connection out of use, to look after it.

        Returns:
            Whether it was idle. If so, `released` (with the time since when it was) or `close` it soon.
        """
        if connection not in self._idle:
            return False
        self._forget_idle(connection, self._lanes[self._connections[connection]])
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
        if connection in self._connections and connection not in self._closing:
            lane = self._lanes[self._connections[connection]]
            if connection in self._idle:
                self._forget_idle(connection, lane)
            self._closing.add(connection)
            lane.closing += 1

    def closed(self, connection: C) -> None:
        """A connection's socket is closed: its slot is free."""
        self.closing(connection)
        self._closing.remove(connection)
        key = self._connections.pop(connection)
        self._lanes[key].closing -= 1
        self._free_slot(key)

    def refuse_all(self, error: Callable[[], ConnectionNotAvailable]) -> None:
        """Grant every waiting request an error."""
        for key, lane in list(self._lanes.items()):
            while lane.waiting:
                ticket = self._pop_waiting(lane)
                ticket.grant = error()
                ticket.granted()
            self._update_hunger(key, lane)
            self._forget_if_empty(key, lane)

    # -- State changes that the above are made of.

    def _has_expired(self, idle_since: float, now: float) -> bool:
        expiry = self._limits.expiry
        return expiry is not None and now - idle_since >= expiry

    def _forget_idle(self, connection: C, lane: _Lane[C]) -> None:
        del self._idle[connection]
        del lane.idle[connection]

    def _close(self, connection: C) -> None:
        self.closing(connection)
        connection.close_soon()

    def _pop_waiting(self, lane: _Lane[C]) -> Ticket[C]:
        ticket, _ = lane.waiting.popitem(last=False)
        self._waiting -= 1
        return ticket

    def _serve(self, key: Hashable, lane: _Lane[C]) -> None:
        """Count a grant, and send the lane to the end of the hungry ones."""
        self._grants += 1
        lane.served = self._grants
        if key in self._hungry:
            self._hungry.move_to_end(key)

    def _hand_over(self, key: Hashable, lane: _Lane[C], grant: C | _Connect) -> None:
        ticket = self._pop_waiting(lane)
        self._serve(key, lane)
        self._update_hunger(key, lane)
        ticket.grant = grant
        ticket.granted()

    def _take_slot(self, lane: _Lane[C]) -> None:
        lane.slots += 1
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
            self._hand_over(key, lane, CONNECT)

    def _make_room(self) -> None:
        """Close idle connections for the hungry lanes, one for each that no closing one will serve."""
        while self._idle and len(self._closing) < len(self._hungry):
            self.close(next(iter(self._idle)))

    def _make_room_in(self, lane: _Lane[C]) -> None:
        """Close an idle connection of a full lane, for the fresh ticket that waits in spite of it."""
        if lane.idle and not lane.closing and lane.slots >= self._limits.per_lane:
            self.close(next(iter(lane.idle)))

    def _update_hunger(self, key: Hashable, lane: _Lane[C]) -> None:
        if lane.waiting and lane.slots < self._limits.per_lane:
            if key not in self._hungry:
                lane.served = self._grants
                self._hungry[key] = lane
        else:
            self._hungry.pop(key, None)

    def _forget_if_empty(self, key: Hashable, lane: _Lane[C]) -> None:
        if lane.slots == 0 and not lane.waiting:
            self._lanes.pop(key, None)
