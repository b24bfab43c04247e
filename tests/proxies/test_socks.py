from __future__ import annotations

import itertools
import logging
import socket
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.harness.certificates import alpn_server, make_tls
from tests.harness.checks import assert_unharmed
from tests.harness.h2peer import H2Peer
from tests.harness.peers import DELIVERIES, Script, respond, swallow
from tests.harness.sweep import TrackedStream
from tests.harness.traces import Events
from trio_exchange import (
    ConnectError,
    ConnectionPool,
    ConnectTimeout,
    ExchangeError,
    NetworkStream,
    Proxy,
    ProxyError,
)
from trio_exchange.testing import MemoryConnector, ScriptedPeer

URL = "http://example.com/"
ADDRESS = "http://192.0.2.7/"

# What a client says, with the port 80.
TO_IPV4 = b"\5\1\0\1\xc0\0\2\7\0\x50"
TO_NAME = b"\5\1\0\3\x0bexample.com\0\x50"
NO_AUTH = b"\5\1\0"
EITHER = b"\5\2\0\2"
PASSWORD = b"\1\4user\6secret"
TO_IPV4_BY_4 = b"\4\1\0\x50\xc0\0\2\7"
TO_NAME_BY_4A = b"\4\1\0\x50\0\0\0\xff"

# What a proxy answers.
GRANTED_BY_4 = b"\0\x5a\x1f\x90\xc0\0\2\1"
BOUND_TO_IPV4 = b"\5\0\0\1\xc0\0\2\1\x1f\x90"
BOUND_TO_IPV6 = b"\5\0\0\4" + b"\x20\1\x0d\xb8" + bytes(11) + b"\1" + b"\x1f\x90"
BOUND_TO_NAME = b"\5\0\0\3\x09localhost\x1f\x90"
# Not even text.
BOUND_TO_BYTES = b"\5\0\0\3\3\xff\0\xfe\x1f\x90"


@dataclass(frozen=True)
class Case:
    """A negotiation: what is asked of whom, what is said, and the answers to that."""

    scheme: str
    talk: tuple[tuple[bytes, bytes], ...]
    url: str = URL
    auth: tuple[str, str] | None = None

    @property
    def proxy(self) -> Proxy:
        return Proxy(f"{self.scheme}://proxy.example", auth=self.auth)


USER = ("user", "")
USER_AND_PASSWORD = ("user", "secret")

