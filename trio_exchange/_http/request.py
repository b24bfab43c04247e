"""The request as connections receive it: checked and completed, with its body, key, timeouts and tracer."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import AsyncIterable, AsyncIterator, Collection
from typing import Any, Final, NamedTuple

import trio

from .._connect.factory import ConnectionKey
from .._content import ByteStream, IterableStream, check_chunk
from .._exceptions import InvalidURL, LocalProtocolError
from .._fields import TOKEN, HeaderList, check_field, check_single_field, to_bytes
from .._models import Request, check_extension_names
from .._timeouts import Timeouts
from .._trace import Tracer
from .._urls import TARGET, authority_of, split_absolute, unless_secret

# RFC 9110, 9.2.2.
IDEMPOTENT_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))

# Methods whose requests usually have no content (RFC 9110, 9.3). For these, `RequestBody.peek` checks a
# stream of unknown length for content before the head is sent.
_USUALLY_WITHOUT_CONTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"DELETE", b"CONNECT"))
# The number of digits that the parser of responses accepts.
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,20}")


class PreparedRequest:
    """A request that has been checked and completed, ready for any connection. It is immutable.

    Attributes:
        request: The request as the caller made it.
        method: The method.
        target: The request target.
        headers: The headers as they go on the wire, Host and framing included.
        body: The complete body if it is in memory, None for a stream.
        idempotent: Whether the method is idempotent (RFC 9110, 9.2.2).
        expects_continue: Whether the body waits for `100 (Continue)` (RFC 9110, 10.1.1).
        protocol: The protocol of an extended CONNECT (RFC 8441), else None.
    """

    __slots__ = (
        "body",
        "expects_continue",
        "headers",
        "idempotent",
        "method",
        "protocol",
        "request",
        "target",
    )

    def __init__(self, request: Request, checker: HeaderChecker | None = None) -> None:
        protocol = None
        if request.extensions:
            protocol = _check_extensions(request)
        stream = request.stream
        body = stream.data if isinstance(stream, ByteStream) else None
        _check_request_line(request)
        framing = (checker or HeaderChecker()).check(request.headers)
        self.request: Final[Request] = request
        self.protocol: Final[bytes | None] = protocol
        self.method: Final[bytes] = request.method
        self.target: Final[bytes] = request.url.target
        self.idempotent: Final[bool] = request.method in IDEMPOTENT_METHODS
        self.body: Final[bytes | None] = body
        self.headers: Final[HeaderList] = _complete_headers(request, body, framing)
        self.expects_continue: Final[bool] = framing.expects_continue and body != b""

    def replace(self, **changes: Any) -> PreparedRequest:
        """Return a copy with other values for some attributes."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def without_content(self) -> PreparedRequest:
        """Return a copy without content, for a stream that turned out to be empty."""
        headers = [pair for pair in self.headers if pair[0].lower() != b"transfer-encoding"]
        return self.replace(body=b"", expects_continue=False, headers=headers)


class Framing(NamedTuple):
    """What the headers that the caller gave say about the message.

    Attributes:
        has_host: Whether there is a Host header.
        length: The value of Content-Length, or None.
        chunked: Whether there is a Transfer-Encoding.
        expects_continue: Whether there is an `Expect: 100-continue`.
    """

    has_host: bool
    length: bytes | None
    chunked: bool
    expects_continue: bool


class HeaderChecker:
    """Checks the headers of requests. It remembers the last ones, since consecutive requests often agree."""

    __slots__ = ("_framing", "_headers")

    def __init__(self) -> None:
        self._headers: HeaderList | None = None
        self._framing = Framing(has_host=False, length=None, chunked=False, expects_continue=False)

    def check(self, headers: HeaderList) -> Framing:
        """Check each field, and the fields that frame the message against each other.

        Raises:
            LocalProtocolError: A field can't be sent. The message names it.
        """
        if headers != self._headers:
            self._framing = _framing_of(headers)
            # A copy, since the caller may change the list.
            self._headers = headers[:]
        return self._framing


class RequestBody:
    """The content of one request, and the state of its iteration.

    Args:
        stream: The request's `stream`.
    """

    __slots__ = ("_iterator", "_peeked", "_stream")

    def __init__(self, stream: AsyncIterable[bytes]) -> None:
        self._stream = stream
        self._iterator: AsyncIterator[bytes] | None = None
        self._peeked: bytes | None = None

    @property
    def can_be_sent_again(self) -> bool:
        """Whether `iterate` would yield the whole content, for the first time or again."""
        if self._iterator is None or self._peeked is not None:
            return True
        stream = self._stream
        return isinstance(stream, IterableStream) and isinstance(stream.iterable, Collection)

    def iterate(self) -> AsyncIterator[bytes]:
        """Return an iterator over the content, from its beginning."""
        if self._peeked is None or self._iterator is None:
            self._iterator = aiter(self._stream)
            return self._iterator
        peeked, self._peeked = self._peeked, None
        return _Peeked(peeked, self._iterator)

    @trio.lowlevel.disable_ki_protection
    async def close(self) -> None:
        """Close the caller's generator at its current position. Garbage collection could be too late."""
        iterator: Any = self._iterator
        if inspect.isasyncgen(iterator):
            await iterator.aclose()

    async def peek(self, prepared: PreparedRequest) -> PreparedRequest:
        """Check whether a stream of unknown length has any content.

        Adapters pass every request's body as a stream, even the empty body of a GET. An empty chunked body
        confuses servers that don't expect one. So for a method that seldom has content, this waits for the
        first non-empty chunk or the end.

        A generator that the caller made for this request is not touched. It has content, and may have cancel
        scopes around its yields, so a single task must run all of it.

        Returns:
            The request as given, or a copy without content.
        """
        if prepared.body is not None or prepared.method not in _USUALLY_WITHOUT_CONTENT:
            return prepared
        if inspect.isasyncgen(self._stream):
            return prepared
        if not any(name.lower() == b"transfer-encoding" for name, _ in prepared.headers):
            return prepared
        self._iterator = aiter(self._stream)
        while (chunk := await next_chunk(self._iterator)) is not END_OF_BODY:
            check_chunk(chunk)
            if memoryview(chunk).nbytes:
                self._peeked = chunk
                return prepared
        return prepared.without_content()


