from __future__ import annotations

import itertools
import logging
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.harness.peers import DELIVERIES, Script, respond, swallow
from tests.harness.proxies import Net, expect, fail, in_turn, proxied, secured, socks
from tests.harness.resolver import Resolver, set_resolver
from tests.harness.streams import TrackedStream
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
from trio_exchange.testing import PeerRequest, ScriptedPeer

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


async def hang_up(peer: ScriptedPeer) -> None:
    """End the connection."""


@pytest.fixture
async def resolver() -> Resolver:
    return set_resolver("192.0.2.7")


def one_slot(net: Net, *proxies: Proxy | str, **options: Any) -> AbstractAsyncContextManager[ConnectionPool]:
    """A pool whose only slot a failure has to give back."""
    return net.pool(*proxies, max_connections=1, **options)


async def fail_by(
    nursery: trio.Nursery,
    case: Case,
    script: Script,
    *,
    wrap: Callable[[Any], TrackedStream] = TrackedStream,
    **more: Any,
) -> Any:
    """The error that this script of a proxy leads to, after which a second connection is as it should be."""
    net = Net(nursery, in_turn(script, socks(*case.talk, then=respond)), wrap=wrap)
    return await fail(net, case.proxy, **{"url": case.url, **more})


# -- What is said.


@DELIVERIES
@every_case
async def test_every_byte_of_a_negotiation(
    nursery: trio.Nursery, resolver: Resolver, case: Case, byte_by_byte: bool
) -> None:
    net = Net(nursery, socks(*case.talk, byte_by_byte=byte_by_byte))
    async with one_slot(net, case.proxy) as pool:
        response = await pool.request("PUT", case.url, content=b"hello")
        assert response.content == b"hello"
        # The connection is kept as any other.
        assert (await pool.request("PUT", case.url, content=b"again")).content == b"again"
        net.assert_settled(pool, idle=1)
    assert [dialled.address for dialled in net.dialled] == [("proxy.example", 1080)]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("socks4", socket.AF_INET),
        ("socks5", socket.AF_UNSPEC),
        ("socks5h", None),
        ("socks4 to an address", None),
        ("socks5 to an address", None),
        ("socks5 to IPv6", None),
    ],
)
async def test_who_looks_names_up(
    nursery: trio.Nursery, resolver: Resolver, name: str, family: int | None
) -> None:
    """The proxy of SOCKS5H; addresses are not looked up at all."""
    case = CASES[name]
    async with one_slot(Net(nursery, socks(*case.talk)), case.proxy) as pool:
        await pool.request("GET", case.url)
    asked = [(b"example.com", 80, family, socket.SOCK_STREAM)]
    assert resolver.asked == (asked if family is not None else [])


