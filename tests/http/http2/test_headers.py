"""Header blocks of HTTP/2."""

from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from hpack import NeverIndexedHeaderTuple
from hypothesis import assume, given
from hypothesis import strategies as st

from trio_exchange import LocalProtocolError, RemoteProtocolError, Request
from trio_exchange._http.http2.headers import check_fields, content_length, request_headers, response_head
from trio_exchange._http.request import PreparedRequest

Headers = list[tuple[bytes, bytes]]


def block_of(method: str = "GET", url: str = "https://example.com/a?b", **options: Any) -> Headers:
    return request_headers(PreparedRequest(Request(method, url, **options)))


def as_server(block: Headers) -> Headers:
    """What h2 makes of a request as a server, with all of its checks."""
    client = h2.connection.H2Connection(
        h2.config.H2Configuration(
            client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False
        )
    )
    server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    client.initiate_connection()
    client.send_headers(1, block)
    (event,) = [
        event
        for event in server.receive_data(client.data_to_send())
        if isinstance(event, h2.events.RequestReceived)
    ]
    return [(bytes(name), bytes(value)) for name, value in event.headers or []]


def test_a_simple_request() -> None:
    assert block_of() == [
        (b":method", b"GET"),
        (b":authority", b"example.com"),
        (b":scheme", b"https"),
        (b":path", b"/a?b"),
    ]


def test_host_is_the_authority_and_what_is_of_the_connection_is_not_sent() -> None:
    headers = {
        "Host": "other.example",
        "Connection": "keep-alive",
        "Keep-Alive": "5",
        "Proxy-Connection": "keep-alive",
        "Upgrade": "h2c",
        "TE": "gzip",
        "X-Upper": "Kept As It Is",
    }
    assert block_of(headers=headers) == [
        (b":method", b"GET"),
        (b":authority", b"other.example"),
        (b":scheme", b"https"),
        (b":path", b"/a?b"),
        (b"x-upper", b"Kept As It Is"),
    ]


@pytest.mark.parametrize("value", ["trailers", "Trailers", "gzip, trailers;q=0.5"])
def test_te_is_sent_as_trailers_only(value: str) -> None:
    assert block_of(headers={"TE": value})[4:] == [(b"te", b"trailers")]


def test_a_streamed_body_has_no_transfer_encoding() -> None:
    block = block_of("POST", content=(piece for piece in [b"x"]))
    assert not {b"transfer-encoding", b"content-length"} & {name for name, _ in block}
    assert (b"content-length", b"1") in block_of("POST", content=b"x")


@pytest.mark.parametrize("name", ["Authorization", "Proxy-Authorization", "Cookie"])
def test_secrets_are_never_indexed(name: str) -> None:
    field = block_of(headers={name: "secret", "x": "y"})[4]
    assert isinstance(field, NeverIndexedHeaderTuple)
    assert not isinstance(block_of(headers={"x": "y"})[4], NeverIndexedHeaderTuple)
    assert tuple(field) == (name.lower().encode(), b"secret")


def test_connect() -> None:
    assert block_of("CONNECT", extensions={"target": b"example.org:443"})[0] == (b":method", b"CONNECT")
    assert {name for name, _ in block_of("CONNECT", extensions={"target": b"example.org:443"})} == {
        b":method",
        b":authority",
    }
    assert block_of("CONNECT", "wss://example.com/chat", extensions={"protocol": b"websocket"})[:5] == [
        (b":method", b"CONNECT"),
        (b":authority", b"example.com"),
        (b":protocol", b"websocket"),
        (b":scheme", b"https"),
        (b":path", b"/chat"),
    ]
    with pytest.raises(LocalProtocolError, match="content"):
        block_of("CONNECT", content=b"x", extensions={"target": b"example.org:443"})


@pytest.mark.parametrize(
    ("method", "target", "path"),
    [
        ("GET", b"http://origin.example:81/a?b", b"/a?b"),
        ("GET", b"http://origin.example:81", b"/"),
        ("GET", b"http://origin.example:81?b", b"/?b"),
        ("OPTIONS", b"http://origin.example:81", b"*"),
        ("OPTIONS", b"http://origin.example:81/", b"/"),
        ("OPTIONS", b"http://user@origin.example:81?b", b"/?b"),
    ],
)
def test_a_target_in_absolute_form_is_what_a_proxy_is_asked_for(
    method: str, target: bytes, path: bytes
) -> None:
    assert block_of(method, "https://proxy.example", extensions={"target": target})[:4] == [
        (b":method", method.encode()),
        (b":authority", b"origin.example:81"),
        (b":scheme", b"http"),
        (b":path", path),
    ]


@pytest.mark.parametrize("target", [b"example.com:80", b"a", b"http:", b"http:///a"])
def test_a_target_that_http2_has_no_place_for(target: bytes) -> None:
    with pytest.raises(LocalProtocolError, match="must be a path"):
        block_of(extensions={"target": target})


def test_the_asterisk_is_a_target() -> None:
    assert block_of("OPTIONS", extensions={"target": b"*"})[3] == (b":path", b"*")


