"""Opening TCP connections and unix sockets: the public `Connector`, and why connecting failed.

`trio.open_tcp_stream` reports failed attempts in an exception group, whose tracebacks form reference cycles.
This module takes the group apart, so that callers get an ordinary `OSError`.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import trio

from .._exceptions import bare
from .trio_internals import FAILED_ATTEMPT

#: The arguments of `setsockopt`: level, option and a value, or level, option, None and a length.
SocketOption: TypeAlias = tuple[int, int, int | bytes] | tuple[int, int, None, int]


class Connector:
    """Opens the byte streams that connections run on. Derive from it to replace one or both methods.

    An `OSError`, a `UnicodeError` (a name that can't be looked up) or a `trio.BrokenResourceError` that a
    method raises reaches the caller of the request as a `ConnectError`; every other exception reaches it
    unchanged. A call may be cancelled at any time, and must close what it has opened then.

    The pool notices when a server closes an idle connection, or sends unexpected data on it, if the stream
    is a `trio.SocketStream`. With other streams it notices only when it uses the connection again.
    """

    async def connect_tcp(
        self,
        host: str,
        port: int,
        *,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> trio.abc.Stream:
        """Connect over TCP, to the first of the host's addresses that accepts (RFC 8305).

        Args:
            host: Name or address; an IPv6 address may have a zone.
            port: Port number.
            local_address: The address to connect from. Passed only if the pool has one.
            socket_options: Options for the connected socket. Passed only if the pool has some.

        Returns:
            The connected stream, without TLS.

        Raises:
            OSError: The name could not be looked up, or every address failed. With several addresses the
                message gives the reason for each.
        """
        stream = await _open_tcp_stream(host, port, local_address)
        return _with_options(stream, socket_options)

    async def connect_unix_socket(
        self, path: str, *, socket_options: Iterable[SocketOption] | None = None
    ) -> trio.abc.Stream:
        """Connect to a unix socket.

        Args:
            path: The socket's path.
            socket_options: Options for the connected socket. Passed only if the pool has some.

        Returns:
            The connected stream, without TLS.

        Raises:
            OSError: The connection could not be established.
        """
        return _with_options(await trio.open_unix_socket(path), socket_options)


@functools.lru_cache(maxsize=256)
def _family_of(host: str) -> socket.AddressFamily | None:
    """Return the address family of an IP address, None for a name."""
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
        error = _without_group(exc, join_host_port(host, port))
    except BaseExceptionGroup as exc:
        # Trio makes its attempts in a nursery, which wraps a KeyboardInterrupt in a group.
        error = bare(exc)
    # Raised outside the `except` clause: otherwise the group, which contains the error, would be its
    # context, a reference cycle.
    try:
        raise error
    finally:
        del error


async def _connect_to_address(family: socket.AddressFamily, host: str, port: int) -> trio.SocketStream:
    """Connect to an IP address, without a look-up and without a nursery for parallel attempts."""
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def _without_group(exc: OSError, address: str) -> OSError:
    """Return one `OSError` for all failed attempts of Trio, without references to Trio's frames.

    Args:
        exc: The error that Trio raised.
        address: The host and port that the caller names in its own message.
    """
    attempts: Sequence[OSError] = _attempts(exc)
    for attempt in attempts:
        # Trio's frames refer to all attempts: each would be in a reference cycle.
        attempt.__traceback__ = None
    if len(attempts) > 1:
        numbers = {attempt.errno for attempt in attempts}
        number = numbers.pop() if len(numbers) == 1 else None
        reasons = reason_of(exc, address)
        # With an errno, OSError becomes the matching subclass, such as `ConnectionRefusedError`.
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


def join_host_port(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reason_of(exc: BaseException, address: str = "") -> str:
    """Return why connecting failed, for an error message.

    Args:
        exc: The failure. If Trio tried several addresses, its cause is a group with the error of each.
        address: The host and port that the message already names, and that need not be repeated.
    """
    # A host may have the same address twice.
    return "; ".join(dict.fromkeys(_reason_of_attempt(attempt, address) for attempt in _attempts(exc)))


def _attempts(exc: Any) -> Sequence[Any]:
    """Return the errors of all attempts: those in the group that is the cause, or the error alone."""
    group = exc.__cause__
    return group.exceptions if isinstance(group, BaseExceptionGroup) else (exc,)


def _reason_of_attempt(exc: BaseException, known_address: str) -> str:
    if not isinstance(exc, OSError) or not exc.strerror:
        return str(exc) or type(exc).__name__
    attempt = FAILED_ATTEMPT.fullmatch(exc.strerror)
    if attempt is None or exc.errno is None:
        return exc.strerror
    reason = os.strerror(exc.errno)
    address = join_host_port(attempt[1], int(attempt[2]))
    return reason if address == known_address else f"{reason} ({address})"
