"""`Headers`: a list of pairs that finds a field by its name, and where users are given one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis
import pytest
import trio
from hypothesis import strategies as st

from tests.harness.h2peer import H2Peer, h2_pool
from trio_exchange import ConnectionPool, Headers, Proxy, ProxyError, Request, Response
from trio_exchange.testing import MemoryConnector, ScriptedPeer

PAIRS = [(b"Set-Cookie", b"a=1"), (b"content-type", b"text/plain"), (b"set-cookie", b"b=2")]


# -- Finding fields.


@pytest.mark.parametrize("name", ["Set-Cookie", b"Set-Cookie", "set-cookie", b"SET-COOKIE"])
def test_a_field_is_found_whatever_the_case(name: str | bytes) -> None:
    headers: Any = Headers(PAIRS)
    assert headers.get(name) == b"a=1"
    assert headers.get_all(name) == [b"a=1", b"b=2"]
    assert name in headers


@pytest.mark.parametrize("name", ["Cookie", b"Cookie", "", "s\u00e9t-cookie", "\u212a", b"\xe4"])
def test_a_field_that_is_not_there(name: str | bytes) -> None:
    headers: Any = Headers([*PAIRS, (b"k", b"kelvin")])
    assert headers.get(name) is None
    assert headers.get(name, b"none") == b"none"
    assert headers.get(name, 5) == 5
    assert headers.get_all(name) == []
    assert name not in headers


def test_an_empty_value_is_a_value() -> None:
    headers: Any = Headers([(b"A", b""), (b"a", b"2")])
    assert headers.get("a", b"default") == b""
    assert "a" in headers


@pytest.mark.parametrize("name", [None, 5, bytearray(b"a"), (b"a", b"b")])
def test_a_name_of_the_wrong_type(name: Any) -> None:
    for method in (Headers(PAIRS).get, Headers(PAIRS).get_all):
        with pytest.raises(TypeError, match="a header's name must be bytes or str, but got"):
            method(name)


@pytest.mark.parametrize("name", ["Set-Cookie", b"Set-Cookie"])
def test_a_name_is_no_index(name: Any) -> None:
    with pytest.raises(TypeError, match=r"list of pairs; find one by headers\.get\(b?'Set-Cookie'\)"):
        Headers(PAIRS)[name]


def test_whatever_else_is_in_it_as_in_a_list() -> None:
    headers: Any = Headers(PAIRS)
    assert (b"Set-Cookie", b"a=1") in headers
    assert (b"set-cookie", b"a=1") not in headers
    assert None not in headers
    assert 5 not in headers


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from([b"A", b"a", b"b", b"\xff"]), st.binary(max_size=2)), max_size=6),
    st.sampled_from(["A", "a", "B", "c", b"a", b"\xff", "\xff"]),
)
def test_the_ways_to_find_a_field_agree(pairs: list[tuple[bytes, bytes]], name: str | bytes) -> None:
    headers: Any = Headers(pairs)
    found = headers.get_all(name)
    assert headers.get(name) == (found[0] if found else None)
    assert (name in headers) == bool(found)
    wanted = name if isinstance(name, bytes) else name.encode()
    assert found == [value for key, value in pairs if key.lower() == wanted.lower()]


# -- As a list.


def test_it_compares_as_a_list() -> None:
    headers = Headers(PAIRS)
    assert headers == PAIRS
    assert headers == PAIRS
    assert headers == Headers(PAIRS)
    assert headers != PAIRS[::-1]
    assert PAIRS[:1] != headers
    assert Headers() == []


def test_it_is_used_as_a_list() -> None:
    headers = Headers(PAIRS)
    assert isinstance(headers, list)
    assert len(headers) == 3
    assert headers[1] == PAIRS[1]
    assert headers[1:] == PAIRS[1:]
    assert list(headers) == PAIRS
    more = [(b"a", b"b")]
    assert headers + more == [*PAIRS, *more]
    assert more + headers == [*more, *PAIRS]
    assert headers.index(PAIRS[1]) == 1
    headers.append((b"A", b"b"))
    headers.extend([(b"A", b"c")])
    assert headers.get_all("a") == [b"b", b"c"]
    headers.remove((b"A", b"b"))
    del headers[0]
    assert headers == [*PAIRS[1:], (b"A", b"c")]
    assert dict(headers)[b"A"] == b"c"
    assert repr(headers) == repr([*PAIRS[1:], (b"A", b"c")])


@pytest.mark.parametrize(
    "make",
    [copy.copy, copy.deepcopy, Headers.copy, lambda headers: pickle.loads(pickle.dumps(headers))],
    ids=["copy", "deepcopy", "method", "pickle"],
)
def test_a_copy_is_one_too(make: Any) -> None:
    headers = Headers(PAIRS)
    other = make(headers)
    assert type(other) is Headers
    assert other == headers
    other.clear()
    assert headers == PAIRS


# -- Where users are given one.


def test_what_users_make_has_it() -> None:
    for given in (None, {"A": "b"}, [("A", "b")], Headers([(b"A", b"b")])):
        assert type(Request("GET", "http://h", headers=given).headers) is Headers
        assert type(Response(200, headers=given).headers) is Headers
        assert type(Proxy("http://h", headers=given).headers) is Headers
    assert Proxy("http://user:password@h").headers.get("proxy-authorization") == b"Basic dXNlcjpwYXNzd29yZA=="


class Informed:
    """An informational callback that keeps the headers."""

    def __init__(self) -> None:
        self.headers: list[Headers] = []

    async def __call__(self, status: int, headers: Headers) -> None:
        self.headers.append(headers)


async def serve_http11(peer: ScriptedPeer) -> None:
    async for _ in peer:
        await peer.send(
            b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nAllow: GET\r\nALLOW: PUT\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\nx\r\n0\r\nDigest: d\r\n\r\n"
        )


async def serve_http2(peer: H2Peer) -> None:
    await peer.start()
    stream_id, _, _ = await peer.request()
    await peer.respond(stream_id, 103, [(b"link", b"a")], end=False)
    await peer.respond(
        stream_id, 200, [(b"allow", b"GET"), (b"allow", b"PUT")], b"x", trailers=[(b"digest", b"d")]
    )
    await peer.until_closed()


@pytest.mark.parametrize("http2", [False, True])
async def test_a_response_has_it(nursery: trio.Nursery, http2: bool) -> None:
    """Whatever the case of the names is: over HTTP/2 they are in lower case."""
    if http2:
        pool, _ = h2_pool(nursery, serve_http2)
    else:
        pool = ConnectionPool(connector=MemoryConnector(nursery, serve_http11))
    informed = Informed()
    async with (
        pool,
        pool.stream("GET", "http://example.com/", extensions={"informational": informed}) as response,
    ):
        [headers] = informed.headers
        assert headers.get("Link") == b"a"
        assert response.headers.get("Allow") == b"GET"
        assert response.headers.get_all("Allow") == [b"GET", b"PUT"]
        trailers = response.extensions["trailing_headers"]
        assert trailers == []
        await response.aread()
        assert response.extensions["trailing_headers"] is trailers
        assert trailers.get("Digest") == b"d"
        assert {type(one) for one in (headers, response.headers, trailers)} == {Headers}


async def test_a_proxys_refusal_has_it(nursery: trio.Nursery) -> None:
    async def refuse(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send_response(407, [(b"PROXY-Authenticate", b"Basic")])

    connector = MemoryConnector(nursery, refuse)
    async with ConnectionPool(proxy=Proxy("http://proxy"), connector=connector) as pool:
        with pytest.raises(ProxyError) as info:
            await pool.request("GET", "https://example.com/")
    response = info.value.response
    assert response is not None
    assert response.headers.get("Proxy-Authenticate") == b"Basic"