@pytest.mark.parametrize("length", [63, 255])
async def test_a_name_may_have_255_bytes(nursery: trio.Nursery, length: int) -> None:
    name = b".".join(itertools.repeat(b"x" * 63, (length + 1) // 64))
    request = b"\5\1\0\3%c%b\0\x50" % (length, name)
    net = Net(nursery, socks((NO_AUTH, b"\5\0"), (request, BOUND_TO_IPV4)))
    async with one_slot(net, "socks5h://proxy.example") as pool:
        assert (await pool.request("GET", f"http://{name.decode()}/")).status == 200


@pytest.mark.parametrize(
    ("scheme", "host", "error"),
    [
        ("socks4", "[2001:db8::2]", r"SOCKS4 knows only IPv4, .* 2001:db8::2"),
        ("socks4a", "[2001:db8::2]", r"SOCKS4 knows only IPv4, .* 2001:db8::2"),
        ("socks4a", "x" * 256, "longer than 255 bytes: 'xxx"),
        ("socks5h", "x" * 256, "longer than 255 bytes: 'xxx"),
        # Such an address stands for a name that follows.
        ("socks4a", "0.0.0.5", None),
    ],
)
async def test_what_can_not_be_asked_for_is_an_error_before_anything_is_dialled(
    nursery: trio.Nursery, resolver: Resolver, scheme: str, host: str, error: str | None
) -> None:
    net = Net(nursery, socks(*CASES[scheme].talk))
    async with one_slot(net, f"{scheme}://proxy.example") as pool:
        with pytest.raises(ConnectError, match=error):
            await pool.request("GET", f"http://{host}/")
        assert net.dialled == []
        net.assert_settled(pool)
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
    net = Net(nursery, in_turn(*scripts))
    async with one_slot(net, "socks5://proxy.example") as pool:
        assert (await pool.request("GET", URL)).status == 200
        assert len(net.streams) == 4
        net.assert_settled(pool, idle=1)
    assert len(resolver.asked) == 1


async def test_socks4_tries_them_too(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.7"]
    refused = socks((b"\4\1\0\x50\xc0\0\2\1\0", b"\0\x5b" + bytes(6)), then=swallow)
    net = Net(nursery, in_turn(refused, socks(*CASES["socks4"].talk)))
    async with one_slot(net, "socks4://proxy.example") as pool:
        assert (await pool.request("GET", URL)).status == 200
    assert len(net.streams) == 2


async def test_when_all_are_refused_the_last_one_is_the_error(
    nursery: trio.Nursery, resolver: Resolver
) -> None:
    resolver.addresses = ["192.0.2.1", "2001:db8::2"]
    scripts = refusing("192.0.2.1", b"\5\3"), refusing("2001:db8::2", b"\5\4")
    net = Net(nursery, in_turn(*scripts))
    async with one_slot(net, "socks5://proxy.example", retries=3) as pool:
        with pytest.raises(ProxyError, match="2001:db8::2") as info:
            await pool.request("GET", URL)
        assert info.value.reply_code == 4
        net.assert_settled(pool)
    assert len(net.streams) == 2


@pytest.mark.parametrize(
    ("name", "talk", "then"),
    [
        ("socks5", ((NO_AUTH, b"\5\0"), (TO_IPV4, reply)), hang_up)
        for reply in (b"", b"\4\0", b"\5\0\0\7", b"\5")
    ]
    # A user might be locked out for these.
    + [
        ("socks5 with a password", ((EITHER, b"\5\xff"),), swallow),
        ("socks5 with a password", ((EITHER, b"\5\2"), (PASSWORD, b"\1\1")), swallow),
    ],
    ids=["nothing", "another version", "no address", "a byte", "no method", "wrong password"],
)
async def test_what_is_no_refusal_of_an_address_is_the_end(
    nursery: trio.Nursery, resolver: Resolver, name: str, talk: tuple[tuple[bytes, bytes], ...], then: Script
) -> None:
    resolver.addresses = ["192.0.2.7", "192.0.2.2", "192.0.2.3"]
    net = Net(nursery, in_turn(socks(*talk, then=then)))
    async with one_slot(net, CASES[name].proxy) as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL)
        assert (info.value.reply_code is None) == (then is hang_up)
        net.assert_settled(pool)
    assert len(net.streams) == 1


async def test_a_name_without_address(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = []
    net = Net(nursery, swallow)
    async with one_slot(net, "socks5://proxy.example") as pool:
        with pytest.raises(ConnectError, match=r"could not look up example\.com: it has no address"):
            await pool.request("GET", URL)
        net.assert_settled(pool)
    assert net.streams == []


async def test_an_address_of_ipv6_is_shown_as_such(nursery: trio.Nursery) -> None:
    case = CASES["socks5 to IPv6"]
    error = await fail_by(nursery, case, socks(case.talk[0], (case.talk[1][0], REFUSED), then=swallow))
    assert "refused to connect to [2001:db8::2]:443: connection refused (5)" in str(error)


class Unclosable(TrackedStream):
    """Closed all the same, but not without complaint."""

    async def aclose(self) -> None:
        await super().aclose()
        raise OSError("closing failed")


async def test_the_closing_of_a_refused_connection_does_not_matter(nursery: trio.Nursery) -> None:
    case = CASES["socks5h"]
    script = socks(case.talk[0], (TO_NAME, REFUSED), then=swallow)
    error = await fail_by(nursery, case, script, wrap=Unclosable)
    assert error.reply_code == 5


async def test_a_proxy_that_can_not_be_dialled_again(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.2"]

    async def script(peer: ScriptedPeer) -> None:
        net.failures.append(OSError("gone"))
        await refusing("192.0.2.1")(peer)

    net = Net(nursery, script)
    async with one_slot(net, "socks5://proxy.example") as pool:
        with pytest.raises(
            ConnectError, match=r"could not connect to the proxy socks5://proxy\.example:1080: gone"
        ):
            await pool.request("GET", URL)
        net.assert_settled(pool)


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
    net = Net(nursery, socks(*CASES[scheme].talk))
    async with one_slot(net, f"{scheme}://proxy.example") as pool:
        resolver.failure = failure
        with pytest.raises(ConnectError, match=rf"could not look up example\.com: .*{reason}") as info:
            await pool.request("GET", URL)
        assert info.value.__cause__ is failure
        assert net.dialled == []
        net.assert_settled(pool)
        resolver.failure = None
        assert (await pool.request("GET", URL)).status == 200


async def test_a_look_up_that_fails_is_tried_again(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock
) -> None:
    resolver.failure = socket.gaierror(socket.EAI_AGAIN, "try again")
    net = Net(nursery, respond)
    async with one_slot(net, "socks5://proxy.example", retries=2) as pool:
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


async def assert_refused(
    nursery: trio.Nursery, case: Case, refusal: bytes, code: int, meaning: str, **how: Any
) -> None:
    """Let the last message be answered by this."""
    *before, (request, _) = case.talk
    error = await fail_by(nursery, case, socks(*before, (request, refusal), **how))
    assert (error.reply_code, error.meaning, error.response) == (code, meaning, None)
    refused = "refused to connect to example.com:80"
    assert str(error) == f"the proxy {case.scheme}://proxy.example:1080 {refused}: {meaning} ({code})"
    assert trio.current_time() == 0


@pytest.mark.parametrize("end", [b"", b"\0\1\0\0\0\0\0\0", b"\0\1"], ids=["short", "whole", "half"])
@pytest.mark.parametrize("then", [hang_up, swallow])
@pytest.mark.parametrize("code", MEANINGS)
async def test_refusals_of_socks5(
    nursery: trio.Nursery, autojump_clock: MockClock, code: int, then: Script, end: bytes
) -> None:
    case = CASES["socks5h with a password"]
    await assert_refused(nursery, case, bytes((5, code)) + end, code, MEANINGS[code], then=then)


@DELIVERIES
@pytest.mark.parametrize("end", [b"", bytes(6), bytes(3)], ids=["short", "whole", "half"])
@pytest.mark.parametrize("then", [hang_up, swallow])
@pytest.mark.parametrize("code", MEANINGS_OF_4)
async def test_refusals_of_socks4(
    nursery: trio.Nursery, autojump_clock: MockClock, code: int, then: Script, end: bytes, byte_by_byte: bool
) -> None:
    case = CASES["socks4a with a user"]
    how: dict[str, Any] = {"then": then, "byte_by_byte": byte_by_byte}
    await assert_refused(nursery, case, bytes((0, code)) + end, code, MEANINGS_OF_4[code], **how)


WRONG, NO_METHOD = "wrong user name or password", "no acceptable methods"
WANTS, WANTS_OTHER = "wants a user name and a password", "wants another authentication"


@pytest.mark.parametrize(
    ("name", "replies", "code", "meaning", "said"),
    [
        (
            "socks5h with a password",
            (b"\5\2", bytes((1, code))),
            code,
            WRONG,
            f"refused to authenticate: {WRONG} ({code})",
        )
        for code in (1, 2, 0xFF)
    ]
    # GSSAPI, a password, none.
    + [("socks5h", (bytes((5, code)),), code, NO_METHOD, WANTS) for code in (1, 2, 0xFF)]
    + [("socks5h with a password", (bytes((5, code)),), code, NO_METHOD, WANTS_OTHER) for code in (1, 0xFF)],
)
async def test_a_proxy_that_does_not_accept_the_credentials(
    nursery: trio.Nursery, name: str, replies: tuple[bytes, ...], code: int, meaning: str, said: str
) -> None:
    case = CASES[name]
    requests = (request for request, _ in case.talk)
    error = await fail_by(nursery, case, socks(*zip(requests, replies, strict=False), then=swallow))
    assert (error.reply_code, error.meaning, error.response) == (code, meaning, None)
    assert str(error) == f"the proxy socks5h://proxy.example:1080 {said}"


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
    error = await fail_by(nursery, case, socks(*talk, then=swallow))
    assert (error.reply_code, error.meaning, error.response) == (None, None, None)
    assert str(error) == (
        f"the proxy {case.scheme}://proxy.example:1080 does not speak this version of SOCKS: it sent {sent!r}"
    )


async def test_a_refusal_does_not_need_retries_to_be_final(nursery: trio.Nursery) -> None:
    script = socks((NO_AUTH, b"\5\xff"), then=swallow)
    assert (await fail_by(nursery, CASES["socks5h"], script, retries=0)).reply_code == 0xFF


# -- Replies in pieces, and their ends.


@every_case
async def test_a_reply_that_ends_early(nursery: trio.Nursery, resolver: Resolver, case: Case) -> None:
    for step, (request, reply) in enumerate(case.talk):
        for length in range(len(reply)):
            script = socks(*case.talk[:step], (request, reply[:length]), then=hang_up)
            error = await fail_by(nursery, case, script)
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
    scripts = [socks(*before, (request, reply + first), then=swallow) for first in (answer, b"ready")]
    net = Net(nursery, in_turn(*scripts))
    url = Proxy(case.url).url.origin
    async with net.pool(case.proxy) as pool:
        assert (await pool.request("GET", case.url)).content == b"hello"
        stream = await pool.open_tcp_stream(url.host, url.port)
        assert await stream.read(2) == b"re"
        assert await stream.read() == b"ady"
        await stream.aclose()


async def test_what_follows_the_reply_reaches_tls(nursery: trio.Nursery) -> None:
    case = CASES["socks5h"]
    request = TO_NAME[:-2] + b"\1\xbb"
    script = socks((NO_AUTH, b"\5\0"), (request, BOUND_TO_NAME + b"this is no TLS"), then=swallow)
    error = await fail_by(nursery, case, script, error=ConnectError, url="https://example.com/", next_url=URL)
    assert "the TLS handshake with example.com failed" in str(error)


def failing_at(count: int, operation: str) -> Callable[[Any], TrackedStream]:
    """Wraps streams, of which the first breaks at an operation."""

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

    classes = itertools.chain([Failing], itertools.repeat(TrackedStream))
    return lambda stream: next(classes)(stream)


@pytest.mark.parametrize("operation", ["send", "receive"])
@pytest.mark.parametrize("name", ["socks4", "socks4a", "socks5", "socks5h with a password"])
async def test_a_connection_that_breaks(
    nursery: trio.Nursery, resolver: Resolver, name: str, operation: str
) -> None:
    case = CASES[name]
    script = socks(*case.talk, then=swallow)
    for count in range(len(case.talk)):
        error = await fail_by(nursery, case, script, wrap=failing_at(count, operation))
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
        set_resolver("192.0.2.7")
        async with trio.open_nursery() as nursery:
            net = Net(nursery, script)
            async with one_slot(net, case.proxy) as pool:
                timeout = {"connect": 5, "read": 5}
                with pytest.raises(ExchangeError):
                    await pool.request("GET", URL, extensions={"timeout": timeout})
                await trio.testing.wait_all_tasks_blocked()
                net.assert_settled(pool)
                assert net.open == 0
                assert trio.current_time() - began <= 5

    clock = MockClock(autojump_threshold=0)
    began = clock.current_time()
    trio.run(main, clock=clock)


# -- Time.


CASE_WITH_EVERYTHING = Case(
    "socks5",
    ((EITHER, b"\5\2"), (PASSWORD, b"\1\0"), (TO_IPV4[:-2] + b"\1\xbb", BOUND_TO_IPV4)),
    "https://example.com/",
    USER_AND_PASSWORD,
)


tls_origin = secured(respond)


async def test_several_addresses_share_the_budget(
    nursery: trio.Nursery, resolver: Resolver, autojump_clock: MockClock
) -> None:
    resolver.addresses = [f"192.0.2.{number}" for number in range(1, 6)]

    async def script(peer: ScriptedPeer) -> None:
        await expect(peer, NO_AUTH)
        await peer.send(b"\5\0")
        await expect(peer, to_address(resolver.addresses[len(net.peers) - 1]))
        await trio.sleep(2)
        await peer.send(REFUSED)

    net = Net(nursery, script)
    async with one_slot(net, "socks5://proxy.example") as pool:
        with pytest.raises(ConnectTimeout):
            await pool.request("GET", URL, extensions={"timeout": {"connect": 5}})
        assert trio.current_time() == 5
        assert len(net.peers) == 3
        net.assert_settled(pool)


# -- What is told.


async def test_what_a_trace_handler_is_told(nursery: trio.Nursery, resolver: Resolver) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.7"]
    proxy = CASE_WITH_EVERYTHING.proxy
    first = (TO_IPV4[:-3] + b"\1\1\xbb", REFUSED)
    scripts = (
        socks(*CASE_WITH_EVERYTHING.talk[:2], first, then=swallow),
        socks(*CASE_WITH_EVERYTHING.talk, then=tls_origin),
    )
    net = Net(nursery, in_turn(*scripts))
    trace = Events()
    async with one_slot(net, proxy) as pool:
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
    net = Net(nursery, socks(*case.talk))
    trace = Events()
    proxy = case.proxy
    async with one_slot(net, proxy) as pool:
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
    async with one_slot(Net(nursery, respond), "socks5://proxy.example") as pool:
        with pytest.raises(ConnectError) as info:
            await pool.request("GET", URL, extensions={"trace": trace})
    assert trace.seen == [
        ("socks.getaddrinfo.started", {"host": "example.com", "port": 80, "timeout": None}),
        ("socks.getaddrinfo.failed", {"exception": info.value}),
    ]


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
    net = Net(nursery, in_turn(*scripts))
    async with one_slot(net, "socks5://proxy.example") as pool:
        with pytest.raises(LookupError, match=event) as info:
            await pool.request("GET", URL, extensions={"trace": handler})
        assert isinstance(info.value.__context__, ConnectError | ProxyError)
        net.assert_settled(pool)


async def test_the_log_of_a_refusal_shows_no_credentials(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "trio_exchange")
    auth = ("zaphod", "heart-of-gold")
    password = b"\1\x06zaphod\x0dheart-of-gold"
    proxy = Proxy("socks5h://proxy.example", auth=auth)
    async with one_slot(Net(nursery, socks((EITHER, b"\5\2"), (password, b"\1\1"))), proxy) as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL)
    assert {"socks.connect.started", "socks.connect.failed"} <= {text.split()[0] for text in caplog.messages}
    assert {record.name for record in caplog.records} >= {"trio_exchange.socks", "trio_exchange.connection"}
    for secret in auth:
        assert secret not in caplog.text
        assert secret not in str(info.value) + repr(info.value)
        assert secret not in repr(pool) + repr(proxy)


# -- What is spoken inside.


async def test_a_certificate_for_another_name(nursery: trio.Nursery) -> None:
    name = b"other.example"
    talk = ((NO_AUTH, b"\5\0"), (b"\5\1\0\3\x0d%b\1\xbb" % name, BOUND_TO_NAME))
    net = Net(nursery, socks(*talk, then=tls_origin))
    async with one_slot(net, "socks5h://proxy.example") as pool:
        with pytest.raises(ConnectError, match=r"certificate of other\.example could not be verified"):
            await pool.request("GET", f"https://{name.decode()}/")
        net.assert_settled(pool)


# -- Chains.


def proxied_to(target: bytes, then: Script) -> Script:
    """An HTTP proxy that is asked for one tunnel."""
    seen: list[PeerRequest] = []

    async def script(peer: ScriptedPeer) -> None:
        assert [(request.method, request.target) for request in seen] == [(b"CONNECT", target)]
        await then(peer)

    return proxied(script, seen=seen)


async def requested_form(peer: ScriptedPeer) -> None:
    """An origin that says how it was asked."""
    async for request in peer:
        await peer.send_response(body=request.target)


MIDDLE = (b"\5\1\0\3\x06middle\4\x38", BOUND_TO_NAME)
LAST = (b"\5\1\0\3\4last\x1f\x90", BOUND_TO_NAME)


async def test_an_http_proxy_before_and_one_after(nursery: trio.Nursery) -> None:
    inner = proxied_to(b"example.com:443", tls_origin)
    script = proxied_to(b"middle:1080", socks((NO_AUTH, b"\5\0"), LAST, then=inner))
    net = Net(nursery, script)
    proxies = "http://first:8080", "socks5h://middle", "http://last:8080"
    async with one_slot(net, *proxies) as pool:
        response = await pool.request("PUT", "https://example.com/", content=b"hello")
        assert response.content == b"hello"
        net.assert_settled(pool, idle=1)
    assert [dialled.address for dialled in net.dialled] == [("first", 8080)]


async def test_the_last_http_proxy_forwards(nursery: trio.Nursery) -> None:
    script = proxied_to(b"middle:1080", socks((NO_AUTH, b"\5\0"), LAST, then=requested_form))
    net = Net(nursery, script)
    proxies = "http://first:8080", "socks5h://middle", "http://last:8080"
    async with one_slot(net, *proxies) as pool:
        assert (await pool.request("GET", "http://example.com/a")).content == b"http://example.com/a"


@pytest.mark.parametrize("first", [False, True], ids=["alone", "after an HTTP proxy"])
async def test_socks_does_not_forward(nursery: trio.Nursery, first: bool) -> None:
    script = socks((NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_NAME), then=requested_form)
    net = Net(nursery, proxied_to(b"middle:1080", script) if first else script)
    proxies = ["http://first:8080"] * first + ["socks5h://middle"]
    async with one_slot(net, *proxies) as pool:
        assert (await pool.request("GET", "http://example.com/a")).content == b"/a"


async def test_socks_through_socks(nursery: trio.Nursery) -> None:
    talk = ((EITHER, b"\5\2"), (PASSWORD, b"\1\0"), MIDDLE, (NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_IPV6))
    net = Net(nursery, socks(*talk))
    proxies = Proxy("socks5h://first", auth=USER_AND_PASSWORD), "socks5h://middle"
    async with one_slot(net, *proxies) as pool:
        assert (await pool.request("PUT", URL, content=b"hello")).content == b"hello"
    assert [dialled.address for dialled in net.dialled] == [("first", 1080)]


async def test_each_of_two_looks_up_for_itself(nursery: trio.Nursery, resolver: Resolver) -> None:
    to_middle = TO_IPV4[:-2] + b"\4\x38"
    talk = ((NO_AUTH, b"\5\0"), (to_middle, BOUND_TO_IPV4), (NO_AUTH, b"\5\0"), (TO_IPV4, BOUND_TO_IPV4))
    net = Net(nursery, socks(*talk))
    async with one_slot(net, "socks5://first", "socks5://middle") as pool:
        assert (await pool.request("GET", URL)).status == 200
    assert [host for host, *_ in resolver.asked] == [b"example.com", b"middle"]


@pytest.mark.parametrize("kind", ["http", "socks5h"])
async def test_a_refusal_in_a_chain_leaves_nothing(nursery: trio.Nursery, kind: str) -> None:
    refusal = socks((NO_AUTH, b"\5\0"), (TO_NAME, b"\5\2"), then=swallow)
    success = socks((NO_AUTH, b"\5\0"), (TO_NAME, BOUND_TO_NAME))

    def through(script: Script) -> Script:
        if kind == "http":
            return proxied_to(b"middle:1080", script)
        return socks((NO_AUTH, b"\5\0"), MIDDLE, then=script)

    net = Net(nursery, in_turn(through(refusal), through(success)))
    async with one_slot(net, f"{kind}://first", "socks5h://middle") as pool:
        with pytest.raises(
            ProxyError, match="the proxy socks5h://middle:1080 refused to connect to example"
        ) as info:
            await pool.request("GET", URL)
        assert info.value.reply_code == 2
        await trio.testing.wait_all_tasks_blocked()
        net.assert_settled(pool)
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
    nursery: trio.Nursery, resolver: Resolver
) -> None:
    resolver.addresses = ["192.0.2.1", "192.0.2.2"]
    events: list[str] = []
    error = ProxyError("of a request that the handler made")

    async def trace(name: str, info: dict[str, Any]) -> None:
        events.append(name)
        if name == "socks.connect.failed":
            raise error

    async with one_slot(Net(nursery, refusing("192.0.2.1")), "socks5://proxy.example") as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", URL, extensions={"trace": trace})
    assert info.value is error
    assert events.count("socks.connect.failed") == 1
