"""Establishing connections: dialling, TLS, and trying again.

Dialling is done in the requester's task, so that its trace handlers are awaited inline and its cancel
scopes end it. What `dial` returns is an established connection that the caller owns; when `dial` raises,
or is cancelled, there is no socket left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import trio

from ._exceptions import ConnectError, ConnectTimeout
from ._streams import NOT_RAW, NetworkStream, Transport
from ._timeouts import Budget
from ._tls import TLSSettings, start_tls
from ._trace import Tracer, traced

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
            OSError: No address could be connected to.
        """
        stream = await trio.open_tcp_stream(host, port, local_address=local_address)
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
class Dialling:
    """How a pool reaches the network.

    Attributes:
        connector: Dials.
        retries: How often to try again.
        local_address: To connect from.
        uds: Path of the unix socket that stands for every TCP address.
        socket_options: For the connected socket.
    """

    connector: Connector
    retries: int = 0
    local_address: str | None = None
    uds: str | None = None
    socket_options: Sequence[SocketOption] | None = None


@dataclass(frozen=True)
class Connection:
    """An established connection.

    Attributes:
        transport: The bottom.
        stream: What HTTP speaks on: the transport, or TLS on it.
    """

    transport: Transport
    stream: trio.abc.Stream


async def dial(
    dialling: Dialling,
    host: str,
    port: int,
    tls: TLSSettings | None,
    timeout: float | None,
    tracer: Tracer | None,
) -> Connection:
    """Establish a connection, TLS included, trying again as often as the pool is told.

    Args:
        dialling: The pool's settings.
        host: Whom to connect to.
        port: And where.
        tls: With which TLS settings, None for none.
        timeout: Seconds for one attempt as a whole, None for no limit.
        tracer: Who is told.

    Raises:
        ConnectError: The last attempt failed.
        ConnectTimeout: The last attempt took too long.
    """
    delays = backoff()
    attempt = 0
    while True:
        budget = Budget(timeout, ConnectTimeout)
        try:
            return await _attempt(dialling, host, port, tls, budget, timeout, tracer)
        except (ConnectError, ConnectTimeout) as exc:
            if attempt >= dialling.retries:
                raise
            attempt += 1
            delay = next(delays)
            info = {"attempt": attempt, "delay": delay, "exception": exc}
        await traced(tracer, "connection.retry", info, trio.sleep, delay)


def backoff() -> Iterator[float]:
    """The seconds to wait before each further attempt: 0, 0.5, 1, 2, 4 and so on."""
    yield 0.0
    delay = 0.5
    while True:
        yield delay
        delay *= 2


async def _attempt(
    dialling: Dialling,
    host: str,
    port: int,
    tls: TLSSettings | None,
    budget: Budget,
    timeout: float | None,
    tracer: Tracer | None,
) -> Connection:
    made: list[Transport] = []
    try:
        return await _establish(dialling, host, port, tls, budget, timeout, tracer, made)
    except BaseException:
        for transport in made:
            # It is closed all the same; what matters is why.
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                await trio.aclose_forcefully(transport)
        raise


async def _establish(
    dialling: Dialling,
    host: str,
    port: int,
    tls: TLSSettings | None,
    budget: Budget,
    timeout: float | None,
    tracer: Tracer | None,
    made: list[Transport],
) -> Connection:
    """Dial, then start TLS.

    Each step's stream is kept before its trace point ends, in `made` or in a local name, so that it has
    an owner when the handler raises. What the trace shows is a view of it.
    """

    async def connect() -> NetworkStream:
        made.append(Transport(await _dial_stream(dialling, host, port)))
        return NetworkStream(made[0], refusal=NOT_RAW)

    info: dict[str, Any] = {"timeout": timeout, "socket_options": dialling.socket_options}
    if dialling.uds is None:
        name = "connection.connect_tcp"
        info = {"host": host, "port": port, "local_address": dialling.local_address, **info}
    else:
        name = "connection.connect_unix_socket"
        info = {"path": dialling.uds, **info}
    await traced(tracer, name, info, budget.spend, connect)
    transport = made[0]
    if tls is None:
        return Connection(transport, transport)
    encrypted: list[trio.abc.Stream] = []

    async def encrypt() -> NetworkStream:
        encrypted.append(await start_tls(transport, tls))
        return NetworkStream(encrypted[0], refusal=NOT_RAW)

    info = {
        "ssl_context": tls.context,
        "server_hostname": tls.server_hostname,
        "timeout": timeout,
    }
    await traced(tracer, "connection.start_tls", info, budget.spend, encrypt)
    return Connection(transport, encrypted[0])


async def _dial_stream(dialling: Dialling, host: str, port: int) -> trio.abc.Stream:
    given = {
        name: value
        for name in ("local_address", "socket_options")
        if (value := getattr(dialling, name)) is not None
    }
    try:
        if dialling.uds is None:
            return await dialling.connector.connect_tcp(host, port, **given)
        given.pop("local_address", None)
        return await dialling.connector.connect_unix_socket(dialling.uds, **given)
    except (OSError, UnicodeError, trio.BrokenResourceError) as exc:
        where = f"{host}:{port}" if dialling.uds is None else dialling.uds
        raise ConnectError(f"could not connect to {where}: {_reason(exc)}") from exc


def _reason(exc: BaseException) -> str:
    """What lies at the bottom: Trio reports its attempts at several addresses as a group."""
    cause = exc.__cause__
    if isinstance(cause, BaseExceptionGroup):
        return "; ".join(str(inner) for inner in cause.exceptions)
    return str(exc) or type(exc).__name__