class RequestContext(NamedTuple):
    """The request and its settings, on the way from the pool to a connection.

    Attributes:
        prepared: The request as it is sent.
        body: The request's content and the state of its iteration.
        key: The key of the connections that can carry the request.
        timeouts: The timeouts of its operations.
        tracer: The reporter of its trace events, or None without a handler or a log.
    """

    prepared: PreparedRequest
    body: RequestBody
    key: ConnectionKey
    timeouts: Timeouts
    tracer: Tracer | None

    @property
    def can_be_sent_again(self) -> bool:
        """Whether the content can be sent from its beginning, for the first time or again."""
        return self.prepared.body is not None or self.body.can_be_sent_again


#: The value that `next_chunk` returns when the iterator has ended.
END_OF_BODY: Final = object()


@trio.lowlevel.disable_ki_protection
async def next_chunk(iterator: AsyncIterator[bytes]) -> Any:
    """Return the next chunk of a body from the caller's iterator, or `END_OF_BODY`.

    Ctrl-C may interrupt the iterator, like any other user code.
    """
    return await anext(iterator, END_OF_BODY)


class _Peeked:
    __slots__ = ("_first", "_rest")

    def __init__(self, first: bytes, rest: AsyncIterator[bytes]) -> None:
        self._first: bytes | None = first
        self._rest = rest

    def __aiter__(self) -> _Peeked:
        return self

    async def __anext__(self) -> bytes:
        if self._first is None:
            return await anext(self._rest)
        await trio.lowlevel.checkpoint()
        first, self._first = self._first, None
        return first


def _check_extensions(request: Request) -> bytes | None:
    """Check the extensions that neither the pool nor the model checks, and return the protocol, if any."""
    check_extension_names(request.extensions)
    callback = request.extensions.get("informational")
    if callback is not None and not callable(callback):
        raise TypeError(f"the informational extension must be an async function, not {callback!r}")
    protocol = request.extensions.get("protocol")
    if protocol is None:
        return None
    protocol = to_bytes("the protocol extension", protocol)
    if not TOKEN.fullmatch(protocol):
        raise LocalProtocolError(f"the protocol extension must be a token, not {protocol!r}")
    if request.method != b"CONNECT":
        raise LocalProtocolError(f"the protocol extension needs the method CONNECT, not {request.method!r}")
    return protocol


def _check_request_line(request: Request) -> None:
    """Check the method and the target.

    Raises:
        LocalProtocolError: One of them can't be sent. The message names it.
    """
    if not TOKEN.fullmatch(request.method):
        raise LocalProtocolError(f"the method must be a token, not {request.method!r}")
    if not TARGET.fullmatch(request.url.target):
        shown = unless_secret(f": {request.url.target!r}", bytes(request.url))
        message = (
            "the target must be ASCII, not empty, and without fragment, white space or control characters"
            f"{shown}"
        )
        if request.extensions.get("target") is None:
            raise InvalidURL(f"{message}; percent-encode them in the URL, ' ' as '%20'")
        raise LocalProtocolError(message)


def _framing_of(headers: HeaderList) -> Framing:
    has_host = has_coding = expects_continue = False
    length = None
    for name, value in headers:
        check_field(name, value)
        match name.lower():
            case b"host":
                check_single_field(name, has_host)
                has_host = True
            case b"content-length":
                check_single_field(name, length is not None)
                if not _CONTENT_LENGTH.fullmatch(value):
                    raise LocalProtocolError(
                        f"Content-Length must be a number of at most 20 digits, not {value!r}"
                    )
                length = value
            case b"transfer-encoding":
                check_single_field(name, has_coding)
                has_coding = True
                if value.lower() != b"chunked":
                    raise LocalProtocolError(f"Transfer-Encoding can only be chunked, not {value!r}")
            case b"expect":
                expects_continue = value.lower() == b"100-continue"
    if length is not None and has_coding:
        raise LocalProtocolError("a request can't have both Content-Length and Transfer-Encoding")
    return Framing(has_host, length, has_coding, expects_continue)


def _complete_headers(request: Request, body: bytes | None, framing: Framing) -> HeaderList:
    """Add required headers that the caller omitted.

    Raises:
        LocalProtocolError: Content-Length is not the length of the content.
    """
    given, length = request.headers, framing.length
    headers = given[:] if framing.has_host else [(b"Host", _host_header(request)), *given]
    if length is not None:
        if body is not None and int(length) != len(body):
            raise LocalProtocolError(
                f"Content-Length is {int(length)}, but the content is {len(body)} bytes long"
            )
    elif not framing.chunked:
        if body is None:
            headers.append((b"Transfer-Encoding", b"chunked"))
        elif body or request.method in (b"POST", b"PUT", b"PATCH"):
            # RFC 9110, 8.6: a request with one of these methods declares even empty content.
            headers.append((b"Content-Length", b"%d" % len(body)))
    return headers


def _host_header(request: Request) -> bytes:
    """Return the Host header's value (RFC 9112, 3.2): the target's authority, or else the URL's."""
    url, target = request.url, request.url.target
    if request.method == b"CONNECT" and not target.startswith((b"/", b"*")) and b"/" not in target:
        return target
    absolute = split_absolute(target)
    if absolute is not None:
        return absolute[1]
    return authority_of(url)
