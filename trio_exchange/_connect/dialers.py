"""The interface `Dialer`, which opens a byte stream to a host and port, and the direct one.

Theory of operation. A `Dialer` connects to any host and port. `DirectDialer` uses the pool's connector. A
dialer for a proxy (in `_proxies`) is made with the dialer that connects to the proxy itself, so that a chain
of proxies is a chain of dialers. Each step runs in an `Attempt`, which closes what was opened when a later
step fails.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import trio

from .._exceptions import ConnectError
from .attempt import Attempt
from .connector import Connector, SocketOption, join_host_port, reason_of
from .network_stream import NOT_RAW, NetworkStream
from .transport import Transport


class Dialer(abc.ABC):
    """Opens a byte stream to a host and port.

    Attributes:
        proxy_name: The name, in error messages, of the proxy that this dialer is used to connect to; None if
            it connects to origins.
    """

    proxy_name: str | None = None

    def peer_name(self, host: str, port: int) -> str:
        """Return the name of the host that is connected to, for error messages."""
        return join_host_port(host, port) if self.proxy_name is None else self.proxy_name

    @abc.abstractmethod
    async def connect(self, host: str, port: int, attempt: Attempt) -> Transport:
        """Connect to a host, without TLS.

        Args:
            host: Name or address; an IPv6 address may have a zone.
            port: Port number.
            attempt: The attempt that this is part of; it owns what is opened.

        Returns:
            A transport to the host, owned by the attempt.

        Raises:
            ConnectError: The connection could not be established.
            ConnectTimeout: The attempt's budget is exhausted.
        """


class DirectDialer(Dialer):
    """Connects without a proxy, by the pool's connector.

    Args:
        connector: Opens the streams.
        local_address: The address to connect from; None for any.
        uds: Path of a unix socket to connect to in place of every host and port; None for TCP.
        socket_options: Options for the connected socket; None for none.
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

    def peer_name(self, host: str, port: int) -> str:
        """Return the name of the host that is connected to, with the unix socket if there is one."""
        if self._uds is None:
            return super().peer_name(host, port)
        return self._uds if self.proxy_name is None else f"{self.proxy_name} at {self._uds}"

    async def connect(self, host: str, port: int, attempt: Attempt) -> Transport:
        """Connect by the connector. Arguments and errors are those of `Dialer.connect`."""
        info: dict[str, Any] = {"socket_options": self._socket_options}
        if self._uds is None:
            name = "connection.connect_tcp"
            info = {"host": host, "port": port, "local_address": self._local_address, **info}
        else:
            name = "connection.connect_unix_socket"
            info = {"path": self._uds, **info}
        async with attempt.step(f"connecting to {self.peer_name(host, port)}", name, info) as step:
            transport = attempt.own(await attempt.budget.spend(self._open, host, port))
            step.result = NetworkStream(transport, refusal=NOT_RAW)
        return transport

    async def _open(self, host: str, port: int) -> trio.abc.Stream:
        options: dict[str, Any] = {}
        if self._socket_options is not None:
            options["socket_options"] = self._socket_options
        try:
            if self._uds is not None:
                return await self._connector.connect_unix_socket(self._uds, **options)
            if self._local_address is not None:
                options["local_address"] = self._local_address
            return await self._connector.connect_tcp(host, port, **options)
        except (OSError, UnicodeError, trio.BrokenResourceError) as exc:
            reason = reason_of(exc, join_host_port(host, port))
            raise ConnectError(f"could not connect to {self.peer_name(host, port)}: {reason}") from exc
