"""Properties of the parsers: whatever comes in, only our errors come out, and only HTTP goes out."""

from __future__ import annotations

import os
import string
import traceback
from typing import Any
from unittest import mock

import h11
import hypothesis
from hypothesis import strategies as st

from trio_exchange import URL, LocalProtocolError, Proxy, Request, proxy_from_environment
from trio_exchange._connect.factory import ConnectionKey
from trio_exchange._http.http2.headers import request_headers
from trio_exchange._http.request import PreparedRequest

# No deadline: the machine may be busy with something else.
SETTINGS = hypothesis.settings(deadline=None, max_examples=300)

REFUSED = (TypeError, ValueError, LocalProtocolError)

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?(\.[a-z0-9]{1,8}){0,3}\.?", fullmatch=True)
ADDRESSES = st.ip_addresses(v=6).map(str)
HOSTS = st.one_of(NAMES, st.ip_addresses(v=4).map(str), ADDRESSES.map("[{}]".format))
PORTS = st.integers(1, 65535)
PATHS = st.from_regex(r"/[!-\"$->@-~]{0,20}", fullmatch=True)
QUERIES = st.one_of(st.just(""), st.from_regex(r"\?[!-\"$-~]{0,20}", fullmatch=True))

# Mostly what URLs are made of, so that more than the first check is reached.
URL_TEXT = st.text(
    st.one_of(
        st.sampled_from("htps:/?#[]@%.-_\\ \t\r\n\0" + string.digits + "a\u00fc\u2100\uff0f"), st.characters()
    ),
    max_size=30,
)
BYTES = st.binary(max_size=12)
HEADERS = st.lists(
    st.tuples(
        st.one_of(
            BYTES,
            st.sampled_from([b"Host", b"content-length", b"Transfer-Encoding", b"Expect", b"Connection"]),
        ),
        st.one_of(BYTES, st.sampled_from([b"0", b"1", b"3", b"chunked", b"100-continue", b"close", b"gzip"])),
    ),
    max_size=5,
)


@SETTINGS
@hypothesis.given(st.sampled_from(["http", "https", "WS", "wss"]), HOSTS, st.none() | PORTS, PATHS, QUERIES)
def test_a_url_is_the_sum_of_its_parts(
    scheme: str, host: str, port: int | None, path: str, query: str
) -> None:
    colon_and_port = "" if port is None else f":{port}"
    url = URL(f"{scheme}://{host}{colon_and_port}{path}{query}")
    assert url == URL(scheme=scheme, host=host, port=port, target=path + query)
    assert url.target == (path + query).encode()
    assert url.port == port
    assert URL(bytes(url)) == url
    assert hash(URL(bytes(url))) == hash(url)
    assert URL(f"{scheme}://{host}{colon_and_port}{path}{query}#frag?ment") == url


@SETTINGS
@hypothesis.given(URL_TEXT | BYTES, st.booleans())
@hypothesis.example("http://\uff0f/", True)
@hypothesis.example("http://a\\@b/", True)
def test_whatever_url_is_taken_or_refused(rest: Any, with_scheme: bool) -> None:
    scheme: Any = "http://" if isinstance(rest, str) else b"http://"
    whole = scheme + rest if with_scheme else rest
    try:
        url = URL(whole)
    except REFUSED:
        return
    assert not set(url.host) & set(b" \t\r\n\0/?#@\\[]")
    assert url.host.isascii()
    assert url.port is None or 0 < url.port < 65536
    assert b"#" not in url.target
    assert url.scheme == url.scheme.lower()
    # Taking a URL apart loses nothing that is sent.
    if url.scheme == b"http" and url.host and b"%" not in url.host and url.target.startswith(b"/"):
        assert URL(bytes(url)) == url


@SETTINGS
@hypothesis.given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_parts_are_taken_or_refused(scheme: str, host: str, target: str) -> None:
    try:
        url = URL(scheme=scheme, host=host, target=target)
    except REFUSED:
        return
    assert not set(url.host) & set(b" \t\r\n\0/?#@\\[]")


@SETTINGS
@hypothesis.given(URL_TEXT)
def test_a_proxys_password_is_never_shown(text: str) -> None:
    # What follows a slash, question mark or number sign is no userinfo, and then this isn't either.
    hypothesis.assume(not set(text) & set("/?#"))
    try:
        shown = repr(Proxy(f"http://user:hunter2{text}@proxy:80/"))
    except REFUSED as exc:
        shown = str(exc)
    assert "hunter2" not in shown


