from __future__ import annotations

import ssl
from typing import Any

import pytest

from trio_exchange import (
    InvalidURL,
    Origin,
    Proxy,
    Request,
    UnsupportedProtocol,
    default_ssl_context,
)
from trio_exchange._connect.connector import Connector
from trio_exchange._connect.dialers import DirectDialer
from trio_exchange._connect.factory import TCP, ConnectionFactory, ConnectionKey

NOWHERE = DirectDialer(Connector())


def route(url: str, **extensions: Any) -> ConnectionKey:
    return ConnectionKey.for_request(Request("GET", url, extensions=extensions))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", ConnectionKey(b"http", b"h", 80, None)),
        ("http://h:81/p?q", ConnectionKey(b"http", b"h", 81, None)),
        ("ws://h", ConnectionKey(b"ws", b"h", 80, None)),
        ("https://H/", ConnectionKey(b"https", b"h", 443, "h")),
        ("wss://h:1/", ConnectionKey(b"wss", b"h", 1, "h")),
        ("https://example.com./", ConnectionKey(b"https", b"example.com.", 443, "example.com")),
        ("https://[fe80::1%25eth0]/", ConnectionKey(b"https", b"fe80::1%eth0", 443, "fe80::1")),
        ("https://b\u00fccher.de", ConnectionKey(b"https", b"xn--bcher-kva.de", 443, "xn--bcher-kva.de")),
    ],
)
def test_a_route(url: str, expected: ConnectionKey) -> None:
    assert route(url) == expected


def test_requests_share_a_route_whatever_their_target() -> None:
    assert route("https://h/a") == route("https://h:443/b?c", target="/d")


@pytest.mark.parametrize("other", ["http://h", "wss://h", "https://g", "https://h:444"])
def test_what_makes_another_route(other: str) -> None:
    assert route("https://h") != route(other)


@pytest.mark.parametrize("name", ["other.example", b"other.example", "other.example."])
def test_the_sni_name_makes_another_route(name: str | bytes) -> None:
    assert route("https://h", sni_hostname=name) == ConnectionKey(b"https", b"h", 443, "other.example")


def test_an_sni_name_of_none_is_the_host() -> None:
    assert route("https://h", sni_hostname=None) == route("https://h")


def test_an_sni_name_is_not_cut_like_an_address() -> None:
    assert route("https://h", sni_hostname="good.example%evil").server_hostname == "good.example%evil"


def test_the_sni_name_is_of_no_concern_without_tls() -> None:
    assert route("http://h", sni_hostname="other") == route("http://h")


@pytest.mark.parametrize("name", [1, ["h"], bytearray(b"h")])
def test_an_sni_name_that_is_no_text(name: object) -> None:
    with pytest.raises(TypeError, match="the sni_hostname extension must be str or bytes"):
        route("https://h", sni_hostname=name)


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("ftp://h/", "ftp"),
        ("httpx://h", "httpx"),
        ("//h/", ""),
        ("/path", ""),
        ("", ""),
        ("localhost:80", "localhost"),
    ],
)
def test_a_scheme_that_we_do_not_speak(url: str, scheme: str) -> None:
    with pytest.raises(UnsupportedProtocol, match=f"must be http, https, ws or wss, not '{scheme}'"):
        route(url)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("localhost:8080/", "; did you mean 'http://localhost:8080/'?"),
        ("127.0.0.1:8080/", "; did you mean 'http://127.0.0.1:8080/'?"),
        ("example.com/x?y", "; did you mean 'http://example.com/x?y'?"),
        ("[::1]:80", "; did you mean 'http://[::1]:80'?"),
        ("//h:1/x", "; did you mean 'http://h:1/x'?"),
        ("/path", ""),
        ("ftp://h:1/x", ""),
        ("data:text", ""),
    ],
)
def test_a_url_without_scheme_gets_a_hint(url: str, hint: str) -> None:
    with pytest.raises(InvalidURL) as info:
        route(url)
    _, separator, rest = str(info.value).partition(";")
    assert separator + rest == hint


@pytest.mark.parametrize("url", ["http:///path", "https://", "http:path", "http://:80/"])
def test_a_url_without_host(url: str) -> None:
    with pytest.raises(ValueError, match="the URL has no host"):
        route(url)


@pytest.mark.parametrize(
    ("proxy", "expected"),
    [
        ("http://user@p", ConnectionKey(b"http", b"p", 80, None, to_proxy=True)),
        ("https://p:8443/", ConnectionKey(b"https", b"p", 8443, "p", to_proxy=True)),
        ("https://[::1]", ConnectionKey(b"https", b"::1", 443, "::1", to_proxy=True)),
    ],
)
def test_the_route_to_a_proxy(proxy: str, expected: ConnectionKey) -> None:
    assert ConnectionKey.for_proxy(Proxy(proxy)) == expected
    assert route(expected.origin.scheme.decode() + "://p") != expected


def test_what_is_not_http_is_not_shared() -> None:
    """Though it may be to where HTTP/2 is known to be spoken."""
    factory = ConnectionFactory(NOWHERE, http1=False, http2=True)
    assert factory.may_share(route("http://h"))
    assert not factory.may_share(ConnectionKey(TCP, b"h", 80, None))


def test_a_routes_origin() -> None:
    assert route("wss://h/x", sni_hostname="y").origin == Origin(b"wss", b"h", 443)


def test_no_tls_for_a_plain_route() -> None:
    assert ConnectionFactory(NOWHERE, ssl.create_default_context()).tls_settings(route("http://h")) is None


def test_the_pools_context_is_used() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    settings = ConnectionFactory(NOWHERE, context).tls_settings(route("https://h"))
    assert settings is not None
    assert settings.context is context
    assert settings.server_hostname == "h"
    assert settings.alpn == ("http/1.1",)


def test_without_a_context_each_offer_has_a_default_one_of_its_own() -> None:
    first = ConnectionFactory(NOWHERE).tls_settings(route("https://h"))
    second = ConnectionFactory(NOWHERE).tls_settings(route("https://g"))
    other = ConnectionFactory(NOWHERE, http2=True).tls_settings(route("https://h"))
    assert first is not None
    assert second is not None
    assert other is not None
    assert first.context is second.context
    assert len({id(first.context), id(other.context), id(default_ssl_context())}) == 3
