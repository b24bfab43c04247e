"""TODO _connect.connector."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import trio

from .._exceptions import bare
from .trio_internals import FAILED_ATTEMPT

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


def _reason_of_attempt(exc: BaseException, where: str) -> str:
    if not isinstance(exc, OSError) or not exc.strerror:
        return str(exc) or type(exc).__name__
    attempt = FAILED_ATTEMPT.fullmatch(exc.strerror)
    if attempt is None or exc.errno is None:
        return exc.strerror
    reason = os.strerror(exc.errno)
    address = address_of(attempt[1], int(attempt[2]))
    return reason if address == where else f"{reason} ({address})"