# A mistake wherever one can be made, and an `@`, also encoded, somewhere after the secret.
MISTAKES = st.text(
    st.one_of(st.sampled_from(":/?#[]@%. \t\r\n\0\xff\u00e4\u2100\uff0f\uff20"), st.characters()), max_size=4
)
AROUND = st.one_of(
    MISTAKES,
    st.sampled_from(
        ["", "http", "http:", "http:/", "http://", "//", "http://u:", "http://[", "ftp://", "http://h:9"]
    ),
)
AFTER = st.one_of(
    MISTAKES, st.sampled_from(["", "h", "h:99999", "h:x/", "[::1", "h/\u00e4", "\u2100.com", "h/ "])
)
AT = st.sampled_from(["@", "%40", "%2540", "\uff20", ":@", "@@"])


def sent(url: Any) -> object:
    prepared = PreparedRequest(Request("GET", url))
    return ConnectionKey.for_request(prepared.request), request_headers(prepared)


def with_target(target: Any) -> object:
    prepared = PreparedRequest(Request("GET", "http://h", extensions={"target": target}))
    return ConnectionKey.for_request(prepared.request), request_headers(prepared)


def from_environment(url: Any) -> object:
    value = url.decode("latin-1") if isinstance(url, bytes) else url
    with mock.patch.object(os, "environ", {"http_proxy": value}):
        return proxy_from_environment("http://h")


@SETTINGS
@hypothesis.given(
    around=AROUND,
    more=MISTAKES,
    at=AT,
    rest=AFTER,
    take=st.sampled_from([URL, Proxy, sent, with_target, from_environment, proxy_from_environment]),
    kind=st.sampled_from(["str", "bytes", "long"]),
)
@hypothesis.example("", ":", "@", "proxy.example.com:8080", Proxy, "str")
@hypothesis.example("http://u:", "", "%40", "h/", URL, "str")
@hypothesis.example("http:/u:", "", "@", "h/ ", sent, "str")
@hypothesis.example("http://", "\u2100", "\uff20", "", URL, "str")
@hypothesis.example("http://u:", "", "@", "h/ ", with_target, "str")
@hypothesis.example("", "", "@", "h", with_target, "str")
@hypothesis.example("", "#", "@", "h", sent, "str")
@hypothesis.example("", "://h#", "@", "", sent, "str")
@hypothesis.example("", "://\u00fc#", "@", "", sent, "str")
@hypothesis.example("http://h/", " #", "%40", "", sent, "str")
def test_no_error_shows_what_stands_before_an_at(
    around: str, more: str, at: str, rest: str, take: Any, kind: str
) -> None:
    """Neither its message nor what else its traceback shows."""
    whole: Any = f"{around}hunter2{more}{at}{rest}"
    if kind == "long":
        whole += "x" * 2000
    elif kind == "bytes":
        whole = whole.encode("utf-8", "replace")
    shown = ""
    try:
        take(whole)
    except REFUSED as exc:
        shown = "".join(traceback.format_exception(exc))
    assert "hunter2" not in shown


@SETTINGS
@hypothesis.given(
    method=st.one_of(st.sampled_from([b"GET", b"POST", b"CONNECT"]), BYTES),
    target=st.none() | BYTES,
    headers=HEADERS,
    content=st.one_of(st.none(), BYTES, st.lists(BYTES, max_size=2)),
)
@hypothesis.example(method=b"GET", target=b"/\xff", headers=[], content=None)
@hypothesis.example(method=b"GET", target=None, headers=[(b"Host", b"a"), (b"host", b"b")], content=None)
def test_what_is_prepared_can_be_sent(
    method: bytes, target: bytes | None, headers: list[tuple[bytes, bytes]], content: Any
) -> None:
    request = Request(
        method, "http://example.com/", headers=headers, content=content, extensions={"target": target}
    )
    try:
        prepared = PreparedRequest(request)
    except LocalProtocolError:
        return
    client = h11.Connection(h11.CLIENT)
    head = h11.Request(method=prepared.method, target=prepared.target, headers=prepared.headers)
    data = client.send(head)
    assert data is not None
    # The request line, one line for each header, and the empty line that ends the head: nothing injected.
    assert data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r") == len(prepared.headers) + 2
    assert b"\0" not in data
    assert [pair for pair in prepared.headers if pair in headers] == headers
    if prepared.body is not None:
        if prepared.body:
            client.send(h11.Data(data=prepared.body))
        client.send(h11.EndOfMessage())


@SETTINGS
@hypothesis.given(st.lists(st.tuples(BYTES, BYTES), max_size=5))
def test_headers_are_kept_as_they_are(headers: list[tuple[bytes, bytes]]) -> None:
    assert Request("GET", "http://h", headers=headers).headers == headers
    assert Request("GET", "http://h", headers=dict(headers)).headers == list(dict(headers).items())
