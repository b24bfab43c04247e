from __future__ import annotations

import base64
import itertools
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from types import MappingProxyType
from typing import Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints

from tests.harness.networks import Network
from tests.harness.peers import Recorder
from trio_exchange import (
    URL,
    ConnectionPool,
    InvalidURL,
    LocalProtocolError,
    Origin,
    Proxy,
    Request,
    Response,
    UnsupportedProtocol,
)
from trio_exchange._connect.factory import ConnectionKey
from trio_exchange._content import ByteStream, CollectableStream
from trio_exchange._http.request import PreparedRequest, RequestBody, RequestContext
from trio_exchange._timeouts import Timeouts
from trio_exchange.testing import ScriptedPeer


class MyBytes(bytes):
    pass


class AsyncChunks:
    """Chunks that can be iterated once more each time; `closed` counts `aclose`."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.closed = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            await trio.lowlevel.checkpoint()
            yield chunk

    async def aclose(self) -> None:
        self.closed += 1
        await trio.lowlevel.checkpoint()


async def collect(chunks: Any) -> list[bytes]:
    return [chunk async for chunk in chunks]


# -- URL.


@pytest.mark.parametrize(
    ("whole", "scheme", "host", "port", "target"),
    [
        ("http://example.com", b"http", b"example.com", None, b"/"),
        ("https://example.com/", b"https", b"example.com", None, b"/"),
        ("HTTP://EXAMPLE.com/Path", b"http", b"example.com", None, b"/Path"),
        ("http://example.com:8080/a/b?c=d&e", b"http", b"example.com", 8080, b"/a/b?c=d&e"),
        ("http://example.com:080/", b"http", b"example.com", 80, b"/"),
        ("http://example.com:65535", b"http", b"example.com", 65535, b"/"),
        ("http://example.com:", b"http", b"example.com", None, b"/"),
        ("http://example.com?q", b"http", b"example.com", None, b"/?q"),
        ("http://example.com/?", b"http", b"example.com", None, b"/?"),
        ("http://example.com/a?b?c", b"http", b"example.com", None, b"/a?b?c"),
        ("http://example.com/@:x/?@", b"http", b"example.com", None, b"/@:x/?@"),
        ("http://example.com?@b", b"http", b"example.com", None, b"/?@b"),
        ("http://example.com/%20%zz", b"http", b"example.com", None, b"/%20%zz"),
        ("http://example.com//a//", b"http", b"example.com", None, b"//a//"),
        ("http://example.com/a/../b", b"http", b"example.com", None, b"/a/../b"),
        ("http://example.com/http://other/", b"http", b"example.com", None, b"/http://other/"),
        ("http://my_host.internal./", b"http", b"my_host.internal.", None, b"/"),
        ("http://127.0.0.1:1/", b"http", b"127.0.0.1", 1, b"/"),
        ("http://[::1]", b"http", b"::1", None, b"/"),
        ("http://[2001:DB8::A]:8080/x", b"http", b"2001:db8::a", 8080, b"/x"),
        ("http://[fe80::1%25Eth0]/", b"http", b"fe80::1%Eth0", None, b"/"),
        ("http://[fe80::1%Eth0]/", b"http", b"fe80::1%Eth0", None, b"/"),
        ("http://[fe80::1%2525]/", b"http", b"fe80::1%25", None, b"/"),
        ("wss://example.com/chat", b"wss", b"example.com", None, b"/chat"),
        ("http:///path", b"http", b"", None, b"/path"),
        ("http:path", b"http", b"", None, b"path"),
        ("//example.com/x", b"", b"example.com", None, b"/x"),
        ("/path?q", b"", b"", None, b"/path?q"),
        ("?q", b"", b"", None, b"/?q"),
        ("localhost:80/x", b"localhost", b"", None, b"80/x"),
        ("", b"", b"", None, b"/"),
    ],
)
@pytest.mark.parametrize("kind", [str, str.encode])
def test_a_url_taken_apart(
    kind: Callable[[str], Any], whole: str, scheme: bytes, host: bytes, port: int | None, target: bytes
) -> None:
    url = URL(kind(whole))
    assert (url.scheme, url.host, url.port, url.target) == (scheme, host, port, target)
    assert url == URL(scheme=scheme, host=host, port=port, target=target)


@pytest.mark.parametrize(
    "whole", ["http://h#f", "http://h/#f", "http://h/#f?q", "http://h#f/?#@x:y", "http://h/#\u00e4"[:-1]]
)
def test_a_fragment_is_dropped(whole: str) -> None:
    assert URL(whole) == URL("http://h/")
    assert URL("http://h/p?q#f?g#h").target == b"/p?q"


def test_a_url_in_parts_as_text() -> None:
    url = URL(scheme="HTTP", host="[2001:DB8::A]", port=1, target="/X")
    assert (url.scheme, url.host, url.port, url.target) == (b"http", b"2001:db8::a", 1, b"/X")
    assert URL(scheme="http", host="h").target == URL(scheme="http", host="h", target="").target == b"/"


@pytest.mark.parametrize(
    ("host", "encoded"),
    [
        ("b\u00fccher.example", b"xn--bcher-kva.example"),
        ("B\u00dcCHER.example", b"xn--bcher-kva.example"),
        ("\u65e5\u672c\u8a9e.jp", b"xn--wgv71a119e.jp"),
        ("example\u3002com", b"example.com"),
        ("\uff45xample.com", b"example.com"),
        ("stra\u00dfe.de", b"xn--strae-oqa.de"),
    ],
)
def test_a_host_that_is_not_ascii_is_encoded_by_idna(host: str, encoded: bytes) -> None:
    assert URL(f"http://{host}").host == encoded
    assert URL(f"http://{host}:81/p?q#f") == URL(scheme="http", host=encoded, port=81, target="/p?q")
    assert URL(scheme="http", host=host).host == encoded


@pytest.mark.parametrize(
    ("message", "hosts"),
    [
        (
            "is not a host name",
            ["\u2100.com", "a..\u00fc", "\u00fc" * 300, "\u00fc b", "-\u00fc-", "\u00fc\u202e"],
        ),
        (
            "host must be a name or an address",
            ["a%2eb", "good.example%2eevil.example", "a\\b", 'a"b', "<a>", "a^b", "a|b", "`", "{a}"],
        ),
        ("host must be a name or an address", [b"\xfc", b"b\xc3\xbccher"]),
    ],
    ids=["idna refuses it", "neither name nor address", "bytes that are not ASCII"],
)
def test_a_host_that_can_not_be_one(message: str, hosts: list[str | bytes]) -> None:
    for host in hosts:
        with pytest.raises(ValueError, match=message):
            URL(f"http://{host}/" if isinstance(host, str) else b"http://%b/" % host)
        with pytest.raises(ValueError, match=message):
            URL(scheme="http", host=host)


NOT_ASCII = "the URL's {} must be ASCII, .* '\u00e4' as '%C3%A4'"
PORT_RANGE = "port must be between 1 and 65535"


@pytest.mark.parametrize(
    ("part", "values", "error", "message"),
    [
        ("scheme", ["/\u00e4"], InvalidURL, NOT_ASCII.format("scheme")),
        ("target", ["/\u00e4"], InvalidURL, NOT_ASCII.format("target")),
        ("host", ["a/b", "a?b", "a#b", "a@b", "user:pw@h"], ValueError, "host"),
        ("host", ["[]", "[::1", "::1]", "[:::1]", "[example.com]"], ValueError, "IPv6 address"),
        ("host", ["[127.0.0.1]", "h:80", "[::1%]", "[v1.a]", "1:2"], ValueError, "IPv6 address"),
        ("port", [0, -1, 65536, 2**64], ValueError, PORT_RANGE),
        ("port", ["80", 80.0, True, b"80"], TypeError, "port must be an int or None"),
    ],
    ids=[
        "scheme that is not ASCII", "target that is not ASCII", "host with other parts", "brackets", "colons",
        "port out of range", "port that is no number",
    ],
)  # fmt: skip
def test_a_part_that_is_refused(part: str, values: list[Any], error: type[Exception], message: str) -> None:
    for value in values:
        parts: dict[str, Any] = {"scheme": "http", "host": "h", part: value}
        with pytest.raises(error, match=message):
            URL(**parts)


AUTHORITIES = ["::1", "[::1", "::1]", "[::1]x", "[::1]:x", "a:b:c", "h:x", "h:-1", "h:+1", "h:1e3", "[[::1]]"]


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ("http://h/\u00e4", "URL's path must be ASCII, with all else percent-encoded, '\u00e4' as '%C3%A4'"),
        ("http://h/\ud800", r"URL's path must be ASCII, .*, '\\ud800' as '%ED%A0%80'"),
        ("http://\u00e4/\u00e4", "the URL's path must be ASCII"),
        ("/\u00e4", "the URL's path must be ASCII"),
        ("http://h?\u00e4", "the URL's query must be ASCII"),
        ("http://h/?a=://\u00e4", "the URL's query must be ASCII"),
        ("/?a=http://\u00e4/", "the URL's query must be ASCII"),
        ("http://h/#\u00e4", "the URL's fragment must be ASCII"),
        ("http://h:\uff18\uff10/", r"the URL's authority must be HOST or HOST:PORT, not 'h:\uff18\uff10'"),
        ("http://u\u00e4@h/", "a URL with userinfo"),
        ("\u00e4://h/", "a URL must begin with SCHEME://HOST$"),
        ("\u00e4", "a URL must begin with SCHEME://HOST, such as 'http://\u00e4'"),
        ("b\u00fccher.example/x", "must begin with SCHEME://HOST, such as 'http://b\u00fccher.example/x'"),
        *((f"http://{authority}/", "must be HOST or HOST:PORT") for authority in AUTHORITIES),
        *(
            (whole, r"; an IPv6 address needs brackets, such as \[::1\]$")
            for whole in ("http://::1/", b"http://::1:80/", "http://::1:\uff18/")
        ),
        *((f"http://h:{port}/", PORT_RANGE) for port in ("0", "00", "65536", "9" * 100)),
    ],
)
def test_a_whole_url_that_is_refused(whole: str | bytes, message: str) -> None:
    with pytest.raises(InvalidURL, match=message):
        URL(whole)


@pytest.mark.parametrize(
    "whole",
    [
        "http://h:99999/",
        "http://h:" + "9" * 10_000,
        "http://h:x/",
        "http://user@h/",
        "user:password@h",
        "http:user:password@h",
        "http:/user:password@h",
        "http://a b/",
        "http://a%b/",
        "http://[1]/",
        "http://\u2100.com/",
        "http://h/\u00e4",
        "ht tp://h/",
        "http://h/a b",
        b"http://h/\xff",
        " http://h/",
        "http:///path",
        "ftp://h/",
        "localhost:8080/",
    ],
)
async def test_every_mistake_in_a_url_is_an_invalid_url(whole: str | bytes) -> None:
    """Also a `LocalProtocolError`, as most of them were, and a `ValueError`."""
    async with ConnectionPool() as pool:
        with pytest.raises(InvalidURL) as info:
            await pool.request("GET", whole)
    assert isinstance(info.value, LocalProtocolError)
    assert isinstance(info.value, ValueError)
    assert type(info.value) in (InvalidURL, UnsupportedProtocol)


def test_a_port_of_many_digits() -> None:
    assert URL("http://h:" + "0" * 10_000 + "80").port == 80
    with pytest.raises(InvalidURL, match="port must be between 1 and 65535, not 9999"):
        URL("http://h:" + "9" * 10_000)


def test_white_space_in_a_url_wants_percent_encoding() -> None:
    with pytest.raises(InvalidURL, match=r": b'/a b'; percent-encode them in the URL, ' ' as '%20'$"):
        prepare("GET", url="http://h/a b")
    with pytest.raises(LocalProtocolError, match=r": b'/a b'$"):
        prepare("GET", extensions={"target": "/a b"})


@pytest.mark.parametrize(
    "whole", ["http://user:password@h/", "http://user@h", "http://@h", "http://:@h:80?x", "http://a:b@c@h/"]
)
def test_userinfo_is_refused(whole: str) -> None:
    with pytest.raises(ValueError, match="userinfo") as info:
        URL(whole)
    assert "Authorization header" in str(info.value)
    assert "password@" not in str(info.value)


@pytest.mark.parametrize(
    "whole",
    ["http://u:hunter2@h:x/", "http://u:hunter2@[h]/", "http://u: hunter2@h/", "http://u:hunter2\u00e4@h/"],
)
@pytest.mark.parametrize("make", [URL, Proxy])
def test_no_error_shows_a_password(make: Callable[[str], object], whole: str) -> None:
    with pytest.raises((ValueError, TypeError, LocalProtocolError)) as info:
        make(whole)
    assert "hunter2" not in str(info.value)


@pytest.mark.parametrize("bad", [" ", "\t", "\n", "\r", "\0", "\x7f", "\x1f"])
def test_white_space_and_controls_in_a_host(bad: str) -> None:
    for whole in (f"http://a{bad}b/", f"http://h:8{bad}0/", f"http://{bad}/", f"http://[::1]{bad}/"):
        with pytest.raises(LocalProtocolError, match="the URL's host has white space"):
            URL(whole)
    with pytest.raises(LocalProtocolError, match="host has white space"):
        URL(scheme="http", host=f"a{bad}b")


@pytest.mark.parametrize("value", [1, 1.5, object(), ("http", "h"), bytearray(b"http://h")])
def test_a_url_of_the_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError, match="url"):
        URL(value)
    with pytest.raises(TypeError, match="url must be a URL, bytes or str"):
        Request("GET", value)


@pytest.mark.parametrize("part", ["scheme", "host", "target"])
@pytest.mark.parametrize("value", [1, None, bytearray(b"x")])
def test_a_part_of_the_wrong_type(part: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{part} must be bytes or str"):
        URL(**{part: value})


def test_a_url_is_given_one_way() -> None:
    with pytest.raises(TypeError, match="as a whole or in parts, not both"):
        URL("http://h/", target="/path")
    nothing: Any = None
    with pytest.raises(TypeError, match="url must be bytes or str, but got NoneType"):
        URL(nothing)


def test_the_parts_are_checked_like_the_whole() -> None:
    with pytest.raises(LocalProtocolError, match=r"scheme has white space or control characters: b'ht tp'"):
        URL(scheme="ht tp", host="h")
    with pytest.raises(ValueError, match="without '@'") as info:
        URL(scheme="http", host="user:secret@h")
    assert "secret" not in str(info.value)


def test_a_header_that_is_not_ascii_is_named_and_not_shown() -> None:
    with pytest.raises(TypeError, match="character at index 6 is not, for b'Authorization'") as info:
        Request("GET", "http://h/", headers={"Authorization": "secret\u00e4"})
    assert "secret" not in str(info.value)


def test_bytes_of_a_subclass_and_str_of_a_subclass_pass() -> None:
    class MyStr(str):
        pass

    assert URL(MyBytes(b"http://h/p")) == URL(MyStr("http://h/p")) == URL("http://h/p")


@pytest.mark.parametrize(
    "whole",
    ["http://h/", "http://h:80/p?q", "https://[::1]/", "wss://[2001:db8::1]:81/x?y=z", "http://h/@?:"],
)
def test_a_url_as_bytes_is_the_url_again(whole: str) -> None:
    assert bytes(URL(whole)) == whole.encode()
    assert URL(bytes(URL(whole))) == URL(whole)


def test_a_zone_is_not_in_the_url_that_is_sent() -> None:
    assert bytes(URL("http://[fe80::1%25eth0]:80/")) == b"http://[fe80::1]:80/"


@pytest.mark.parametrize(
    ("url", "whole", "shown"),
    [
        (URL("https://Example.com:1/p?q"), "https://example.com:1/p?q", None),
        (URL("https://h"), "https://h/", None),
        (URL("http://[::1]:80/"), "http://[::1]:80/", None),
        (URL("/path?q"), "/path?q", None),
        (URL("localhost:80/x"), "localhost:80/x", None),
        (URL("//h:1/x"), "//h:1/x", None),
        (URL("http:///x"), "http:/x", None),
        (
            URL("http://[fe80::1%25a]/"),
            "http://[fe80::1]/",
            "URL(scheme=b'http', host=b'fe80::1%a', port=None, target=b'/')",
        ),
        (
            URL(scheme="http", host="h", target="*"),
            "http://h *",
            "URL(scheme=b'http', host=b'h', port=None, target=b'*')",
        ),
        (
            URL(b"http://h/\xff"),
            "http://h/\xff",
            "URL(scheme=b'http', host=b'h', port=None, target=b'/\\xff')",
        ),
    ],
)
def test_a_url_as_text(url: URL, whole: str, shown: str | None) -> None:
    """The `repr` makes the URL again, and is the short form where that does."""
    assert str(url) == f"{url}" == whole
    assert repr(url) == (f"URL({whole!r})" if shown is None else shown)
    assert eval(repr(url)) == url


def test_equal_urls() -> None:
    assert URL("HTTP://H/") == URL("http://h")
    assert len({URL("HTTP://H/"), URL("http://h"), URL("http://h/#f")}) == 1


@pytest.mark.parametrize(
    "other",
    [
        URL("https://h/"),
        URL("http://g/"),
        URL("http://h:80/"),
        URL("http://h/?"),
        b"http://h/",
        "http://h/",
        None,
    ],
)
def test_unequal_urls(other: object) -> None:
    assert URL("http://h/") != other


def test_urls_that_differ_only_in_what_is_not_sent_are_different() -> None:
    assert URL("http://[fe80::1%25a]/") != URL("http://[fe80::1%25b]/")
    assert URL(scheme="http", host="h", target="1") != URL(scheme="http", host="h1", target="/")
    assert URL(scheme="http", host="h", target="1/") != URL(scheme="http", host="h1", target="/")


# -- Origin.


@pytest.mark.parametrize(
    ("whole", "origin", "text"),
    [
        ("http://h", Origin(b"http", b"h", 80), "http://h:80"),
        ("https://h/x", Origin(b"https", b"h", 443), "https://h:443"),
        ("ws://h", Origin(b"ws", b"h", 80), "ws://h:80"),
        ("wss://h", Origin(b"wss", b"h", 443), "wss://h:443"),
        ("http://h:443", Origin(b"http", b"h", 443), "http://h:443"),
        ("http://[::1]:8", Origin(b"http", b"::1", 8), "http://[::1]:8"),
        ("ftp://h", Origin(b"ftp", b"h", 0), "ftp://h:0"),
    ],
)
def test_an_origin(whole: str, origin: Origin, text: str) -> None:
    assert URL(whole).origin == origin
    assert hash(URL(whole).origin) == hash(origin)
    assert str(origin) == text


@pytest.mark.parametrize(
    "other",
    [Origin(b"https", b"h", 80), Origin(b"http", b"g", 80), Origin(b"http", b"h", 81), "http://h:80", None],
)
def test_unequal_origins(other: object) -> None:
    assert Origin(b"http", b"h", 80) != other


def test_the_repr_of_an_origin() -> None:
    assert repr(Origin(b"http", b"h", 80)) == "Origin(scheme=b'http', host=b'h', port=80)"


def test_an_origin_of_whatever_bytes_can_be_shown() -> None:
    assert str(URL(scheme=b"\xff", host="h").origin) == "\xff://h:0"


# -- Request.


def test_a_request() -> None:
    request = Request("GET", "http://example.com/p?q", headers={"A": "b"}, extensions={"timeout": None})
    assert request.method == b"GET"
    assert request.url == URL("http://example.com/p?q")
    assert request.headers == [(b"A", b"b")]
    assert request.extensions == {"timeout": None}
    assert repr(request) == "<Request [GET 'http://example.com/p?q']>"
    assert repr(request.stream) == "<ByteStream [0 bytes]>"


@pytest.mark.parametrize(
    ("method", "target", "shown"),
    [
        ("OPTIONS", "*", "<Request [OPTIONS 'http://h *']>"),
        ("CONNECT", "example.com:443", "<Request [CONNECT 'http://h example.com:443']>"),
        ("GET", "/@/?", "<Request [GET 'http://h/@/?']>"),
        (b"M\xff", "http://user:hunter2@example.com/", r"<Request [M\xff 'http://h:80']>"),
    ],
)
def test_a_requests_repr_shows_its_target_without_credentials(
    method: str | bytes, target: str, shown: str
) -> None:
    assert repr(Request(method, "http://h", extensions={"target": target})) == shown


def test_bytes_pass_as_they_are() -> None:
    url = URL("http://h")
    request = Request(b"M\xff", url, headers=[(b"\xfe", b"\xfd")])
    assert request.method == b"M\xff"
    assert request.url is url
    assert request.headers == [(b"\xfe", b"\xfd")]


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("method", {"method": "G\u00cbT"}),
        ("header names", {"headers": {"\u00e4": "b"}}),
        ("header values", {"headers": [("a", "\u00e4")]}),
        ("target", {"extensions": {"target": "/\u00e4"}}),
    ],
)
def test_text_must_be_ascii(field: str, arguments: dict[str, Any]) -> None:
    arguments = {"method": "GET", "url": "http://h/", **arguments}
    with pytest.raises(TypeError, match=f"{field}.* given as str must be ASCII"):
        Request(**arguments)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("method", {"method": 1}),
        ("method", {"method": None}),
        ("method", {"method": bytearray(b"GET")}),
        ("url", {"url": None}),
        ("headers", {"headers": 1}),
        ("headers", {"headers": "a: b"}),
        ("headers", {"headers": b"a: b"}),
        ("headers", {"headers": bytearray(b"a: b")}),
        ("header", {"headers": ["ab"]}),
        ("header", {"headers": [b"ab"]}),
        ("header", {"headers": [("a",)]}),
        ("header", {"headers": [("a", "b", "c")]}),
        ("header", {"headers": [5]}),
        ("header names", {"headers": {1: "b"}}),
        ("header values", {"headers": {"a": 1}}),
        ("header values", {"headers": {"a": ["b"]}}),
        ("header values", {"headers": [("a", None)]}),
        ("content", {"content": "text"}),
        ("content", {"content": 1}),
        ("content", {"content": {"a": "b"}}),
        ("content", {"content": object()}),
        ("target", {"extensions": {"target": 5}}),
        ("extensions must be a mapping or None, but got list", {"extensions": [("target", b"/")]}),
        ("a pair of name and value, but got str", {"headers": ["Cookie: x"]}),
        ("a pair of name and value, but got 3 items", {"headers": [("a", "b", "c")]}),
        ("header values must be bytes or str, but got int for b'X-A'", {"headers": {"X-A": 5}}),
    ],
)
def test_arguments_of_the_wrong_type(field: str, arguments: dict[str, Any]) -> None:
    arguments = {"method": "GET", "url": "http://h/", **arguments}
    with pytest.raises(TypeError, match=field):
        Request(**arguments)


PAIRS = [(b"B", b"1"), (b"a", b"2"), (b"b", b"3"), (b"B", b"1")]


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_headers_keep_order_case_and_repetitions(kind: Callable[[Any], Any]) -> None:
    assert Request("GET", "http://h", headers=kind(PAIRS)).headers == PAIRS


def test_pairs_may_be_lists() -> None:
    pairs: Any = [["A", b"b"]]
    assert Request("GET", "http://h", headers=pairs).headers == [(b"A", b"b")]


@pytest.mark.parametrize("kind", [dict, MappingProxyType])
def test_headers_of_a_mapping_keep_its_order(kind: Callable[[Any], Any]) -> None:
    headers = kind({"Zed": b"1", b"Alpha": "2"})
    assert Request("GET", "http://h", headers=headers).headers == [(b"Zed", b"1"), (b"Alpha", b"2")]


def test_what_the_caller_gave_is_copied() -> None:
    headers = [(b"a", b"b")]
    extensions = {"a": 1}
    request = Request("GET", "http://h", headers=headers, extensions=extensions)
    headers.clear()
    extensions.clear()
    assert request.headers == [(b"a", b"b")]
    assert request.extensions == {"a": 1}


@pytest.mark.parametrize("target", ["*", b"http://other/x", "host:443", ""])
def test_the_target_extension_replaces_the_target(target: str | bytes) -> None:
    url = URL("http://[fe80::1%25a]:1/p")
    request = Request("GET", url, extensions={"target": target})
    assert request.url.target == (target.encode() if isinstance(target, str) else target)
    assert (request.url.scheme, request.url.host, request.url.port) == (b"http", b"fe80::1%a", 1)
    assert url.target == b"/p"


# -- Content.


@pytest.mark.parametrize(
    "content",
    [b"body", bytearray(b"body"), memoryview(b"body"), memoryview(b"b_o_d_y")[::2], MyBytes(b"body")],
)
async def test_content_that_is_there_as_a_whole(content: Any) -> None:
    stream = Request("POST", "http://h", content=content).stream
    assert repr(stream) == "<ByteStream [4 bytes]>"
    assert await collect(stream) == [b"body"]
    assert await collect(stream) == [b"body"]


async def test_content_that_is_there_as_a_whole_is_copied() -> None:
    content: Any = bytearray(b"body")
    stream = Request("POST", "http://h", content=content).stream
    content[:] = b"else"
    assert await collect(stream) == [b"body"]


@pytest.mark.parametrize("kind", [list, tuple, iter, set])
async def test_content_from_an_ordinary_iterable(kind: Callable[[Any], Any]) -> None:
    stream = Request("POST", "http://h", content=kind([b"chunk"])).stream
    with assert_checkpoints():
        assert await collect(stream) == [b"chunk"]


async def test_each_step_of_an_ordinary_iterator_is_a_checkpoint() -> None:
    iterator = aiter(Request("POST", "http://h", content=[b"a", b"b"]).stream)
    assert aiter(iterator) is iterator
    for expected in (b"a", b"b"):
        with assert_checkpoints():
            assert await anext(iterator) == expected
    with assert_checkpoints(), pytest.raises(StopAsyncIteration):
        await anext(iterator)


async def test_an_asynchronous_iterable_is_taken_as_it_is() -> None:
    content = AsyncChunks(b"a", b"b")
    assert Request("POST", "http://h", content=content).stream is content


# -- Response.


async def test_a_response() -> None:
    response = Response(200, headers={"A": "b"}, content=b"body", extensions={"http_version": b"HTTP/1.1"})
    assert response.status == 200
    assert response.headers == [(b"A", b"b")]
    assert response.extensions == {"http_version": b"HTTP/1.1"}
    assert repr(response) == "<Response [200]>"
    with pytest.raises(RuntimeError, match="aread"):
        _ = response.content
    assert await response.aread() == b"body"
    assert response.content == b"body"


def test_a_response_without_anything() -> None:
    response = Response(204)
    assert response.headers == []
    assert response.extensions == {}
    assert repr(response.stream) == "<ByteStream [0 bytes]>"


@pytest.mark.parametrize("status", ["200", b"200", None, 200.0])
def test_a_status_of_the_wrong_type(status: Any) -> None:
    with pytest.raises(TypeError, match="status must be an int"):
        Response(status)


@pytest.mark.parametrize(
    "make_content",
    [
        lambda: [b"a", b"", b"b"],
        lambda: AsyncChunks(b"a", b"", b"b"),
        lambda: b"ab",
        lambda: iter([b"ab"]),
    ],
    ids=["list", "asynchronous", "bytes", "iterator"],
)
async def test_reading_is_the_same_twice(make_content: Callable[[], Any]) -> None:
    response = Response(200, content=make_content())
    with assert_checkpoints():
        assert await response.aread() == b"ab"
    with assert_checkpoints():
        assert await response.aread() == b"ab"
    assert response.content == b"ab"


class Collected(CollectableStream):
    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        raise AssertionError("it is collected instead")

    async def collect(self) -> bytes:
        return b"collected"


async def test_a_stream_that_can_be_collected_is() -> None:
    response = Response(200, content=Collected())
    with trio.testing.assert_no_checkpoints():
        assert await response._read_without_checkpoint() == b"collected"
    assert response.content == b"collected"
    with pytest.raises(RuntimeError, match="only once"):
        response.aiter_stream()


async def test_the_stream_is_iterated_only_once() -> None:
    response = Response(200, content=[b"a", b"b"])
    assert await collect(response.aiter_stream()) == [b"a", b"b"]
    with pytest.raises(RuntimeError, match="only once"):
        response.aiter_stream()
    with pytest.raises(RuntimeError, match="only once"):
        await response.aread()
    with pytest.raises(RuntimeError, match="was not read"):
        _ = response.content
    read = Response(200, content=b"a")
    await read.aread()
    with pytest.raises(RuntimeError, match="only once"):
        read.aiter_stream()


@pytest.mark.parametrize("content", [[b"a", b"b", b"c"], AsyncChunks(b"a", b"b", b"c")])
async def test_an_iteration_that_was_left_is_taken_up_again(content: Any) -> None:
    response = Response(200, content=content)
    async for chunk in response.aiter_stream():
        assert chunk == b"a"
        break
    left = response.aiter_stream()
    assert await anext(left) == b"b"
    with pytest.raises(RuntimeError, match="only once"):
        await response.aread()
    assert await collect(response.aiter_stream()) == [b"c"]
    with pytest.raises(RuntimeError, match="only once"):
        response.aiter_stream()


class Whole:
    """Content that is there as a whole, and could be iterated too."""

    def __bytes__(self) -> bytes:
        return b"whole"


class WholeAsynchronous(Whole):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"it is asked for the whole"


class WholeOrdinary(Whole):
    def __iter__(self) -> Iterator[bytes]:
        raise AssertionError("it is asked for the whole")


class WholeEitherWay(WholeAsynchronous, WholeOrdinary):
    pass


@pytest.mark.parametrize(
    "content", [WholeEitherWay(), WholeAsynchronous(), WholeOrdinary(), ByteStream(b"whole")]
)
def test_an_iterable_with_bytes_is_sent_as_bytes_are(content: Any) -> None:
    prepared = prepare("POST", content=content)
    assert prepared.body == b"whole"
    assert can_be_sent_again(prepared, RequestBody(prepared.request.stream))
    assert (b"Content-Length", b"5") in prepared.headers
    with_bytes = Request("POST", "http://a.example", content=content)
    assert repr(with_bytes.stream) == "<ByteStream [5 bytes]>"


def test_bytes_of_what_is_no_iterable_are_no_content() -> None:
    content: Any = URL("http://a.example")
    with pytest.raises(TypeError, match="content must be bytes or an"):
        Request("POST", "http://a.example", content=content)


class Endless:
    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.sleep(1)
        return b"more"


async def test_reading_that_is_cancelled_before_it_began_can_be_done_again(autojump_clock: MockClock) -> None:
    response = Response(200, content=b"body")
    with trio.CancelScope() as scope:
        scope.cancel()
        await response.aread()
    assert await response.aread() == b"body"


async def test_reading_that_was_cancelled_under_way_can_not_be_taken_up_again(
    autojump_clock: MockClock,
) -> None:
    response = Response(200, content=Endless())
    with trio.move_on_after(5):
        await response.aread()
    with pytest.raises(RuntimeError, match="only once"):
        await response.aread()
    with pytest.raises(RuntimeError, match="not read"):
        _ = response.content


async def test_closing_closes_the_stream() -> None:
    content = AsyncChunks(b"a")
    response = Response(200, content=content)
    with assert_checkpoints():
        await response.aclose()
    assert content.closed == 1


async def test_closing_a_stream_that_can_not_be_closed() -> None:
    response = Response(200, content=b"a")
    for _ in range(2):
        with assert_checkpoints():
            await response.aclose()


# -- Proxy.


def test_a_proxy() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    proxy = Proxy("http://proxy:8080/", headers={"X": "y"}, ssl_context=context)
    assert proxy.url == URL("http://proxy:8080/")
    assert proxy.auth is None
    assert proxy.headers == [(b"X", b"y")]
    assert proxy.ssl_context is context
    assert repr(proxy) == "Proxy('http://proxy:8080')"


@pytest.mark.parametrize("url", [URL("https://proxy"), "https://proxy", b"https://proxy"])
def test_a_proxys_url(url: Any) -> None:
    assert Proxy(url).url == URL("https://proxy")


@pytest.mark.parametrize(
    ("userinfo", "auth"),
    [
        ("user:pass", (b"user", b"pass")),
        ("user", (b"user", b"")),
        ("user:", (b"user", b"")),
        (":pass", (b"", b"pass")),
        ("us%40er:p%3Ass%2f", (b"us@er", b"p:ss/")),
        ("u:p:q", (b"u", b"p:q")),
        ("u%zz:%C3%A4", (b"u%zz", b"\xc3\xa4")),
        ("a@b:c", (b"a@b", b"c")),
        ("", (b"", b"")),
    ],
)
def test_a_proxys_auth_from_userinfo(userinfo: str, auth: tuple[bytes, bytes]) -> None:
    proxy = Proxy(f"http://{userinfo}@proxy:8080", headers=[("X", "y")])
    assert proxy.auth == auth
    assert proxy.url == URL("http://proxy:8080")
    credentials = base64.b64encode(b":".join(auth))
    assert proxy.headers == [(b"Proxy-Authorization", b"Basic " + credentials), (b"X", b"y")]


@pytest.mark.parametrize("auth", [("user", "pass"), (b"user", "pass"), ["user", b"pass"]])
def test_a_proxys_auth_as_an_argument(auth: Any) -> None:
    proxy = Proxy("http://other:secret@proxy", auth)
    assert proxy.auth == (b"user", b"pass")
    assert proxy.headers == [(b"Proxy-Authorization", b"Basic " + base64.b64encode(b"user:pass"))]


def test_a_proxys_repr_hides_its_credentials() -> None:
    text = repr(Proxy("http://name:hunter2@proxy:8080", headers={"X-Token": "hunter2"}))
    assert text == "Proxy('http://proxy:8080', auth=(user and password hidden))"


@pytest.mark.parametrize(
    "auth", ["ab", b"ab", ("a",), ("a", "b", "c"), 5, (1, "b"), ("a", None), ("a", "\u00e4")]
)
def test_a_proxys_auth_or_url_of_the_wrong_type(auth: Any) -> None:
    with pytest.raises(TypeError, match=r"auth|user name|password"):
        Proxy("http://proxy", auth)
    wrong: Any
    for wrong in (1, None):
        with pytest.raises(TypeError, match="url"):
            Proxy(wrong)


# -- What goes on the wire.


def prepare(method: str, url: URL | str = "http://example.com/", **more: Any) -> PreparedRequest:
    return PreparedRequest(Request(method, url, **more))


def value_of(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes:
    [value] = [value for key, value in headers if key.lower() == name]
    return value


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://Example.com/", b"example.com"),
        ("http://example.com:80/", b"example.com"),
        ("https://example.com:443/", b"example.com"),
        ("ws://example.com:80/", b"example.com"),
        ("wss://example.com:443/", b"example.com"),
        ("https://example.com:80/", b"example.com:80"),
        ("http://example.com:443/", b"example.com:443"),
        ("http://example.com:8080/", b"example.com:8080"),
        ("http://[::1]/", b"[::1]"),
        ("http://[::1]:8080/", b"[::1]:8080"),
        ("http://[fe80::1%25eth0]/", b"[fe80::1]"),
        ("http://[fe80::1%25eth0]:8080/", b"[fe80::1]:8080"),
        ("http://b\u00fccher.example/", b"xn--bcher-kva.example"),
    ],
)
def test_host_is_added_first(url: str, host: bytes) -> None:
    headers = prepare("GET", url, headers=[("A", "b")]).headers
    assert headers == [(b"Host", host), (b"A", b"b")]


@pytest.mark.parametrize("name", [b"Host", b"host", b"HOST"])
def test_a_host_that_is_given_stays_where_it_is(name: bytes) -> None:
    given = [(b"A", b"b"), (name, b"other")]
    assert prepare("GET", headers=given).headers == given


@pytest.mark.parametrize(
    ("method", "target", "host"),
    [
        ("OPTIONS", "*", b"proxy:8080"),
        ("GET", "/other", b"proxy:8080"),
        ("GET", "http://example.com/x", b"example.com"),
        ("GET", "http://user:pw@example.com:81/x", b"example.com:81"),
        ("GET", "http://[::1]:81/", b"[::1]:81"),
        ("GET", "http:x", b"proxy:8080"),
        ("GET", "http:///x", b"proxy:8080"),
        ("GET", "opaque", b"proxy:8080"),
        ("CONNECT", "example.com:443", b"example.com:443"),
        ("CONNECT", "[::1]:443", b"[::1]:443"),
        ("CONNECT", "http://example.com", b"example.com"),
        ("CONNECT", "http://example.com/", b"example.com"),
    ],
)
def test_the_host_header_goes_with_the_target(method: str, target: str, host: bytes) -> None:
    prepared = prepare(method, "http://proxy:8080/", extensions={"target": target})
    assert prepared.target == target.encode()
    assert value_of(prepared.headers, b"host") == host


def test_the_request_is_left_as_the_caller_made_it() -> None:
    request = Request("POST", "http://h", headers={"A": "b"}, content=b"x")
    prepared = PreparedRequest(request)
    assert request.headers == [(b"A", b"b")]
    assert prepared.request is request
    assert prepared.headers == [(b"Host", b"h"), (b"A", b"b"), (b"Content-Length", b"1")]


FRAMING = (b"content-length", b"transfer-encoding")


def can_be_sent_again(prepared: PreparedRequest, body: RequestBody) -> bool:
    key = ConnectionKey(b"http", b"h", 80, None)
    return RequestContext(prepared, body, key, Timeouts(), None).can_be_sent_again


def framing(prepared: PreparedRequest) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in prepared.headers if name.lower() in FRAMING]


@pytest.mark.parametrize(
    ("methods", "contents", "expected"),
    [
        (["GET", "HEAD", "OPTIONS", "TRACE", "DELETE", "CONNECT", "PROPFIND"], [None], []),
        (["POST", "PUT", "PATCH"], [None], [(b"Content-Length", b"0")]),
        (["GET", "POST"], [b"12345"], [(b"Content-Length", b"5")]),
        (["POST"], [iter([b"a"]), [b"a"], AsyncChunks(b"a")], [(b"Transfer-Encoding", b"chunked")]),
    ],
    ids=["no content", "no content where there usually is some", "content as a whole", "of unknown length"],
)
def test_framing(methods: list[str], contents: list[Any], expected: list[tuple[bytes, bytes]]) -> None:
    for method, content in itertools.product(methods, contents):
        assert framing(prepare(method, content=content)) == expected


@pytest.mark.parametrize("content", [b"12345", [b"12345"]])
@pytest.mark.parametrize(
    "header", [(b"content-length", b"5"), (b"Content-Length", b"005"), (b"TRANSFER-encoding", b"Chunked")]
)
def test_framing_that_is_given_stays(content: Any, header: tuple[bytes, bytes]) -> None:
    assert framing(prepare("POST", headers=[header], content=content)) == [header]


def _with_field(field: str, text: str) -> dict[str, Any]:
    match field:
        case "method":
            return {"method": text}
        case "target":
            return {"url": f"http://h/{text}"}
        case "target extension":
            return {"extensions": {"target": f"/{text}"}}
        case "name":
            return {"headers": {text: "v"}}
    return {"headers": {"X-Name": text}}


FIELDS = {
    "method": "the method must be",
    "target": "the target must be",
    "target extension": "the target must be",
    "name": "a header's name must be",
    "value": "the value of the header b'X-Name'",
}
BAD = [" ", "\t", "\n", "\r", "\0", "\x7f", "\r\nInjected: yes", "\x1b"]
UNSENDABLE = [
    (field, text)
    for field in FIELDS
    for bad in BAD
    for text in (f"{bad}ab", f"a{bad}b", f"ab{bad}")
    if (field, text) not in (("value", "a b"), ("value", "a\tb"))
]


@pytest.mark.parametrize(("field", "text"), UNSENDABLE)
def test_what_can_not_be_sent_is_named(field: str, text: str) -> None:
    arguments: dict[str, Any] = {"method": "GET", "url": "http://h/", **_with_field(field, text)}
    with pytest.raises(LocalProtocolError, match=FIELDS[field]):
        PreparedRequest(Request(**arguments))


NO_LENGTHS = ["", "-1", "+1", "1.0", "0x1", "1 1", "1,1", "1, 1", "five", "9" * 21, "9" * 5000]
CODINGS = ["gzip", "gzip, chunked", "chunked, chunked", "identity", ""]
TWICE = {"Host": "h", "Content-Length": "1", "Transfer-Encoding": "chunked"}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        *(("the method must be a token", {"method": method}) for method in ("", "G(T", "G:T", b"G\xff")),
        *(
            ("a header's name must be a token", {"headers": [(name, "v")]})
            for name in ("", "a:b", "a(b", "a,b", '"a"', b"\xe4", b"a\xff")
        ),
        *(
            ("the target must be", {"extensions": {"target": target}})
            for target in (b"", b"/\xff", b"/a#b", b"#")
        ),
        *(
            ("Content-Length must be a number", {"headers": {"Content-Length": value}, "content": content})
            for value in NO_LENGTHS
            for content in (b"x", iter([b"x"]))
        ),
        *(
            (
                f"Content-Length is {length}, but .* {len(content)} bytes",
                {"headers": {"Content-Length": str(length)}, "content": content},
            )
            for content, length in ((b"", 1), (b"12345", 4), (b"12345", 6), (b"1", 10**19))
        ),
        *(
            (
                f"only one header b'{name.upper()}'",
                {"headers": [(name, value), (name.upper(), value)], "content": iter([b"x"])},
            )
            for name, value in TWICE.items()
        ),
        *(
            (
                "Transfer-Encoding can only be chunked",
                {"headers": {"Transfer-Encoding": coding}, "content": b"x"},
            )
            for coding in CODINGS
        ),
        (
            "both Content-Length and Transfer-Encoding",
            {"headers": {"Content-Length": "1", "Transfer-Encoding": "chunked"}, "content": b"x"},
        ),
    ],
)
def test_a_request_that_can_not_be_sent(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError, match=message):
        prepare(**{"method": "POST", **arguments})


@pytest.mark.parametrize("value", [b"", b"a", b"a b", b"a \t b", b"\xe4\xff\x80", b'"(),/:;<=>?@[\\]{}'])
def test_header_values_that_can_be_sent(value: bytes) -> None:
    assert prepare("GET", headers=[(b"X", value)]).headers[-1] == (b"X", value)


def test_a_secret_value_is_not_in_the_error() -> None:
    with pytest.raises(LocalProtocolError) as info:
        prepare("GET", headers={"Authorization": "hunter2\n"})
    assert "hunter2" not in str(info.value)
    with pytest.raises(TypeError) as type_info:
        prepare("GET", headers={"Authorization": "hunter2\u00e4"})
    assert "hunter2" not in str(type_info.value)


@pytest.mark.parametrize(
    ("value", "content", "expects"),
    [
        ("100-continue", b"x", True),
        ("100-Continue", [b"x"], True),
        ("100-continue", b"", False),
        ("100-continue", None, False),
        ("something", b"x", False),
    ],
)
def test_who_waits_for_100_continue(value: str, content: Any, expects: bool) -> None:
    assert prepare("POST", headers={"Expect": value}, content=content).expects_continue is expects


@pytest.mark.parametrize(
    ("method", "idempotent"),
    [
        *((method, True) for method in ("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")),
        *((method, False) for method in ("POST", "PATCH", "CONNECT", "get", "PROPFIND")),
    ],
)
def test_idempotent_methods(method: str, idempotent: bool) -> None:
    assert prepare(method).idempotent is idempotent


# -- Looking into a stream before the head is sent.


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "DELETE", "CONNECT"])
@pytest.mark.parametrize("chunks", [[], [b""], [b"", b""]])
async def test_an_empty_stream_is_no_content(method: str, chunks: list[bytes]) -> None:
    prepared = prepare(method, headers={"Expect": "100-continue"}, content=AsyncChunks(*chunks))
    body = RequestBody(prepared.request.stream)
    given, prepared = prepared, await body.peek(prepared)
    assert given.body is None
    assert (b"Transfer-Encoding", b"chunked") in given.headers
    assert prepared.body == b""
    assert framing(prepared) == []
    assert not prepared.expects_continue
    assert can_be_sent_again(prepared, body)


async def test_a_stream_with_content_is_not_lost_by_looking() -> None:
    prepared = prepare("GET", content=AsyncChunks(b"", b"a", b"b"))
    content = RequestBody(prepared.request.stream)
    assert await content.peek(prepared) is prepared
    assert prepared.body is None
    assert framing(prepared) == [(b"Transfer-Encoding", b"chunked")]
    assert content.can_be_sent_again
    body = content.iterate()
    assert aiter(body) is body
    for expected in (b"a", b"b"):
        with assert_checkpoints():
            assert await anext(body) == expected
    with pytest.raises(StopAsyncIteration):
        await anext(body)
    assert not content.can_be_sent_again


@pytest.mark.parametrize(
    ("method", "headers", "content"),
    [
        ("POST", {}, [b""]),
        ("GET", {"Content-Length": "0"}, [b""]),
        ("GET", {}, b"x"),
    ],
)
async def test_nobody_looks_where_it_does_not_matter(
    method: str, headers: dict[str, str], content: Any
) -> None:
    prepared = prepare(method, headers=headers, content=content)
    before = (prepared.body, list(prepared.headers))
    with trio.testing.assert_no_checkpoints():
        assert await RequestBody(prepared.request.stream).peek(prepared) is prepared
    assert (prepared.body, prepared.headers) == before


async def test_an_error_while_looking_is_the_users_own() -> None:
    class Failing:
        def __iter__(self) -> Iterator[bytes]:
            raise LookupError("user")

    prepared = prepare("GET", content=Failing())
    with pytest.raises(LookupError, match="user"):
        await RequestBody(prepared.request.stream).peek(prepared)


# -- Sending content once more.


@pytest.mark.parametrize("content", [None, b"", b"x", [b"x"], (b"x",), {b"x"}])
async def test_content_that_can_be_sent_again(content: Any) -> None:
    prepared = prepare("POST", content=content)
    body = RequestBody(prepared.request.stream)
    first = await collect(body.iterate())
    assert can_be_sent_again(prepared, body)
    assert await collect(body.iterate()) == first


@pytest.mark.parametrize(
    "make", [lambda: iter([b"x"]), lambda: AsyncChunks(b"x"), lambda: (b"x" for _ in "x")]
)
async def test_content_that_can_be_sent_only_once(make: Callable[[], Any]) -> None:
    prepared = prepare("POST", content=make())
    body = RequestBody(prepared.request.stream)
    assert can_be_sent_again(prepared, body)
    body.iterate()
    assert not can_be_sent_again(prepared, body)


def test_a_byte_stream_of_another_request_is_content_too() -> None:
    stream = Request("POST", "http://h", content=b"abc").stream
    assert isinstance(stream, ByteStream)
    assert prepare("POST", content=stream).body == b"abc"


# -- Through a pool.


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (LocalProtocolError, {"method": "GET\r\n"}),
        (LocalProtocolError, {"method": ""}),
        (LocalProtocolError, {"url": "http://example.com/a b"}),
        (LocalProtocolError, {"url": "http://example.com/\r\nX: y"}),
        (LocalProtocolError, {"url": b"http://example.com/\xff"}),
        (LocalProtocolError, {"url": "http://exam\nple.com/"}),
        (LocalProtocolError, {"extensions": {"target": "/ HTTP/1.1\r\n\r\n"}}),
        (LocalProtocolError, {"extensions": {"target": b""}}),
        (LocalProtocolError, {"headers": {"A\r\nB": "c"}}),
        (LocalProtocolError, {"headers": {"A ": "c"}}),
        (LocalProtocolError, {"headers": {"A": "b\r\nC: d"}}),
        (LocalProtocolError, {"headers": {"A": "b\0"}}),
        (LocalProtocolError, {"headers": [("Host", "a"), ("Host", "b")]}),
        (LocalProtocolError, {"headers": {"Content-Length": "5"}, "content": b"x"}),
        (LocalProtocolError, {"headers": {"Transfer-Encoding": "gzip"}, "content": b"x"}),
        (TypeError, {"method": "G\u00cbT"}),
        (TypeError, {"headers": {"A": "\u00e4"}}),
        (TypeError, {"content": "text"}),
        (ValueError, {"url": "http://user@example.com/"}),
        (ValueError, {"url": "http://example.com:0/"}),
        (ValueError, {"url": "http:///path"}),
        (ValueError, {"url": "http:path"}),
    ],
)
async def test_a_request_that_can_not_be_sent_dials_nobody(
    network: Network, error: type[Exception], arguments: dict[str, Any]
) -> None:
    async with network.pool() as pool:
        with pytest.raises(error):
            await pool.request(**{"method": "GET", "url": "http://example.com/", **arguments})
    assert network.dialled == []


@pytest.mark.parametrize(
    ("method", "target", "host"),
    [
        ("GET", None, b"example.com:81"),
        ("OPTIONS", "*", b"example.com:81"),
        ("GET", "http://[::1]:9/x?y", b"[::1]:9"),
        ("GET", "/raw?x", b"example.com:81"),
        ("CONNECT", "origin:443", b"origin:443"),
    ],
)
async def test_what_a_server_sees(network: Network, method: str, target: str | None, host: bytes) -> None:
    seen = Recorder()
    extensions = {} if target is None else {"target": target}
    async with network.pool(seen) as pool:
        await pool.request(method, "http://Example.com:81/p?q#fragment", extensions=extensions)
    [request] = seen.requests
    assert request.method == method.encode()
    assert request.target == (b"/p?q" if target is None else target.encode())
    assert request.header(b"host") == host
    assert [dialled.address for dialled in network.dialled] == [("example.com", 81)]


async def test_a_zone_is_dialled_and_not_sent(network: Network) -> None:
    seen = Recorder()
    async with network.pool(seen) as pool:
        await pool.request("GET", "http://[fe80::1%25eth0]:81/")
    assert network.dialled[0].address == ("fe80::1%eth0", 81)
    assert seen.requests[0].header(b"host") == b"[fe80::1]:81"


async def test_header_case_and_order_on_the_wire(network: Network) -> None:
    heads = []

    async def serve(peer: ScriptedPeer) -> None:
        heads.append(await peer.receive_some())
        await peer.send_response()

    headers: Any = [("x-LOW", "1"), (b"B", b"\xe4"), ("X-low", "2")]
    async with network.pool(serve) as pool:
        await pool.request("PUT", "http://h/", headers=headers, content=b"body")
    assert heads == [
        b"PUT / HTTP/1.1\r\nHost: h\r\nx-LOW: 1\r\nB: \xe4\r\nX-low: 2\r\nContent-Length: 4\r\n\r\nbody"
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"one two",
        lambda: [b"one ", b"two"],
        lambda: iter([b"one ", b"", b"two"]),
        lambda: AsyncChunks(b"one ", b"two"),
        lambda: memoryview(b"one two"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_content_arrives(network: Network, method: str, make: Callable[[], Any]) -> None:
    async with network.pool() as pool:
        response = await pool.request(method, "http://h/", content=make())
    assert response.content == b"one two"


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (Proxy("http://u:p@h"), Proxy("http://h:80", ("u", "p")), True),
        (Proxy("http://h", headers={"a": "b"}), Proxy("http://h", headers=[("a", "b")]), True),
        (Proxy("http://h"), Proxy("https://h"), False),
        (Proxy("http://h"), Proxy("http://u@h"), False),
        (Proxy("http://h"), Proxy("http://h", headers={"a": "b"}), False),
        (Proxy("https://h"), Proxy("https://h", http2=True), False),
        (Proxy("https://h"), Proxy("https://h", ssl_context=ssl.create_default_context()), False),
        (Proxy("http://h"), "http://h", False),
    ],
)
def test_which_proxies_are_equal(one: Proxy, other: object, equal: bool) -> None:
    assert (one == other) is equal
    assert (len({one, other}) == 1) is equal


@pytest.mark.parametrize("auth", [None, ("user", "password")])
def test_only_http_proxies_are_sent_headers_with_credentials(auth: Any) -> None:
    assert Proxy("socks5://proxy", auth).headers == []
    assert len(Proxy("http://proxy", auth).headers) == (auth is not None)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:se/cret@proxy",
        "http://user:80/cret@proxy",
        "http://user:se?cret@proxy",
        "http://user:se#cret@proxy",
        b"http://user:80#cret@proxy",
        "http://user:se cret@proxy:99999",
        "http://proxy#fragment",
        "http://proxy/path",
        URL("http://proxy/path"),
    ],
)
def test_a_proxys_url_is_not_guessed_at(url: Any) -> None:
    with pytest.raises(ValueError, match="percent-encoded") as info:
        Proxy(url)
    assert "cret" not in str(info.value)


@pytest.mark.parametrize(
    ("url", "hint"),
    [("localhost:8080", "http://localhost:8080"), ("127.0.0.1:8080/", "http://127.0.0.1:8080/")],
)
def test_a_proxys_url_without_scheme(url: str, hint: str) -> None:
    with pytest.raises(InvalidURL, match=f"a proxy's scheme must be .*; did you mean '{hint}'\\?"):
        Proxy(url)


def test_an_error_about_a_proxys_url_without_credentials_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="port must be between 1 and 65535, not 99999"):
        Proxy("http://proxy:99999")