CASES = {
    "socks4": Case("socks4", ((TO_IPV4_BY_4 + b"\0", GRANTED_BY_4),)),
    "socks4 with a user": Case("socks4", ((TO_IPV4_BY_4 + b"user\0", GRANTED_BY_4),), auth=USER),
    "socks4 to an address": Case("socks4", ((TO_IPV4_BY_4 + b"\0", GRANTED_BY_4),), url=ADDRESS),
    "socks4a": Case("socks4a", ((TO_NAME_BY_4A + b"\0example.com\0", GRANTED_BY_4),)),
    "socks4a with a user": Case(
        "socks4a", ((TO_NAME_BY_4A + b"user\0example.com\0", GRANTED_BY_4),), auth=USER
    ),
    "socks4a to an address": Case("socks4a", ((TO_IPV4_BY_4 + b"\0", GRANTED_BY_4),), url=ADDRESS),
    "socks5": Case("socks5", ((NO_AUTH, b"\5\0"), (TO_IPV4, BOUND_TO_IPV4))),
    "socks5 to an address": Case("socks5", ((NO_AUTH, b"\5\0"), (TO_IPV4, BOUND_TO_IPV4)), url=ADDRESS),
    "socks5 to IPv6": Case(
        "socks5",
        (
            (NO_AUTH, b"\5\0"),
            (b"\5\1\0\4" + b"\x20\1\x0d\xb8" + bytes(11) + b"\2" + b"\1\xbb", BOUND_TO_IPV6),
        ),
        url="http://[2001:db8::2]:443/",
    ),
    "socks5 to a zone": Case(
        "socks5",
        ((NO_AUTH, b"\5\0"), (b"\5\1\0\4\xfe\x80" + bytes(13) + b"\1" + b"\0\x50", BOUND_TO_IPV4)),
        url="http://[fe80::1%25eth0]/",
    ),
    "socks5 with a password": Case(
        "socks5",
        ((EITHER, b"\5\2"), (PASSWORD, b"\1\0"), (TO_IPV4, BOUND_TO_IPV4)),
        auth=USER_AND_PASSWORD,
    ),
    "socks5 with a password not wanted": Case(
        "socks5", ((EITHER, b"\5\0"), (TO_IPV4, BOUND_TO_IPV4)), auth=USER_AND_PASSWORD
    ),
    "socks5 with an empty password": Case(
        "socks5", ((EITHER, b"\5\2"), (b"\1\4user\0", b"\1\0"), (TO_IPV4, BOUND_TO_IPV4)), auth=USER
    ),
    "socks5h": Case("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_NAME))),
    "socks5h bound to bytes": Case("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_BYTES))),
    "socks5h to an address": Case("socks5h", ((NO_AUTH, b"\5\0"), (TO_IPV4, BOUND_TO_IPV6)), url=ADDRESS),
    "socks5h to a zone": Case(
        "socks5h",
        ((NO_AUTH, b"\5\0"), (b"\5\1\0\4\xfe\x80" + bytes(13) + b"\1" + b"\0\x50", BOUND_TO_IPV4)),
        url="http://[fe80::1%25eth0]/",
    ),
    "socks5h with a password": Case(
        "socks5h",
        ((EITHER, b"\5\2"), (PASSWORD, b"\1\0"), (TO_NAME, BOUND_TO_IPV4)),
        auth=USER_AND_PASSWORD,
    ),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# -- The proxy, the network, and the look-up.


async def expect(peer: ScriptedPeer, expected: bytes) -> None:
    """Receive exactly these bytes, unless the client has gone: then the script ends."""
    received = b""
    while len(received) < len(expected):
        data = await peer.receive_some(len(expected) - len(received))
        if not (data or received):
            raise trio.BrokenResourceError("the client has gone")
        assert expected.startswith(received + data), (expected, received, data)
        assert data, "the client has gone in the middle of a message"
        received += data


def socks(
    *talk: tuple[bytes, bytes], then: Script = respond, byte_by_byte: bool = False, delay: float = 0
) -> Script:
    """A proxy that is told exactly this, and answers so; `then` plays the origin."""

    async def script(peer: ScriptedPeer) -> None:
        for request, reply in talk:
            await expect(peer, request)
            if delay:
                await trio.sleep(delay)
            await peer.send(reply, byte_by_byte=byte_by_byte)
        await then(peer)

    return script


def in_turn(*scripts: Script) -> Script:
    """Every connection gets the next script."""
    left = iter(scripts)

    async def script(peer: ScriptedPeer) -> None:
        await next(left)(peer)

    return script


async def hang_up(peer: ScriptedPeer) -> None:
    """End the connection."""


class Network(MemoryConnector):
    """Connections to a script, none of which may be forgotten, nor be dialled in no time."""

    def __init__(self, nursery: trio.Nursery, script: Script, *, delay: float = 0) -> None:
        super().__init__(nursery, script, stream_pair=self._pair)
        self.streams: list[TrackedStream] = []
        self._delay = delay

    def _pair(self) -> tuple[trio.abc.Stream, trio.abc.Stream]:
        client, server = trio.testing.memory_stream_pair()
        self.streams.append(self._track(client))
        return self.streams[-1], server

    def _track(self, client: Any) -> TrackedStream:
        return TrackedStream(client)

    async def connect_tcp(self, host: str, port: int, **options: Any) -> trio.abc.Stream:
        if self._delay:
            await trio.sleep(self._delay)
        return await super().connect_tcp(host, port, **options)

    @property
    def open(self) -> int:
        return sum(not stream.closed for stream in self.streams)


class Resolver(trio.abc.HostnameResolver):
    """Finds for every name what a test says."""

    def __init__(self) -> None:
        self.addresses: list[str] = ["192.0.2.7"]
        self.failure: Exception | None = None
        self.delay = 0.0
        self.asked: list[tuple[Any, ...]] = []

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        self.asked.append((host, port, family, type))
        await trio.sleep(self.delay)
        if self.failure is not None:
            raise self.failure
        return [(family, type, 6, "", (address, port)) for address in self.addresses]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


@pytest.fixture
async def resolver() -> Resolver:
    return set_resolver()


def set_resolver() -> Resolver:
    resolver = Resolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    return resolver


def pool_through(proxy: Proxy | list[Proxy], connector: MemoryConnector, **options: Any) -> ConnectionPool:
    """A pool with one place, which whoever fails has to leave."""
    return ConnectionPool(make_tls().client, proxy=proxy, connector=connector, max_connections=1, **options)


async def fail(
    nursery: trio.Nursery,
    case: Case,
    script: Script,
    error: type[ExchangeError] = ProxyError,
    *,
    url: str | None = None,
    extensions: dict[str, Any] | None = None,
    network: type[Network] = Network,
    **options: Any,
) -> Any:
    """Let a request fail on a connection to `script`, and check that the next one does not; the error."""
    connector = network(nursery, in_turn(script, socks(*case.talk)))
    async with pool_through(case.proxy, connector, **options) as pool:
        with pytest.raises(error) as info:
            await pool.request("GET", url or case.url, extensions=extensions)
        assert type(info.value) is error
        assert_unharmed(pool)
        assert connector.open == 0
        assert (await pool.request("GET", case.url)).status == 200
        assert_unharmed(pool, idle=1)
    assert connector.open == 0
    return info.value


# -- What is said.


@DELIVERIES
@every_case
async def test_every_byte_of_a_negotiation(
    nursery: trio.Nursery, resolver: Resolver, case: Case, byte_by_byte: bool
) -> None:
    connector = Network(nursery, socks(*case.talk, byte_by_byte=byte_by_byte))
    async with pool_through(case.proxy, connector) as pool:
        response = await pool.request("PUT", case.url, content=b"hello")
        assert response.content == b"hello"
        # The connection is kept as any other.
        assert (await pool.request("PUT", case.url, content=b"again")).content == b"again"
        assert_unharmed(pool, idle=1)
    assert [dialled.address for dialled in connector.dialled] == [("proxy.example", 1080)]
    assert connector.open == 0


@pytest.mark.parametrize(
    ("scheme", "family"), [("socks4", socket.AF_INET), ("socks5", socket.AF_UNSPEC), ("socks5h", None)]
)
async def test_who_looks_names_up(
    nursery: trio.Nursery, resolver: Resolver, scheme: str, family: int | None
) -> None:
    connector = Network(nursery, socks(*CASES[scheme].talk))
    async with pool_through(Proxy(f"{scheme}://proxy.example"), connector) as pool:
        await pool.request("GET", URL)
    asked = [(b"example.com", 80, family, socket.SOCK_STREAM)]
    assert resolver.asked == (asked if family is not None else [])


@pytest.mark.parametrize("name", ["socks4 to an address", "socks5 to an address", "socks5 to IPv6"])
async def test_an_address_is_not_looked_up(nursery: trio.Nursery, resolver: Resolver, name: str) -> None:
    connector = Network(nursery, socks(*CASES[name].talk))
    async with pool_through(CASES[name].proxy, connector) as pool:
        await pool.request("GET", CASES[name].url)
    assert resolver.asked == []


@pytest.mark.parametrize("scheme", ["socks4", "socks4a"])
async def test_socks4_knows_no_ipv6(nursery: trio.Nursery, resolver: Resolver, scheme: str) -> None:
    connector = Network(nursery, socks(*CASES[scheme].talk))
    async with pool_through(Proxy(f"{scheme}://proxy.example"), connector) as pool:
        with pytest.raises(ConnectError, match=r"SOCKS4 knows only IPv4, .* 2001:db8::2"):
            await pool.request("GET", "http://[2001:db8::2]/")
        assert connector.dialled == []
        assert_unharmed(pool)
        assert (await pool.request("GET", URL)).status == 200


@pytest.mark.parametrize("length", [63, 255])
async def test_a_name_may_have_255_bytes(nursery: trio.Nursery, length: int) -> None:
    name = b".".join(itertools.repeat(b"x" * 63, (length + 1) // 64))
    request = b"\5\1\0\3%c%b\0\x50" % (length, name)
    connector = Network(nursery, socks((NO_AUTH, b"\5\0"), (request, BOUND_TO_IPV4)))
    async with pool_through(Proxy("socks5h://proxy.example"), connector) as pool:
        assert (await pool.request("GET", f"http://{name.decode()}/")).status == 200


@pytest.mark.parametrize("scheme", ["socks4a", "socks5h"])
async def test_a_longer_name_is_an_error_before_anything_is_dialled(
    nursery: trio.Nursery, scheme: str
) -> None:
    connector = Network(nursery, socks(*CASES[scheme].talk))
    async with pool_through(Proxy(f"{scheme}://proxy.example"), connector) as pool:
        with pytest.raises(ConnectError, match="longer than 255 bytes: 'xxx"):
            await pool.request("GET", f"http://{'x' * 256}/")
        assert connector.dialled == []
        assert_unharmed(pool)
        assert (await pool.request("GET", URL)).status == 200


# -- Names with several addresses.

REFUSED = b"\5\5\0\1\0\0\0\0\0\0"


def to_address(address: str) -> bytes:
    if ":" in address:
        return b"\5\1\0\4%b\0\x50" % socket.inet_pton(socket.AF_INET6, address)
    return b"\5\1\0\1%b\0\x50" % socket.inet_aton(address)


def refusing(address: str, reply: bytes = REFUSED) -> Script:
    return socks((NO_AUTH, b"\5\0"), (to_address(address), reply), then=swallow)


def accepting(address: str) -> Script:
    return socks((NO_AUTH, b"\5\0"), (to_address(address), BOUND_TO_IPV4))


async def test_addresses_are_tried_one_after_the_other(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.1", "2001:db8::2", "fe80::3%1", "192.0.2.4"]
    scripts = (
        refusing("192.0.2.1"),
        refusing("2001:db8::2", b"\5\x08"),
        refusing("fe80::3", b"\5\x63"),
        accepting("192.0.2.4"),
    )
    connector = Network(nursery, in_turn(*scripts))
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        assert (await pool.request("GET", URL)).status == 200
        assert len(connector.streams) == 4
        assert connector.open == 1
        assert_unharmed(pool, idle=1)
    assert len(resolver.asked) == 1


async def test_socks4_tries_them_too(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.7"]
    refused = socks((b"\4\1\0\x50\xc0\0\2\1\0", b"\0\x5b" + bytes(6)), then=swallow)
    connector = Network(nursery, in_turn(refused, socks(*CASES["socks4"].talk)))
    async with pool_through(Proxy("socks4://proxy.example"), connector) as pool:
        assert (await pool.request("GET", URL)).status == 200
    assert len(connector.streams) == 2


async def test_when_all_are_refused_the_last_one_is_the_error(
    nursery: trio.Nursery, resolver: Resolver
) -> None:
    resolver.addresses = ["192.0.2.1", "2001:db8::2"]
    scripts = refusing("192.0.2.1", b"\5\3"), refusing("2001:db8::2", b"\5\4")
    connector = Network(nursery, in_turn(*scripts))
    async with pool_through(Proxy("socks5://proxy.example"), connector, retries=3) as pool:
        with pytest.raises(ProxyError, match="2001:db8::2") as info:
            await pool.request("GET", URL)
        assert info.value.reply_code == 4
        assert_unharmed(pool)
    assert len(connector.streams) == 2
    assert connector.open == 0


@pytest.mark.parametrize("reply", [b"", b"\4\0", b"\5\0\0\7", b"\5"], ids=repr)
async def test_an_error_without_code_is_the_end(
    nursery: trio.Nursery, resolver: Resolver, reply: bytes
) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.2"]
    script = socks((NO_AUTH, b"\5\0"), (to_address("192.0.2.1"), reply), then=hang_up)
    connector = Network(nursery, in_turn(script))
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL)
        assert info.value.reply_code is None
        assert_unharmed(pool)
    assert connector.open == 0


@pytest.mark.parametrize(
    "talk",
    [((EITHER, b"\5\xff"),), ((EITHER, b"\5\2"), (PASSWORD, b"\1\1"))],
    ids=["no method", "wrong password"],
)
async def test_credentials_are_not_tried_with_each_address(
    nursery: trio.Nursery, resolver: Resolver, talk: tuple[tuple[bytes, bytes], ...]
) -> None:
    """A user might be locked out for that."""
    resolver.addresses = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    connector = Network(nursery, in_turn(socks(*talk, then=swallow)))
    async with pool_through(CASES["socks5 with a password"].proxy, connector) as pool:
        with pytest.raises(ProxyError):
            await pool.request("GET", URL)
        assert_unharmed(pool)
    assert len(connector.streams) == 1
    assert connector.open == 0


async def test_a_name_without_address(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = []
    connector = Network(nursery, swallow)
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        with pytest.raises(ConnectError, match=r"could not look up example\.com: it has no address"):
            await pool.request("GET", URL)
        assert_unharmed(pool)
    assert connector.streams == []


async def test_an_address_of_ipv6_is_shown_as_such(nursery: trio.Nursery) -> None:
    case = CASES["socks5 to IPv6"]
    error = await fail(nursery, case, socks(case.talk[0], (case.talk[1][0], REFUSED), then=swallow))
    assert "refused to connect to [2001:db8::2]:443: connection refused (5)" in str(error)


class Unclosable(TrackedStream):
    """Closed all the same, but not without complaint."""

    async def aclose(self) -> None:
        await super().aclose()
        raise OSError("closing failed")


class NetworkOfUnclosable(Network):
    def _track(self, client: Any) -> TrackedStream:
        return Unclosable(client)


async def test_the_closing_of_a_refused_connection_does_not_matter(nursery: trio.Nursery) -> None:
    case = CASES["socks5h"]
    script = socks(case.talk[0], (TO_NAME, REFUSED), then=swallow)
    error = await fail(nursery, case, script, network=NetworkOfUnclosable)
    assert error.reply_code == 5


async def test_a_proxy_that_can_not_be_dialled_again(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.2"]

    async def script(peer: ScriptedPeer) -> None:
        connector.failures.append(OSError("gone"))
        await refusing("192.0.2.1")(peer)

    connector = Network(nursery, script)
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        with pytest.raises(
            ConnectError, match=r"could not connect to the proxy socks5://proxy\.example:1080: gone"
        ):
            await pool.request("GET", URL)
        assert_unharmed(pool)
    assert connector.open == 0


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown name"), "unknown name"),
        (UnicodeError("label too long"), "label too long"),
        (OSError(), "OSError"),
    ],
)
@pytest.mark.parametrize("scheme", ["socks4", "socks5"])
async def test_a_look_up_that_fails_is_a_connect_error(
    nursery: trio.Nursery, resolver: Resolver, failure: Exception, reason: str, scheme: str
) -> None:
    connector = Network(nursery, socks(*CASES[scheme].talk))
    async with pool_through(Proxy(f"{scheme}://proxy.example"), connector) as pool:
        resolver.failure = failure
        with pytest.raises(ConnectError, match=rf"could not look up example\.com: .*{reason}") as info:
            await pool.request("GET", URL)
        assert info.value.__cause__ is failure
        assert connector.dialled == []
        assert_unharmed(pool)
        resolver.failure = None
        assert (await pool.request("GET", URL)).status == 200


async def test_a_look_up_that_fails_is_tried_again(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock
) -> None:
    resolver.failure = socket.gaierror(socket.EAI_AGAIN, "try again")
    connector = Network(nursery, respond)
    async with pool_through(Proxy("socks5://proxy.example"), connector, retries=2) as pool:
        with pytest.raises(ConnectError):
            await pool.request("GET", URL)
    assert len(resolver.asked) == 3


# -- Refusals.

MEANINGS = {
    1: "general SOCKS server failure",
    2: "connection not allowed by ruleset",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "TTL expired",
    7: "command not supported",
    8: "address type not supported",
    9: "unassigned",
    0x80: "unassigned",
    0xFF: "unassigned",
}
MEANINGS_OF_4 = {
    0x5B: "request rejected or failed",
    0x5C: "the client's identd cannot be reached",
    0x5D: "the client's identd reports another user",
    0x5E: "unassigned",
    0: "unassigned",
    0xFF: "unassigned",
}


@pytest.mark.parametrize("end", [b"", b"\0\1\0\0\0\0\0\0", b"\0\1"], ids=["short", "whole", "half"])
@pytest.mark.parametrize("then", [hang_up, swallow])
@pytest.mark.parametrize("code", MEANINGS)
async def test_refusals_of_socks5(
    nursery: trio.Nursery, autojump_clock: MockClock, code: int, then: Script, end: bytes
) -> None:
    case = CASES["socks5h with a password"]
    script = socks(*case.talk[:2], (TO_NAME, bytes((5, code)) + end), then=then)
    error = await fail(nursery, case, script, extensions={"timeout": {"connect": 5}})
    assert (error.reply_code, error.meaning, error.response) == (code, MEANINGS[code], None)
    assert str(error) == (
        "the proxy socks5h://proxy.example:1080 refused to connect to example.com:80: "
        f"{MEANINGS[code]} ({code})"
    )
    assert trio.current_time() == 0


@DELIVERIES
@pytest.mark.parametrize("end", [b"", bytes(6), bytes(3)], ids=["short", "whole", "half"])
@pytest.mark.parametrize("then", [hang_up, swallow])
@pytest.mark.parametrize("code", MEANINGS_OF_4)
async def test_refusals_of_socks4(
    nursery: trio.Nursery, code: int, then: Script, end: bytes, byte_by_byte: bool
) -> None:
    case = CASES["socks4a with a user"]
    script = socks((case.talk[0][0], bytes((0, code)) + end), then=then, byte_by_byte=byte_by_byte)
    error = await fail(nursery, case, script)
    assert (error.reply_code, error.meaning, error.response) == (code, MEANINGS_OF_4[code], None)
    assert str(error) == (
        "the proxy socks4a://proxy.example:1080 refused to connect to example.com:80: "
        f"{MEANINGS_OF_4[code]} ({code})"
    )


@pytest.mark.parametrize("code", [1, 2, 0xFF])
async def test_a_wrong_password(nursery: trio.Nursery, code: int) -> None:
    case = CASES["socks5h with a password"]
    script = socks(case.talk[0], (PASSWORD, bytes((1, code))), then=swallow)
    error = await fail(nursery, case, script)
    assert (error.reply_code, error.meaning) == (code, "wrong user name or password")
    assert str(error) == (
        "the proxy socks5h://proxy.example:1080 refused to authenticate: "
        f"wrong user name or password ({code})"
    )


@pytest.mark.parametrize("method", [1, 2, 0xFF], ids=["GSSAPI", "password", "none"])
async def test_a_proxy_that_wants_a_password(nursery: trio.Nursery, method: int) -> None:
    case = CASES["socks5h"]
    error = await fail(nursery, case, socks((NO_AUTH, bytes((5, method))), then=swallow))
    assert (error.reply_code, error.meaning, error.response) == (method, "no acceptable methods", None)
    assert str(error) == "the proxy socks5h://proxy.example:1080 wants a user name and a password"


@pytest.mark.parametrize("method", [1, 0xFF], ids=["GSSAPI", "none"])
async def test_a_proxy_that_wants_no_password_either(nursery: trio.Nursery, method: int) -> None:
    case = CASES["socks5h with a password"]
    error = await fail(nursery, case, socks((EITHER, bytes((5, method))), then=swallow))
    assert (error.reply_code, error.meaning, error.response) == (method, "no acceptable methods", None)
    assert str(error) == "the proxy socks5h://proxy.example:1080 wants another authentication"


@pytest.mark.parametrize(
    ("name", "talk", "sent"),
    [
        ("socks5h", ((NO_AUTH, b"\5\x7f"),), b"\5\x7f"),
        ("socks5h", ((NO_AUTH, b"\4\0"),), b"\4\0"),
        ("socks5h", ((NO_AUTH, b"HTTP/1.1 400 Bad Request\r\n\r\n"),), b"HT"),
        ("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, b"\4\0\0\1\0\0\0\0\0\0")), b"\4\0"),
        ("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, b"\0\1")), b"\0\1"),
        ("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, b"\5\0\0\0\0\0\0\0\0\0")), b"\5\0\0\0"),
        ("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, b"\5\0\0\2\0\0\0\0\0\0")), b"\5\0\0\2"),
        ("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, b"\5\0\0\xff\0\0\0\0\0\0")), b"\5\0\0\xff"),
        ("socks5h", ((NO_AUTH, b"\5\0"), (TO_NAME, b"\5\0\0\3\0\0\0")), b"\5\0\0\3\0"),
        ("socks4a", ((TO_NAME_BY_4A + b"\0example.com\0", b"\4\x5a" + bytes(6)),), b"\4\x5a"),
        ("socks4a", ((TO_NAME_BY_4A + b"\0example.com\0", b"HTTP/1.1 400 No\r\n"),), b"HT"),
        ("socks5h with a password", ((EITHER, b"\5\2"), (PASSWORD, b"\5\0")), b"\5\0"),
    ],
)
async def test_what_is_not_socks(
    nursery: trio.Nursery, name: str, talk: tuple[tuple[bytes, bytes], ...], sent: bytes
) -> None:
    case = CASES[name]
    error = await fail(nursery, case, socks(*talk, then=swallow))
    assert (error.reply_code, error.meaning, error.response) == (None, None, None)
    assert str(error) == (
        f"the proxy {case.scheme}://proxy.example:1080 does not speak this version of SOCKS: it sent {sent!r}"
    )


@pytest.mark.parametrize("retries", [0, 3])
async def test_a_refusal_is_not_tried_again(nursery: trio.Nursery, retries: int) -> None:
    error = await fail(nursery, CASES["socks5h"], socks((NO_AUTH, b"\5\xff"), then=swallow), retries=retries)
    assert error.reply_code == 0xFF


# -- Replies in pieces, and their ends.


@every_case
async def test_a_reply_that_ends_early(nursery: trio.Nursery, resolver: Resolver, case: Case) -> None:
    for step, (request, reply) in enumerate(case.talk):
        for length in range(len(reply)):
            script = socks(*case.talk[:step], (request, reply[:length]), then=hang_up)
            error = await fail(nursery, case, script)
            assert (error.reply_code, error.response) == (None, None)
            assert str(error) == (
                f"the proxy {case.scheme}://proxy.example:1080 closed the connection without a whole reply"
            )


@every_case
async def test_what_follows_the_reply_is_the_origins(
    nursery: trio.Nursery, resolver: Resolver, case: Case
) -> None:
    *before, (request, reply) = case.talk
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    connector = Network(nursery, socks(*before, (request, reply + answer), then=swallow))
    async with pool_through(case.proxy, connector) as pool:
        assert (await pool.request("GET", case.url)).content == b"hello"


@every_case
async def test_what_follows_the_reply_is_in_the_raw_stream(
    nursery: trio.Nursery, resolver: Resolver, case: Case
) -> None:
    *before, (request, reply) = case.talk
    connector = Network(nursery, socks(*before, (request, reply + b"ready"), then=swallow))
    url = Proxy(case.url).url.origin
    async with pool_through(case.proxy, connector) as pool:
        stream = await pool.open_tcp_stream(url.host, url.port)
        assert await stream.read(2) == b"re"
        assert await stream.read() == b"ady"
        await stream.aclose()


async def test_what_follows_the_reply_reaches_tls(nursery: trio.Nursery) -> None:
    case = CASES["socks5h"]
    request = TO_NAME[:-2] + b"\1\xbb"
    script = socks((NO_AUTH, b"\5\0"), (request, BOUND_TO_NAME + b"this is no TLS"), then=swallow)
    error = await fail(nursery, case, script, ConnectError, url="https://example.com/")
    assert "the TLS handshake with example.com failed" in str(error)


def failing_at(count: int, operation: str) -> type[Network]:
    """Connections of which the first breaks at an operation."""

    class Failing(TrackedStream):
        left = count

        def _count(self, name: str) -> None:
            if name == operation:
                self.left -= 1
                if self.left < 0:
                    raise trio.BrokenResourceError("the cable was cut")

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            self._count("send")
            await super().send_all(data)

        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            self._count("receive")
            return await super().receive_some(max_bytes)

    class FailingNetwork(Network):
        def _track(self, client: Any) -> TrackedStream:
            return TrackedStream(client) if self.streams else Failing(client)

    return FailingNetwork


@pytest.mark.parametrize("operation", ["send", "receive"])
@pytest.mark.parametrize("name", ["socks4", "socks4a", "socks5", "socks5h with a password"])
async def test_a_connection_that_breaks(
    nursery: trio.Nursery, resolver: Resolver, name: str, operation: str
) -> None:
    case = CASES[name]
    script = socks(*case.talk, then=swallow)
    for count in range(len(case.talk)):
        error = await fail(nursery, case, script, network=failing_at(count, operation))
        assert (error.reply_code, error.meaning, error.response) == (None, None, None)
        assert str(error) == f"the proxy {case.scheme}://proxy.example:1080 failed: the cable was cut"
        assert isinstance(error.__cause__, trio.BrokenResourceError)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(["socks4", "socks4a", "socks5", "socks5h", "socks5h with a password"]),
    pieces=st.lists(st.one_of(st.binary(max_size=20), st.sampled_from([b"\5", b"\0", b"\5\0", b"\0\x5a"]))),
    right=st.integers(0, 3),
    closes=st.booleans(),
)
def test_whatever_a_proxy_says_ends_the_request(
    name: str, pieces: list[bytes], right: int, closes: bool
) -> None:
    """After some replies that are right comes anything."""
    case = CASES[name]

    async def script(peer: ScriptedPeer) -> None:
        for request, reply in case.talk[:right]:
            await expect(peer, request)
            await peer.send(reply)
        for piece in pieces:
            await peer.send(piece)
            await trio.testing.wait_all_tasks_blocked()
        if not closes:
            await swallow(peer)

    async def main() -> None:
        set_resolver()
        async with trio.open_nursery() as nursery:
            connector = Network(nursery, script)
            async with pool_through(case.proxy, connector) as pool:
                timeout = {"connect": 5, "read": 5}
                with pytest.raises(ExchangeError):
                    await pool.request("GET", URL, extensions={"timeout": timeout})
                await trio.testing.wait_all_tasks_blocked()
                assert_unharmed(pool)
                assert connector.open == 0
                assert trio.current_time() - began <= 5

    clock = MockClock(autojump_threshold=0)
    began = clock.current_time()
    trio.run(main, clock=clock)


# -- Time.


def steps_of(case: Case) -> list[Script]:
    """For every message of a proxy: a proxy that is mute instead."""
    scripts = [
        socks(*case.talk[:step], (case.talk[step][0], b""), then=swallow) for step in range(len(case.talk))
    ]
    return [swallow, *scripts, socks(*case.talk, then=swallow)]


CASE_WITH_EVERYTHING = Case(
    "socks5",
    ((EITHER, b"\5\2"), (PASSWORD, b"\1\0"), (TO_IPV4[:-2] + b"\1\xbb", BOUND_TO_IPV4)),
    "https://example.com/",
    USER_AND_PASSWORD,
)


async def tls_origin(peer: ScriptedPeer) -> None:
    await peer.start_tls(make_tls().server)
    await respond(peer)


@pytest.mark.parametrize("script", steps_of(CASE_WITH_EVERYTHING), ids=range(5))
async def test_the_connect_timeout_ends_every_step(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock, script: Script
) -> None:
    resolver.delay = 1
    good = socks(*CASE_WITH_EVERYTHING.talk, then=tls_origin)
    connector = Network(nursery, in_turn(script, good), delay=1)
    async with pool_through(CASE_WITH_EVERYTHING.proxy, connector) as pool:
        extensions = {"timeout": {"connect": 5}}
        with pytest.raises(ConnectTimeout, match="within 5 seconds"):
            await pool.request("GET", CASE_WITH_EVERYTHING.url, extensions=extensions)
        assert trio.current_time() == 5
        assert_unharmed(pool)
        assert connector.open == 0
        assert (await pool.request("GET", CASE_WITH_EVERYTHING.url, extensions=extensions)).status == 200


@pytest.mark.parametrize("limit", [*range(1, 7), 7.5])
async def test_the_connect_timeout_is_one_budget_for_all_steps(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock, limit: float
) -> None:
    """Look-up, dialling, three replies and TLS take a second each, one of them half a second more."""

    async def slow_tls(peer: ScriptedPeer) -> None:
        await trio.sleep(1.5)
        await tls_origin(peer)

    resolver.delay = 1
    connector = Network(nursery, socks(*CASE_WITH_EVERYTHING.talk, then=slow_tls, delay=1), delay=1)
    async with pool_through(CASE_WITH_EVERYTHING.proxy, connector) as pool:
        extensions = {"timeout": {"connect": limit}}
        if limit > 6.5:
            assert (await pool.request("GET", "https://example.com/", extensions=extensions)).status == 200
            assert trio.current_time() == 6.5
            assert_unharmed(pool, idle=1)
        else:
            with pytest.raises(ConnectTimeout):
                await pool.request("GET", "https://example.com/", extensions=extensions)
            assert trio.current_time() == limit
            assert_unharmed(pool)
            assert connector.open == 0


async def test_the_look_up_has_no_more_time_than_the_rest(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock
) -> None:
    resolver.delay = 10
    connector = Network(nursery, socks(*CASES["socks5"].talk))
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        with pytest.raises(ConnectTimeout):
            await pool.request("GET", URL, extensions={"timeout": {"connect": 5}})
        assert trio.current_time() == 5
        assert connector.dialled == []
        assert_unharmed(pool)
        assert (await pool.request("GET", URL)).status == 200


async def test_several_addresses_share_the_budget(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock
) -> None:
    resolver.addresses = [f"192.0.2.{number}" for number in range(1, 6)]

    async def script(peer: ScriptedPeer) -> None:
        await expect(peer, NO_AUTH)
        await peer.send(b"\5\0")
        await expect(peer, to_address(resolver.addresses[len(connector.peers) - 1]))
        await trio.sleep(2)
        await peer.send(REFUSED)

    connector = Network(nursery, script)
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        with pytest.raises(ConnectTimeout):
            await pool.request("GET", URL, extensions={"timeout": {"connect": 5}})
        assert trio.current_time() == 5
        assert len(connector.peers) == 3
        assert_unharmed(pool)
        assert connector.open == 0


@pytest.mark.parametrize("moment", [0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
async def test_cancelling_leaves_nothing(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock, moment: float
) -> None:
    resolver.delay = 1
    script = socks(*CASE_WITH_EVERYTHING.talk, then=swallow, delay=1)
    connector = Network(nursery, script, delay=1)
    async with pool_through(CASE_WITH_EVERYTHING.proxy, connector) as pool:
        with trio.move_on_after(moment) as scope:
            await pool.request("GET", CASE_WITH_EVERYTHING.url)
        assert scope.cancelled_caught
        assert_unharmed(pool)
        assert connector.open == 0


# -- What is told.


async def test_what_a_trace_handler_is_told(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.7"]
    proxy = CASE_WITH_EVERYTHING.proxy
    first = (TO_IPV4[:-3] + b"\1\1\xbb", REFUSED)
    scripts = (
        socks(*CASE_WITH_EVERYTHING.talk[:2], first, then=swallow),
        socks(*CASE_WITH_EVERYTHING.talk, then=tls_origin),
    )
    connector = Network(nursery, in_turn(*scripts))
    trace = Events()
    async with pool_through(proxy, connector) as pool:
        extensions = {"trace": trace, "timeout": {"connect": 5}}
        await pool.request("GET", "https://example.com/", extensions=extensions)
    assert trace.names[:12] == [
        "socks.getaddrinfo.started",
        "socks.getaddrinfo.complete",
        "connection.connect_tcp.started",
        "connection.connect_tcp.complete",
        "socks.connect.started",
        "socks.connect.failed",
        "connection.connect_tcp.started",
        "connection.connect_tcp.complete",
        "socks.connect.started",
        "socks.connect.complete",
        "connection.start_tls.started",
        "connection.start_tls.complete",
    ]
    assert trace.names[12] == "http11.send_request_headers.started"
    infos = [info for _, info in trace.seen]
    assert infos[0] == {"host": "example.com", "port": 443, "timeout": 5}
    assert infos[1] == {"return_value": ["192.0.2.1", "192.0.2.7"]}
    dialled = {"host": "proxy.example", "port": 1080, "local_address": None, "socket_options": None}
    assert infos[2] == infos[6] == {**dialled, "timeout": 5}
    assert infos[4] == {"proxy": proxy, "host": "192.0.2.1", "port": 443, "timeout": 5}
    assert isinstance(infos[5]["exception"], ProxyError)
    assert infos[5]["exception"].reply_code == 5
    assert infos[8] == {"proxy": proxy, "host": "192.0.2.7", "port": 443, "timeout": 5}
    stream = infos[9]["return_value"]
    assert isinstance(stream, NetworkStream)
    with pytest.raises(trio.ClosedResourceError, match="belongs to HTTP"):
        await stream.receive_some()


async def test_a_name_that_is_not_looked_up_is_told_as_it_is(nursery: trio.Nursery) -> None:
    case = CASES["socks5h"]
    connector = Network(nursery, socks(*case.talk))
    trace = Events()
    proxy = case.proxy
    async with pool_through(proxy, connector) as pool:
        await pool.request("GET", URL, extensions={"trace": trace})
    assert trace.names[:4] == [
        "connection.connect_tcp.started",
        "connection.connect_tcp.complete",
        "socks.connect.started",
        "socks.connect.complete",
    ]
    assert trace.seen[2][1] == {"proxy": proxy, "host": "example.com", "port": 80, "timeout": None}
    assert list(trace.seen[3][1]) == ["return_value"]


async def test_a_look_up_that_fails_is_told(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.failure = OSError("no")
    trace = Events()
    async with pool_through(Proxy("socks5://proxy.example"), Network(nursery, respond)) as pool:
        with pytest.raises(ConnectError) as info:
            await pool.request("GET", URL, extensions={"trace": trace})
    assert trace.seen == [
        ("socks.getaddrinfo.started", {"host": "example.com", "port": 80, "timeout": None}),
        ("socks.getaddrinfo.failed", {"exception": info.value}),
    ]


async def test_handlers_take_no_time_of_the_budget(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock
) -> None:
    async def handler(event: str, info: dict[str, Any]) -> None:
        await trio.sleep(100)

    connector = Network(nursery, socks(*CASES["socks5"].talk, delay=1), delay=1)
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        extensions = {"trace": handler, "timeout": {"connect": 4}}
        assert (await pool.request("GET", URL, extensions=extensions)).status == 200


@pytest.mark.parametrize("how", ["raise", "cancel"])
@pytest.mark.parametrize(
    "event",
    [
        "socks.getaddrinfo.started",
        "socks.getaddrinfo.complete",
        "connection.connect_tcp.started",
        "connection.connect_tcp.complete",
        "socks.connect.started",
        "socks.connect.complete",
        "connection.start_tls.started",
        "connection.start_tls.complete",
    ],
)
async def test_a_handler_that_ends_the_request(
    nursery: trio.Nursery, resolver: Resolver, event: str, how: str
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == event:
            if how == "raise":
                raise LookupError(name)
            scope.cancel()
            await trio.lowlevel.checkpoint()

    connector = Network(nursery, socks(*CASE_WITH_EVERYTHING.talk, then=tls_origin))
    async with pool_through(CASE_WITH_EVERYTHING.proxy, connector) as pool:
        with trio.CancelScope() as scope:
            try:
                await pool.request("GET", CASE_WITH_EVERYTHING.url, extensions={"trace": handler})
            except LookupError as exc:
                assert (exc.args, how) == ((event,), "raise")  # noqa: PT017
            else:
                raise AssertionError("the handler was not called")
        assert scope.cancelled_caught == (how == "cancel")
        assert_unharmed(pool)
        assert connector.open == 0
        assert (await pool.request("GET", CASE_WITH_EVERYTHING.url)).status == 200


@pytest.mark.parametrize("event", ["socks.getaddrinfo.failed", "socks.connect.failed"])
async def test_a_handler_that_raises_about_a_failure(
    nursery: trio.Nursery, resolver: Resolver, event: str
) -> None:
    async def handler(name: str, info: dict[str, Any]) -> None:
        if name == event:
            raise LookupError(name)

    if event.startswith("socks.getaddrinfo"):
        resolver.failure = OSError("no")
    scripts = socks((NO_AUTH, b"\5\xff"), then=swallow), socks(*CASES["socks5"].talk)
    connector = Network(nursery, in_turn(*scripts))
    async with pool_through(Proxy("socks5://proxy.example"), connector) as pool:
        with pytest.raises(LookupError, match=event) as info:
            await pool.request("GET", URL, extensions={"trace": handler})
        assert isinstance(info.value.__context__, ConnectError | ProxyError)
        assert_unharmed(pool)
        assert connector.open == 0


@pytest.mark.parametrize("refused", [False, True])
async def test_the_log_shows_no_credentials(
    nursery: trio.Nursery, resolver: Resolver, caplog: pytest.LogCaptureFixture, refused: bool
) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    auth = ("zaphod", "heart-of-gold")
    password = b"\1\x06zaphod\x0dheart-of-gold"
    last = (password, b"\1\1") if refused else (password, b"\1\0")
    talk = [(EITHER, b"\5\2"), last, *([] if refused else [(TO_IPV4, BOUND_TO_IPV4)])]
    connector = Network(nursery, socks(*talk))
    proxy = Proxy("socks5://proxy.example", auth=auth)
    async with pool_through(proxy, connector) as pool:
        if refused:
            with pytest.raises(ProxyError) as info:
                await pool.request("GET", URL)
            shown = str(info.value) + repr(info.value)
        else:
            shown = str(await pool.request("GET", URL))
    events = {record.getMessage().split()[0] for record in caplog.records}
    assert {"socks.getaddrinfo.complete", "socks.connect.started"} <= events
    assert f"socks.connect.{'failed' if refused else 'complete'}" in events
    assert {record.name for record in caplog.records} >= {"trio_exchange.socks", "trio_exchange.connection"}
    for secret in auth:
        assert secret not in caplog.text
        assert secret not in shown
        assert secret not in repr(pool) + repr(proxy)


# -- What is spoken inside.


async def test_tls_with_the_origin(nursery: trio.Nursery) -> None:
    """The origin's certificate is what counts."""
    talk = ((NO_AUTH, b"\5\0"), (TO_NAME[:-2] + b"\1\xbb", BOUND_TO_NAME))
    connector = Network(nursery, socks(*talk, then=tls_origin))
    async with pool_through(Proxy("socks5h://proxy.example"), connector) as pool:
        response = await pool.request("PUT", "https://example.com/", content=b"hello")
        assert response.content == b"hello"
        ssl_object = response.extensions["network_stream"].get_extra_info("ssl_object")
        assert ssl_object.version() == "TLSv1.3"


async def test_a_certificate_for_another_name(nursery: trio.Nursery) -> None:
    name = b"other.example"
    talk = ((NO_AUTH, b"\5\0"), (b"\5\1\0\3\x0d%b\1\xbb" % name, BOUND_TO_NAME))
    connector = Network(nursery, socks(*talk, then=tls_origin))
    async with pool_through(Proxy("socks5h://proxy.example"), connector) as pool:
        with pytest.raises(ConnectError, match=r"certificate of other\.example could not be verified"):
            await pool.request("GET", f"https://{name.decode()}/")
        assert_unharmed(pool)
        assert connector.open == 0


async def test_a_websocket(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        assert request.target == b"/chat"
        await peer.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhi")
        await swallow(peer)

    connector = Network(nursery, socks(*CASES["socks5h"].talk, then=serve))
    headers = {"Upgrade": "x", "Connection": "upgrade"}
    async with (
        pool_through(Proxy("socks5h://proxy.example"), connector) as pool,
        pool.stream("GET", "ws://example.com/chat", headers=headers) as response,
    ):
        assert await response.extensions["network_stream"].read() == b"hi"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_http2(nursery: trio.Nursery, scheme: str) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        if scheme == "https":
            await peer.start_tls(alpn_server("h2"))
        h2 = H2Peer(peer.stream)
        await h2.start()
        for _ in range(2):
            stream_id, headers, _ = await h2.request()
            await h2.respond(stream_id, body=headers[b":authority"])
        await h2.until_closed()

    port = b"\0\x50" if scheme == "http" else b"\1\xbb"
    talk = ((NO_AUTH, b"\5\0"), (TO_NAME[:-2] + port, BOUND_TO_NAME))
    connector = Network(nursery, socks(*talk, then=serve))
    proxy = Proxy("socks5h://proxy.example")
    async with pool_through(proxy, connector, http1=scheme == "https", http2=True) as pool:
        for _ in range(2):
            response = await pool.request("GET", f"{scheme}://example.com/")
            assert response.extensions["http_version"] == b"HTTP/2"
            assert response.content == b"example.com"
    assert len(connector.streams) == 1


# -- Chains.


def http_proxy(target: bytes, then: Script) -> Script:
    """A proxy that is asked for one tunnel."""

    async def script(peer: ScriptedPeer) -> None:
        request = await peer.receive_request()
        assert (request.method, request.target) == (b"CONNECT", target)
        await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        await then(peer)

    return script


async def requested_form(peer: ScriptedPeer) -> None:
    """An origin that says how it was asked."""
    async for request in peer:
        await peer.send_response(body=request.target)


MIDDLE = (b"\5\1\0\3\x06middle\4\x38", BOUND_TO_NAME)
LAST = (b"\5\1\0\3\4last\x1f\x90", BOUND_TO_NAME)


async def test_an_http_proxy_before_and_one_after(nursery: trio.Nursery) -> None:
    inner = http_proxy(b"example.com:443", tls_origin)
    script = http_proxy(b"middle:1080", socks((NO_AUTH, b"\5\0"), LAST, then=inner))
    connector = Network(nursery, script)
    proxies = [Proxy("http://first:8080"), Proxy("socks5h://middle"), Proxy("http://last:8080")]
    async with pool_through(proxies, connector) as pool:
        response = await pool.request("PUT", "https://example.com/", content=b"hello")
        assert response.content == b"hello"
        assert_unharmed(pool, idle=1)
    assert [dialled.address for dialled in connector.dialled] == [("first", 8080)]
    assert connector.open == 0


async def test_the_last_http_proxy_forwards(nursery: trio.Nursery) -> None:
    script = http_proxy(b"middle:1080", socks((NO_AUTH, b"\5\0"), LAST, then=requested_form))
    connector = Network(nursery, script)
    proxies = [Proxy("http://first:8080"), Proxy("socks5h://middle"), Proxy("http://last:8080")]
    async with pool_through(proxies, connector) as pool:
        assert (await pool.request("GET", "http://example.com/a")).content == b"http://example.com/a"
    assert connector.open == 0


@pytest.mark.parametrize("first", [False, True], ids=["alone", "after an HTTP proxy"])
async def test_socks_does_not_forward(nursery: trio.Nursery, first: bool) -> None:
    script = socks((NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_NAME), then=requested_form)
    connector = Network(nursery, http_proxy(b"middle:1080", script) if first else script)
    proxies = [Proxy("http://first:8080")] * first + [Proxy("socks5h://middle")]
    async with pool_through(proxies, connector) as pool:
        assert (await pool.request("GET", "http://example.com/a")).content == b"/a"


async def test_socks_through_socks(nursery: trio.Nursery) -> None:
    talk = ((EITHER, b"\5\2"), (PASSWORD, b"\1\0"), MIDDLE, (NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_IPV6))
    connector = Network(nursery, socks(*talk))
    proxies = [Proxy("socks5h://first", auth=USER_AND_PASSWORD), Proxy("socks5h://middle")]
    async with pool_through(proxies, connector) as pool:
        assert (await pool.request("PUT", URL, content=b"hello")).content == b"hello"
    assert [dialled.address for dialled in connector.dialled] == [("first", 1080)]


async def test_each_of_two_looks_up_for_itself(nursery: trio.Nursery, resolver: Resolver) -> None:
    to_middle = TO_IPV4[:-2] + b"\4\x38"
    talk = ((NO_AUTH, b"\5\0"), (to_middle, BOUND_TO_IPV4), (NO_AUTH, b"\5\0"), (TO_IPV4, BOUND_TO_IPV4))
    connector = Network(nursery, socks(*talk))
    async with pool_through([Proxy("socks5://first"), Proxy("socks5://middle")], connector) as pool:
        assert (await pool.request("GET", URL)).status == 200
    assert [host for host, *_ in resolver.asked] == [b"example.com", b"middle"]


@pytest.mark.parametrize("kind", ["http", "socks5h"])
async def test_a_refusal_in_a_chain_leaves_nothing(nursery: trio.Nursery, kind: str) -> None:
    refusal = socks((NO_AUTH, b"\5\0"), (TO_NAME, b"\5\2"), then=swallow)
    success = socks((NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_NAME))

    def through(script: Script) -> Script:
        if kind == "http":
            return http_proxy(b"middle:1080", script)
        return socks((NO_AUTH, b"\5\0"), MIDDLE, then=script)

    connector = Network(nursery, in_turn(through(refusal), through(success)))
    async with pool_through([Proxy(f"{kind}://first"), Proxy("socks5h://middle")], connector) as pool:
        with pytest.raises(
            ProxyError, match="the proxy socks5h://middle:1080 refused to connect to example"
        ) as info:
            await pool.request("GET", URL)
        assert info.value.reply_code == 2
        await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)
        assert connector.open == 0
        assert (await pool.request("GET", URL)).status == 200


# -- Without socksio.


@pytest.mark.parametrize("scheme", ["socks4", "socks4a", "socks5", "socks5h"])
def test_socksio_is_missing(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.delitem(sys.modules, "trio_exchange._proxies.socks", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'trio-exchange\[socks\]'") as info:
        ConnectionPool(proxy=Proxy(f"{scheme}://proxy.example"))
    assert info.value.name == "socksio"
    # The others work without it.
    ConnectionPool(proxy=Proxy("http://proxy.example"))


async def test_a_handlers_own_proxy_error_about_a_refused_address_comes_out(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(*_: object, **__: object) -> Any:
        await trio.lowlevel.checkpoint()
        return [(2, 1, 6, "", (f"192.0.2.{i}", 443)) for i in (1, 2)]

    async def socks(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(b"\x05\x00")
        await peer.receive_some()
        await peer.send(b"\x05\x05\x00\x01" + bytes(6))

    async def trace(name: str, info: dict[str, Any]) -> None:
        events.append(name)
        if name == "socks.connect.failed":
            raise error

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    events: list[str] = []
    error = ProxyError("of a request that the handler made")
    connector = MemoryConnector(nursery, socks)
    async with ConnectionPool(proxy=Proxy("socks5://socks.example"), connector=connector) as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", "https://0.origin.example/", extensions={"trace": trace})
    assert info.value is error
    assert events.count("socks.connect.failed") == 1


async def test_an_address_that_socks4a_has_another_use_for(nursery: trio.Nursery) -> None:
    asked: list[bytes] = []

    async def socks(peer: ScriptedPeer) -> None:
        asked.append(bytes(await peer.receive_some()))
        await peer.send(b"\0\x5a" + bytes(6))
        await respond(peer)

    connector = MemoryConnector(nursery, socks)
    async with ConnectionPool(proxy=Proxy("socks4a://socks.example"), connector=connector) as pool:
        with pytest.raises(ConnectError):
            await pool.request("GET", "http://0.0.0.5/")
    assert asked == []
