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
from collections.abc import Sequence
from typing import Any

import trio

from .._exceptions import ConnectError
from .attempt import Attempt
from .connector import Connector, SocketOption, address_of, reason_of
from .network_stream import NOT_RAW, NetworkStream
from .transport import Transport


class Dialer(abc.ABC):
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


class DirectDialer(Dialer):
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
        info: dict[str, Any] = {"socket_options": self._socket_options}
        if self._uds is None:
            name = "connection.connect_tcp"
            info = {"host": host, "port": port, "local_address": self._local_address, **info}
        else:
            name = "connection.connect_unix_socket"
            info = {"path": self._uds, **info}
        async with attempt.step(f"connecting to {self._where(host, port)}", name, info) as step:
            transport = attempt.own(await attempt.budget.spend(self._dial, host, port))
            step.result = NetworkStream(transport, refusal=NOT_RAW)
        return transport

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