NAMES = st.one_of(
    st.text(st.sampled_from("abcXYZ019-_.!#$%&'*+^`|~"), min_size=1, max_size=12),
    st.sampled_from(["TE", "Connection", "Host", "Cookie", "Upgrade", "Content-Type", "Proxy-Connection"]),
)
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=20).map(str.strip)


@given(
    st.sampled_from(["GET", "POST", "OPTIONS", "DELETE", "X-OWN"]),
    st.lists(st.tuples(NAMES, VALUES), max_size=6),
    st.sampled_from([None, b"", b"body"]),
)
def test_what_is_sent_is_what_a_server_accepts(
    method: str, headers: list[tuple[str, str]], content: bytes | None
) -> None:
    # Empty ones h2 joins to a value that it then refuses.
    assume(all(value for name, value in headers if name == "Cookie"))
    try:
        block = block_of(method, headers=headers, content=content)
    except (LocalProtocolError, ValueError, TypeError):
        # Two Hosts, or none of a kind that a request may have.
        return
    received = as_server(block)
    assert set(received[:4]) == set(block[:4])
    # h2 puts the cookies together again.
    cookies = b"; ".join(value for name, value in block if name == b"cookie")
    assert [value for name, value in received if name == b"cookie"] in ([], [cookies])
    others = [(bytes(name), bytes(value)) for name, value in block if name != b"cookie"]
    assert [field for field in received if field[0] != b"cookie"] == others


# -- Responses.


def test_a_response_head() -> None:
    head = response_head([(b":status", b"204"), (b"a", b"b"), (b"a", b"")])
    assert (head.version, head.status, head.reason) == (b"HTTP/2", 204, b"")
    assert head.headers == [(b"a", b"b"), (b"a", b"")]


@pytest.mark.parametrize(
    "block",
    [
        [],
        [(b"a", b"b")],
        [(b"a", b"b"), (b":status", b"200")],
        [(b":path", b"/"), (b":status", b"200")],
        [(b":status", b"200"), (b":status", b"200")],
        [(b":status", b"200"), (b":path", b"/")],
        *([(b":status", status)] for status in [b"", b"20", b"2000", b"099", b"2x0", b"+20", b" 200", b"200 ",
                                               b"101", "\uff12\uff10\uff10".encode(), b"200\n"]),
    ],
)  # fmt: skip
def test_a_head_without_a_valid_status(block: Headers) -> None:
    with pytest.raises(RemoteProtocolError):
        response_head(block)


BAD_FIELDS = [
    (b"", b"x"),
    (b"Upper", b"x"),
    (b"with space", b"x"),
    (b"with:colon", b"x"),
    (b":unknown", b"x"),
    (b"line\n", b"x"),
    (b"\xe4", b"x"),
    (b"nul\0", b"x"),
    (b"a", b"x\r"),
    (b"a", b"x\ny: z"),
    (b"a", b"x\0y"),
    (b"a", b" x"),
    (b"a", b"x "),
    (b"a", b"\tx"),
    (b"a", b"x\t"),
    (b"a", b" "),
    (b"a", b"x\n"),
    (b"connection", b"close"),
    (b"keep-alive", b"5"),
    (b"proxy-connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"h2c"),
]


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_bad_fields_are_refused_in_heads_and_trailers(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        check_fields([(b"good", b"field"), field])
    with pytest.raises(RemoteProtocolError):
        response_head([(b":status", b"200"), field])


@pytest.mark.parametrize("value", [b"", b"a b", b"a\tb", b"\xff\x80", b'"x"', b"\x7f"])
def test_values_that_are_unusual_but_fine(value: bytes) -> None:
    check_fields([(b"a", value)])


@given(
    st.lists(st.tuples(st.binary(max_size=8) | st.sampled_from([b":status", b"a"]), st.binary(max_size=8)))
)
def test_nothing_but_a_remote_protocol_error_is_raised(block: Headers) -> None:
    try:
        head = response_head(block)
    except RemoteProtocolError:
        return
    assert block[0] == (b":status", b"%d" % head.status)
    for name, value in head.headers:
        assert name == name.lower()
        assert not {*b"\r\n\0 :"} & {*name}
        assert not {*b"\r\n\0"} & {*value}
        assert value == value.strip(b" \t")


@pytest.mark.parametrize(
    ("values", "length"),
    [([], None), ([b"0"], 0), ([b"12"], 12), ([b"12", b"12"], 12), ([b"007"], 7)],
)
def test_a_content_length(values: list[bytes], length: int | None) -> None:
    assert content_length([(b"a", b"1"), *((b"content-length", value) for value in values)]) == length


@pytest.mark.parametrize(
    "values",
    [[b""], [b"x"], [b"-1"], [b"+1"], [b"1 "], [b"1_0"], [b"1, 1"], [b"1", b"2"], ["\uff11".encode()]],
)
def test_no_content_length(values: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError, match="content-length"):
        content_length([(b"content-length", value) for value in values])


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=3))
def test_a_content_length_is_a_number_or_an_error(values: list[bytes]) -> None:
    try:
        length = content_length([(b"content-length", value) for value in values])
    except RemoteProtocolError:
        return
    assert {int(value) for value in values} == {length}


def test_an_endless_content_length() -> None:
    with pytest.raises(RemoteProtocolError, match="content-length"):
        content_length([(b"content-length", b"9" * 5000)])
