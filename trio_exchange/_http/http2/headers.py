"""HTTP/2 header blocks: made from requests, and checked in responses.

h2 is configured not to normalize or validate headers. A request's headers were checked when the request was
prepared, more strictly than h2 would check them. A response's headers are checked here: a malformed response
affects only its stream (RFC 9113, 8.1.1), but h2 would end the connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hpack import NeverIndexedHeaderTuple

from ..._exceptions import LocalProtocolError, RemoteProtocolError
from ..._fields import HeaderList, Headers
from ..._urls import split_absolute, unless_secret
from ..message_stream import Head
from ..request import PreparedRequest
from .header_compression import DecodedBlock

# RFC 9113, 8.2.2: connection-specific fields. Host is sent as :authority.
_OF_THE_CONNECTION = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_NOT_SENT = _OF_THE_CONNECTION | {b"host", b"te"}
# RFC 7541, 7.1.3: an attacker could guess the values of indexed fields from the compressed size.
_NEVER_INDEXED = frozenset((b"authorization", b"proxy-authorization", b"cookie"))
_SCHEMES = {b"ws": b"http", b"wss": b"https"}
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"(?![ \t])[^\x00\r\n]*(?<![ \t])")
_STATUS = re.compile(rb"[1-9][0-9][0-9]")
_LENGTH = re.compile(rb"[0-9]{1,20}")


def request_headers(prepared: PreparedRequest) -> HeaderList:
    """Make the header block of a request (RFC 9113, 8.3.1; CONNECT: 8.5; extended CONNECT: RFC 8441).

    Raises:
        LocalProtocolError: The request can't be expressed in HTTP/2.
    """
    authority = b""
    fields: HeaderList = []
    for name, value in prepared.headers:
        lower = name.lower()
        if lower in _NEVER_INDEXED:
            fields.append(NeverIndexedHeaderTuple(lower, value))
        elif lower not in _NOT_SENT:
            fields.append((lower, value))
        elif lower == b"host":
            authority = value
        elif lower == b"te" and b"trailers" in value.lower():
            fields.append((b"te", b"trailers"))
    return [*_pseudo_headers(prepared, authority), *fields]


def _pseudo_headers(prepared: PreparedRequest, authority: bytes) -> HeaderList:
    scheme = prepared.request.url.scheme
    method, target = prepared.method, prepared.target
    block = [(b":method", method), (b":authority", authority)]
    if method == b"CONNECT":
        if prepared.body != b"":
            raise LocalProtocolError("a CONNECT request can't have content over HTTP/2")
        if prepared.protocol is None:
            # The target takes precedence over Host, which may name the proxy.
            return block if b"/" in target else [block[0], (b":authority", target)]
        block.append((b":protocol", prepared.protocol))
    absolute = split_absolute(target)
    if absolute is not None:
        # A request to a proxy (RFC 9113, 8.3.1). RFC 9110, 7.1 covers an absolute form without a path.
        scheme, block[1], target = absolute[0].lower(), (b":authority", absolute[1]), absolute[2]
        if target.startswith(b"?") or not target:
            target = b"*" if method == b"OPTIONS" and not target else b"/" + target
    if not target.startswith(b"/") and target != b"*":
        shown = unless_secret(f", not {target!r}", target)
        raise LocalProtocolError(
            f"the target of a request over HTTP/2 must be a path, '*' or an absolute URL{shown}"
        )
    return [*block, (b":scheme", _SCHEMES.get(scheme, scheme)), (b":path", target)]


def head_of(block: DecodedBlock) -> Head:
    """Return the head of a response. A block that repeats is checked once.

    Raises:
        RemoteProtocolError: The head is malformed (RFC 9113, 8.1.1).
    """
    checked: Head | None = block.checked
    if checked is None:
        checked = block.checked = response_head(block.fields)
    # The headers belong to the user, who may change them.
    return Head(b"HTTP/2", checked.status, b"", Headers(checked.headers))


def response_head(block: Sequence[tuple[bytes, bytes]]) -> Head:
    """Return the head of a response.

    Raises:
        RemoteProtocolError: The head is malformed (RFC 9113, 8.1.1).
    """
    name, status = block[0] if block else (b"", b"")
    if name != b":status" or not _STATUS.fullmatch(status):
        raise RemoteProtocolError(f"the response has no valid status first, but {name!r}: {status!r}")
    if status == b"101":
        raise RemoteProtocolError("the server answered 101, which HTTP/2 does not have")
    headers = Headers(block[1:])
    check_fields(headers)
    return Head(b"HTTP/2", int(status), b"", headers)


def check_trailers(block: Sequence[tuple[bytes, bytes]], *, ends: bool) -> None:
    """Check a header block after the final head, which can only be trailers (RFC 9113, 8.1).

    Args:
        block: The header block.
        ends: Whether the block ends the stream.

    Raises:
        RemoteProtocolError: The block is not a trailer section, or it is malformed.
    """
    if not ends:
        name, status = block[0] if block else (b"", b"")
        if name != b":status":
            raise RemoteProtocolError("the server sent trailers that do not end the stream")
        kind = "an informational response" if status.startswith(b"1") else "a second head"
        raise RemoteProtocolError(f"the server sent {kind} after the response's head: {status!r}")
    check_fields(block)


def check_fields(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Check header or trailer fields (RFC 9113, 8.2).

    Raises:
        RemoteProtocolError: A field is malformed.
    """
    for name, value in headers:
        if not _NAME.fullmatch(name):
            raise RemoteProtocolError(f"the response has an invalid header name: {name!r}")
        if not _VALUE.fullmatch(value):
            raise RemoteProtocolError(f"the response has an invalid value of the header {name!r}: {value!r}")
        if name in _OF_THE_CONNECTION:
            raise RemoteProtocolError(f"the response has a header that HTTP/2 does not have: {name!r}")


def content_length(headers: HeaderList) -> int | None:
    """Return the declared length of the body in bytes, or None without a content-length.

    Raises:
        RemoteProtocolError: The content-length fields differ, or the value is not a number.
    """
    lengths = {value for name, value in headers if name == b"content-length"}
    if not lengths:
        return None
    length = lengths.pop()
    if lengths or not _LENGTH.fullmatch(length):
        raise RemoteProtocolError(f"the response has no valid content-length, but {length!r}")
    return int(length)
