"""SOCKS proxies (RFC 1928 and RFC 1929; SOCKS4 and SOCKS4A have no RFC).

Theory of operation. socksio makes the messages and parses the replies, but it needs each reply whole. So
`_Negotiation` receives exactly the bytes that a reply still lacks: however the network splits it, the reply
becomes complete, and no byte of the stream that follows it is consumed. Of a refusal only the code is
received, since some proxies truncate the rest.

A `socks4` or `socks5` proxy is given an IP address, which is looked up here. If a name has several addresses,
they are tried in order, each on a new connection: a SOCKS proxy closes the connection after a refusal.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, NoReturn

import socksio
import trio
from socksio import socks4, socks5

from .._connect.attempt import Attempt, close_forcefully
from .._connect.connector import reason_of
from .._connect.dialers import Dialer
from .._connect.network_stream import NOT_RAW, NetworkStream
from .._connect.transport import Transport, explain
from .._exceptions import ConnectError, ProxyError, copied, without_frames
from .._models import Proxy

_SOCKS4_MEANINGS = {
    0x5B: "request rejected or failed",
    0x5C: "the client's identd cannot be reached",
    0x5D: "the client's identd reports another user",
}
# RFC 1928, section 6.
_SOCKS5_MEANINGS = {
    1: "general SOCKS server failure",
    2: "connection not allowed by ruleset",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "TTL expired",
    7: "command not supported",
    8: "address type not supported",
}
# Address types (RFC 1928, section 5), with the length of an address.
_ADDRESS_LENGTHS = {1: 4, 4: 16}
_DOMAIN_NAME = 3


class SOCKSDialer(Dialer):
    """Connects through a SOCKS proxy.

    Args:
        dialer: Connects to the proxy.
        proxy: The proxy.
    """

    def __init__(self, dialer: Dialer, proxy: Proxy) -> None:
        self._dialer = dialer
        self._proxy = proxy
        origin = proxy.url.origin
        self._origin = str(origin)
        self._host = origin.host.decode("ascii")
        self._port = origin.port
        self._version = 4 if origin.scheme.startswith(b"socks4") else 5
        self._resolves_locally = origin.scheme in (b"socks4", b"socks5")

    async def connect(self, host: str, port: int, attempt: Attempt) -> Transport:
        """Have the proxy connect to the host. Arguments and errors are those of `Dialer.connect`.

        Raises:
            ProxyError: The proxy refused, or does not speak this version of SOCKS.
        """
        refusal: ProxyError | None = None
        # A zone is meaningful on this machine only (RFC 4007, section 6).
        for address in await self._addresses(host.partition("%")[0], port, attempt):
            result = await self._connect(address, port, attempt)
            if isinstance(result, Transport):
                return result
            refusal = result
        assert refusal is not None, "there was an address"
        # A copy: the traceback of a raised error refers to this frame, which refers to `refusal`.
        raise copied(refusal)

    async def _addresses(self, host: str, port: int, attempt: Attempt) -> list[str]:
        """Return the addresses to ask the proxy for, in order; a name if the proxy looks it up."""
        if _is_address(host):
            return [self._check_address(host)]
        if not self._resolves_locally:
            if len(host) > 255:
                raise ConnectError(f"a name for SOCKS can't be longer than 255 bytes: {host[:50]!r}...")
            return [host]
        info = {"host": host, "port": port}
        async with attempt.step(f"looking up {host}", "socks.getaddrinfo", info) as step:
            addresses: list[str] = await attempt.budget.spend(self._look_up, host, port)
            step.result = addresses
        return addresses

    def _check_address(self, address: str) -> str:
        if self._version == 4 and ":" in address:
            raise ConnectError(f"SOCKS4 knows only IPv4, so that it can't connect to {address}")
        if self._version == 4 and address.startswith("0.0.0."):
            raise ConnectError(f"SOCKS4 can't connect to {address}, which means that a name follows")
        return address

    async def _look_up(self, host: str, port: int) -> list[str]:
        family = socket.AF_INET if self._version == 4 else socket.AF_UNSPEC
        try:
            found = await trio.socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            raise ConnectError(f"could not look up {host}: {reason_of(exc)}") from exc
        if not found:
            raise ConnectError(f"could not look up {host}: it has no address")
        # getaddrinfo may return an address several times, and an IPv6 address with its zone.
        return list(dict.fromkeys(str(info[4][0]).partition("%")[0] for info in found))

    async def _connect(self, host: str, port: int, attempt: Attempt) -> Transport | ProxyError:
        """Ask for one address. A refusal is returned, not raised, since another address may be accepted."""
        transport = await self._dialer.connect(self._host, self._port, attempt)
        negotiation = _Negotiation(transport, self._proxy, self.peer_name(host, port))

        ask = negotiation.connect_4 if self._version == 4 else negotiation.connect_5
        info = {"proxy": self._proxy, "host": host, "port": port}
        try:
            async with attempt.step(f"waiting for the proxy {self._origin}", "socks.connect", info) as step:
                await attempt.budget.spend(ask, host, port)
                step.result = NetworkStream(transport, refusal=NOT_RAW)
        except ProxyError as exc:
            await close_forcefully(transport)
            refused, negotiation.refusal = exc is negotiation.refusal, None
            if refused:
                return without_frames(exc)
            raise
        return transport


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Negotiation:
    """The messages to and from a SOCKS proxy on one connection, until the proxy has connected to a host.

    Args:
        transport: The connection to the proxy.
        proxy: The proxy.
        peer_name: The name of the host, for error messages.

    Attributes:
        refusal: The error for an address that the proxy refused, as opposed to other errors.
    """

    def __init__(self, transport: Transport, proxy: Proxy, peer_name: str) -> None:
        self.refusal: ProxyError | None = None
        self._transport = transport
        self._auth = proxy.auth
        self._origin = str(proxy.url.origin)
        self._peer_name = peer_name

    async def connect_4(self, host: str, port: int) -> None:
        """Ask for a connection by SOCKS4, or by SOCKS4A if `host` is a name."""
        user = self._auth[0] if self._auth is not None else b""
        kind = socks4.SOCKS4Request if _is_address(host) else socks4.SOCKS4ARequest
        protocol = socks4.SOCKS4Connection(user)
        protocol.send(kind.from_address(socks4.SOCKS4Command.CONNECT, (host, port), user))
        await self._send(protocol)
        reply = await self._receive_code(version=0)
        if reply[1] != 0x5A:
            self._refuse_address(reply[1], _SOCKS4_MEANINGS)
        self._parse(protocol, reply + await self._receive(6))

    async def connect_5(self, host: str, port: int) -> None:
        """Ask for a connection by SOCKS5, after the authentication."""
        protocol: Any = socks5.SOCKS5Connection()
        await self._authenticate(protocol)
        address: Any = (host, port)
        protocol.send(socks5.SOCKS5CommandRequest.from_address(socks5.SOCKS5Command.CONNECT, address))
        await self._send(protocol)
        reply = await self._receive_code(version=5)
        if reply[1] != 0:
            self._refuse_address(reply[1], _SOCKS5_MEANINGS)
        reply += await self._receive(2)
        if reply[3] == _DOMAIN_NAME:
            reply += await self._receive(1)
            length = reply[4]
        else:
            length = _ADDRESS_LENGTHS.get(reply[3], 0)
        if not length:
            self._not_socks(reply)
        reply += await self._receive(length + 2)
        if reply[3] != _DOMAIN_NAME:
            self._parse(protocol, reply)

    async def _authenticate(self, protocol: Any) -> None:
        methods = [socks5.SOCKS5AuthMethod.NO_AUTH_REQUIRED]
        if self._auth is not None:
            methods.append(socks5.SOCKS5AuthMethod.USERNAME_PASSWORD)
        protocol.send(socks5.SOCKS5AuthMethodsRequest(methods))
        await self._send(protocol)
        reply = await self._receive_code(version=5)
        method = self._parse(protocol, reply).method
        if method not in methods:
            wanted = "a user name and a password" if self._auth is None else "another authentication"
            raise ProxyError(
                f"the proxy {self._origin} wants {wanted}",
                reply_code=reply[1],
                meaning="no acceptable methods",
            )
        if method is socks5.SOCKS5AuthMethod.USERNAME_PASSWORD and self._auth is not None:
            protocol.send(socks5.SOCKS5UsernamePasswordRequest(*self._auth))
            await self._send(protocol)
            # The reply has the version of this subnegotiation (RFC 1929, section 2).
            reply = await self._receive_code(version=1)
            if not self._parse(protocol, reply).success:
                raise self._refusal("authenticate", reply[1], "wrong user name or password")

    async def _send(self, protocol: Any) -> None:
        try:
            await self._transport.send_all(protocol.data_to_send())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise ProxyError(f"the proxy {self._origin} failed: {explain(exc)}") from exc

    async def _receive_code(self, *, version: int) -> bytes:
        """Receive the two bytes that begin every reply: a version, which is checked, and a code."""
        reply = await self._receive(2)
        if reply[0] != version:
            self._not_socks(reply)
        return reply

    async def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                received = await self._transport.receive_some(size - len(data))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise ProxyError(f"the proxy {self._origin} failed: {explain(exc)}") from exc
            if not received:
                raise ProxyError(f"the proxy {self._origin} closed the connection without a whole reply")
            data += received
        return data

    def _parse(self, protocol: Any, reply: bytes) -> Any:
        try:
            return protocol.receive_data(reply)
        except socksio.ProtocolError:
            self._not_socks(reply)

    def _not_socks(self, reply: bytes) -> NoReturn:
        raise ProxyError(f"the proxy {self._origin} does not speak this version of SOCKS: it sent {reply!r}")

    def _refuse_address(self, code: int, meanings: dict[int, str]) -> NoReturn:
        action = f"connect to {self._peer_name}"
        self.refusal = self._refusal(action, code, meanings.get(code, "unassigned"))
        raise self.refusal

    def _refusal(self, action: str, code: int, meaning: str) -> ProxyError:
        return ProxyError(
            f"the proxy {self._origin} refused to {action}: {meaning} ({code})",
            reply_code=code,
            meaning=meaning,
        )
