"""Establishing connections: ways to get somewhere, TLS, and trying again.

Theory of operation. A `Way` leads to any host and port: `Direct` dials, and every proxy is a way that is
built on the way to the proxy, so that a chain of proxies is a chain of ways. All of it is done in the
requester's task, so that its trace handlers are awaited inline and its cancel scopes end it.

An `Attempt` is what the steps of one try have in common: a budget of time, spent on the network and not on
trace handlers; who is told; and what was opened. When an attempt fails, or is cancelled, what it has opened
is closed. What a successful one returns belongs to the caller.
"""

from __future__ import annotations

import abc
import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import trio

from ._exceptions import ConnectError, ConnectTimeout, bare
from ._streams import NOT_RAW, NetworkStream, Transport
from ._timeouts import Budget
from ._tls import TLSSettings, start_tls
from ._trace import Tracer, traced

T = TypeVar("T")

#: Arguments of `setsockopt`: level, option, and a value, or None and a length.
SocketOption: TypeAlias = tuple[int, int, int | bytes] | tuple[int, int, None, int]


class Connector:
    """How connections are dialled. Derive from it to replace either way of dialling.

    Whatever it raises ends the request. An `OSError` (also `UnicodeError`, for a name that can't be
    looked up, and `trio.BrokenResourceError`) is shown to the requester as a `ConnectError`, others as
    themselves. A call may be cancelled at any time and must then leave nothing open.

    Of a stream that is a `trio.SocketStream` the pool knows, while it is idle, whether the server has closed
    it or sent what nobody asked for. Of others it learns this only when it uses them.
    """

    async def connect_tcp(
        self,
        host: str,
        port: int,
        *,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> trio.abc.Stream:
        """Connect over TCP, to whichever of the host's addresses answers first (RFC 8305).

        Args:
            host: Name or address; an IPv6 address may have a zone.
            port: Port number.
            local_address: Address to connect from. Passed only if the pool has one.
            socket_options: Set on the connected socket. Passed only if the pool has some.

        Returns:
            The connected stream, without TLS.

        Raises:
            OSError: No address could be connected to: the error of the only one, or one that tells of all.
        """
        stream = await _open_tcp_stream(host, port, local_address)
        return _with_options(stream, socket_options)

    async def connect_unix_socket(
        self, path: str, *, socket_options: Iterable[SocketOption] | None = None
    ) -> trio.abc.Stream:
        """Connect to a unix socket.

        Args:
            path: The socket's path.
            socket_options: Set on the connected socket. Passed only if the pool has some.

        Raises:
            OSError: It could not be connected to.
        """
        return _with_options(await trio.open_unix_socket(path), socket_options)


def _family_of(host: str) -> socket.AddressFamily | None:
    """The family of an address, None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


async def _open_tcp_stream(host: str, port: int, local_address: str | None) -> trio.SocketStream:
    family = None if local_address is not None else _family_of(host)
    error: BaseException
    try:
        if family is not None:
            return await _connect_to_address(family, host, port)
        return await trio.open_tcp_stream(host, port, local_address=local_address)
    except OSError as exc:
        error = _without_group(exc, address_of(host, port))
    except BaseExceptionGroup as exc:
        # Trio tries the addresses in a nursery, which is where a KeyboardInterrupt comes then.
        error = bare(exc)
    # Not in the `except` clause: the context would be a group that contains the error, a reference cycle.
    try:
        raise error
    finally:
        del error


async def _connect_to_address(family: socket.AddressFamily, host: str, port: int) -> trio.SocketStream:
    """Connect where there is nothing to look up, and no other address to try."""
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def _without_group(exc: OSError, where: str) -> OSError:
    """The error to raise for what Trio's attempts ended in, without the frames of Trio."""
    attempts: Sequence[OSError] = _attempts(exc)
    for attempt in attempts:
        # Trio's frames refer to all attempts, so that each of them would be in a reference cycle.
        attempt.__traceback__ = None
    if len(attempts) > 1:
        numbers = {attempt.errno for attempt in attempts}
        number = numbers.pop() if len(numbers) == 1 else None
        reasons = reason_of(exc, where)
        # With a number it gets the class that belongs to that, such as `ConnectionRefusedError`.
        return OSError(reasons) if number is None else OSError(number, reasons)
    return attempts[0]


def _with_options(stream: trio.SocketStream, options: Iterable[SocketOption] | None) -> trio.SocketStream:
    setsockopt: Callable[..., None] = stream.socket.setsockopt
    try:
        for option in options or ():
            setsockopt(*option)
    except BaseException:
        stream.socket.close()
        raise
    return stream


@dataclass(frozen=True)
class Connection:
    """An established connection.

    Attributes:
        transport: The bottom.
        stream: What HTTP speaks on: the transport, or TLS on it.
    """

    transport: Transport
    stream: trio.abc.Stream


class Attempt:
    """One try to establish a connection.

    Args:
        budget: The time that its steps may take in all.
        tracer: Who is told of each.

    Attributes:
        budget: As given.
        tracer: As given.
    """

    def __init__(self, budget: Budget, tracer: Tracer | None) -> None:
        self.budget = budget
        self.tracer = tracer
        self._opened: list[Transport] = []

    async def step(
        self, what: str, name: str, info: dict[str, Any], operation: Callable[..., Awaitable[T]]
    ) -> T:
        """Await `operation()` as a trace point, for at most what is left of the budget.

        What the operation opens has to have an owner before it returns, since the handler that is told so
        may raise.

        Args:
            what: What it does, for people.
            name: The trace point.
            info: What the handler is told when it starts, but for the timeout.
            operation: Does it.

        Raises:
            ConnectTimeout: There is no time left.
        """
        info["timeout"] = self.budget.limit
        self.budget.spent_on = what
        return await traced(self.tracer, name, info, self.budget.spend, operation)

    def own(self, stream: trio.abc.Stream) -> Transport:
        """Make a transport of a stream, and see to its closing if the attempt fails."""
        transport = Transport(stream)
        self._opened.append(transport)
        return transport

    async def give_up(self) -> None:
        """Close what was opened."""
        for transport in reversed(self._opened):
            await close_forcefully(transport)


async def close_forcefully(transport: Transport) -> None:
    """Close a connection that is of no use, whatever the closing says."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        await trio.aclose_forcefully(transport)


Establish: TypeAlias = Callable[[Attempt], Awaitable[Connection]]


async def establish_once(budget: Budget, tracer: Tracer | None, establish: Establish) -> Connection:
    """Establish a connection, or leave nothing open.

    Args:
        budget: For the attempt.
        tracer: Who is told.
        establish: Does it.
    """
    attempt = Attempt(budget, tracer)
    try:
        return await establish(attempt)
    except BaseException:
        await attempt.give_up()
        raise


async def establish_persistently(
    retries: int, timeout: float | None, tracer: Tracer | None, establish: Establish
) -> Connection:
    """Establish a connection, trying again if it fails.

    Args:
        retries: How often to try again.
        timeout: Seconds for each attempt, None for no limit.
        tracer: Who is told.
        establish: Makes an attempt.

    Raises:
        ConnectError: The last attempt failed.
        ConnectTimeout: The last attempt took too long.
    """
    delays = backoff()
    attempt = 0
    while True:
        budget = Budget(timeout, ConnectTimeout)
        try:
            return await establish_once(budget, tracer, establish)
        except (ConnectError, ConnectTimeout) as exc:
            # A trace handler may raise the like.
            if exc is not budget.failure or attempt >= retries:
                raise
            attempt += 1
            delay = next(delays)
            info = {"attempt": attempt, "delay": delay, "exception": exc}
        try:
            await traced(tracer, "connection.retry", info, trio.sleep, delay)
        finally:
            # The exception's traceback leads to this frame.
            del info


def backoff() -> Iterator[float]:
    """The seconds to wait before each further attempt: 0, 0.5, 1, 2, 4 and so on."""
    yield 0.0
    delay = 0.5
    while True:
        yield delay
        delay *= 2


class Way(abc.ABC):
    """A way to connect to hosts.

    Attributes:
        proxy: What errors call the one proxy that it leads to; None if it leads to any host.
    """

    proxy: str | None = None

    def name_of(self, host: str, port: int) -> str:
        """What errors call the end of the way."""
        return address_of(host, port) if self.proxy is None else self.proxy

    @abc.abstractmethod
    async def connect(self, host: str, port: int, attempt: Attempt) -> Transport:
        """Connect to a host, without TLS.

        Args:
            host: Name or address; an IPv6 address may have a zone.
            port: Port number.
            attempt: Of which this is a step, or several; it owns what is opened.

        Raises:
            ConnectError: No connection could be established.
            ConnectTimeout: The attempt has no time left.
        """


class Direct(Way):
    """The way without proxies, as the pool was told to dial.

    Args:
        connector: Dials.
        local_address: To connect from.
        uds: Path of the unix socket that stands for every TCP address.
        socket_options: For the connected socket.
    """

    def __init__(
        self,
        connector: Connector,
        *,
        local_address: str | None = None,
        uds: str | None = None,
        socket_options: Sequence[SocketOption] | None = None,
    ) -> None:
        self._connector = connector
        self._uds = uds
        self._local_address = local_address
        self._socket_options = socket_options

    async def connect(self, host: str, port: int, attempt: Attempt) -> Transport:
        """Dial."""
        transports: list[Transport] = []

        async def connect() -> NetworkStream:
            transports.append(attempt.own(await self._dial(host, port)))
            return NetworkStream(transports[0], refusal=NOT_RAW)

        info: dict[str, Any] = {"socket_options": self._socket_options}
        if self._uds is None:
            name = "connection.connect_tcp"
            info = {"host": host, "port": port, "local_address": self._local_address, **info}
        else:
            name = "connection.connect_unix_socket"
            info = {"path": self._uds, **info}
        await attempt.step(f"connecting to {self._where(host, port)}", name, info, connect)
        return transports[0]

    def _where(self, host: str, port: int) -> str:
        if self._uds is None:
            return self.name_of(host, port)
        return self._uds if self.proxy is None else f"{self.proxy} at {self._uds}"

    async def _dial(self, host: str, port: int) -> trio.abc.Stream:
        given: dict[str, Any] = {}
        if self._socket_options is not None:
            given["socket_options"] = self._socket_options
        try:
            if self._uds is not None:
                return await self._connector.connect_unix_socket(self._uds, **given)
            if self._local_address is not None:
                given["local_address"] = self._local_address
            return await self._connector.connect_tcp(host, port, **given)
        except (OSError, UnicodeError, trio.BrokenResourceError) as exc:
            reason = reason_of(exc, address_of(host, port))
            raise ConnectError(f"could not connect to {self._where(host, port)}: {reason}") from exc


def address_of(host: str, port: int) -> str:
    """A host and a port as people write them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reason_of(exc: BaseException, where: str = "") -> str:
    """Why connecting failed, for people.

    Args:
        exc: The failure. Trio has its attempts at several addresses in a group, as the cause.
        where: The host and port that the reader is told anyway.
    """
    # Trio may have tried the same address twice.
    return "; ".join(dict.fromkeys(_reason_of_attempt(attempt, where) for attempt in _attempts(exc)))


def _attempts(exc: Any) -> Sequence[Any]:
    group = exc.__cause__
    return group.exceptions if isinstance(group, BaseExceptionGroup) else (exc,)


# What Trio makes of the error number of a failed attempt; the address is shown as a tuple.
_TRIO_REASON = re.compile(r"Error connecting to \('([^']*)', ([0-9]+)[^)]*\): .*")


def _reason_of_attempt(exc: BaseException, where: str) -> str:
    if not isinstance(exc, OSError) or not exc.strerror:
        return str(exc) or type(exc).__name__
    attempt = _TRIO_REASON.fullmatch(exc.strerror)
    if attempt is None or exc.errno is None:
        return exc.strerror
    reason = os.strerror(exc.errno)
    address = address_of(attempt[1], int(attempt[2]))
    return reason if address == where else f"{reason} ({address})"


async def encrypt(transport: Transport, tls: TLSSettings, trace_point: str, attempt: Attempt) -> Connection:
    """Start TLS.

    Args:
        transport: The connection so far; the attempt owns it.
        tls: What to ask for, and what to accept.
        trace_point: The step's name.
        attempt: Of which this is a step.

    Raises:
        ConnectError: The handshake failed.
        ConnectTimeout: The attempt has no time left.
    """
    encrypted: list[trio.abc.Stream] = []

    async def handshake() -> NetworkStream:
        encrypted.append(await start_tls(transport, tls))
        return NetworkStream(encrypted[0], refusal=NOT_RAW)

    info = {"ssl_context": tls.context, "server_hostname": tls.server_hostname}
    await attempt.step(f"in the TLS handshake with {tls.whom}", trace_point, info, handshake)
    return Connection(transport, encrypted[0])
