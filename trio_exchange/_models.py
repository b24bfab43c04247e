"""The public models `Request`, `Response` and `Proxy`, and the checks of their arguments.

Text arguments must be ASCII, except for the host name in a URL, which is encoded by IDNA. The models keep
bytes.

A `Request` keeps the caller's arguments unchanged. `_http/request.py` adds the fields that HTTP requires
(Host, Content-Length, Transfer-Encoding) and checks what may be sent. It does so once for a request, before a
connection is looked for, so that no part of an invalid request is sent.
"""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from difflib import get_close_matches
from typing import Any

import trio

from ._content import READ_ONLY_ONCE, SPENT, CollectableStream, ContentIterator, ContentTypes, to_stream
from ._exceptions import ExchangeError, InvalidURL, LocalProtocolError
from ._fields import (
    HeaderList,
    Headers,
    HeaderTypes,
    check_field,
    check_single_field,
    to_bytes,
    to_headers,
    to_pair,
)
from ._public_calls import drop_library_frames
from ._urls import PROXY_PORTS, URL, ParsedURL, parse_url, scheme_hint, to_url, unless_secret


def to_extensions(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy of a caller's extensions as a dict; None gives an empty one.

    Raises:
        TypeError: The value is not a mapping.
    """
    if value is None:
        return {}
    # Checking for a dict first is much cheaper.
    if not isinstance(value, (dict, Mapping)):
        raise TypeError(f"extensions must be a mapping or None, but got {type(value).__name__}")
    return dict(value)


#: The extensions that a request may have.
_REQUEST_EXTENSIONS = frozenset(("timeout", "trace", "sni_hostname", "target", "informational", "protocol"))
# Likely mistakes that `get_close_matches` does not find.
_MISTAKEN_EXTENSIONS = {
    "sni": "sni_hostname",
    "server_hostname": "sni_hostname",
    "on_trace": "trace",
    "info": "informational",
}
# With a lower cutoff, names that callers use for their own purposes, such as `trace_id`, would be refused.
_SIMILARITY = 0.8


def check_extension_names(extensions: Mapping[str, Any]) -> None:
    """Check that no name of a request's extensions is a misspelled known one.

    A name that resembles no known one is accepted: callers may have extensions of their own.

    Raises:
        ValueError: A name resembles a known one; the message names that.
    """
    if _REQUEST_EXTENSIONS.issuperset(extensions):
        return
    for name in extensions:
        if name in _REQUEST_EXTENSIONS or not isinstance(name, str):
            continue
        lowered = name.lower()
        meant = _MISTAKEN_EXTENSIONS.get(lowered)
        if meant is None:
            meant = next(iter(get_close_matches(lowered, _REQUEST_EXTENSIONS, 1, _SIMILARITY)), None)
        if meant is not None:
            raise ValueError(f"unknown extension {name!r}, did you mean {meant!r}?")


def check_ssl_context(value: object) -> None:
    """Check an argument `ssl_context`.

    Raises:
        TypeError: The value is neither an `ssl.SSLContext` nor None.
    """
    if value is not None and not isinstance(value, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {value!r}")


def check_bool(name: str, value: object) -> None:
    """Check that the argument called `name` is a bool.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


class Request:
    """A request.

    Args:
        method: The method, such as `"GET"`.
        url: The URL, as a `URL`, str or bytes.
        headers: The header fields, a mapping or a sequence of pairs; order and case are kept.
        content: The body: bytes, or an asynchronous or ordinary iterable of bytes. An iterable with a
            `__bytes__` method is converted by `bytes()`, and sent like bytes. None for no body.
        extensions: A mapping with any of `timeout`, `trace`, `sni_hostname`, `target`, `informational` and
            `protocol`, which the README describes.

    Attributes:
        method: bytes.
        url: `URL`; its target is that of the `target` extension, if there is one.
        headers: `Headers`.
        stream: The body, an asynchronous iterable of bytes.
        extensions: dict, a copy.

    Raises:
        TypeError: An argument is of the wrong type, or a str is not ASCII.
        InvalidURL: The URL is refused; see `URL`.
    """

    __slots__ = ("extensions", "headers", "method", "stream", "url")

    def __init__(
        self,
        method: bytes | str,
        url: URL | bytes | str,
        *,
        headers: HeaderTypes | None = None,
        content: ContentTypes | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> None:
        self.method: bytes = to_bytes("method", method)
        self.url: URL = url if isinstance(url, URL) else to_url(url)
        self.headers: Headers = to_headers(headers)
        self.stream: AsyncIterable[bytes] = to_stream(content)
        self.extensions: dict[str, Any] = to_extensions(extensions)
        target = self.extensions.get("target")
        if target is not None:
            self.url = URL(scheme=self.url.scheme, host=self.url.host, port=self.url.port)
            self.url.target = to_bytes("the target extension", target)

    def __repr__(self) -> str:
        method, url = self.method.decode("ascii", "backslashreplace"), str(self.url)
        if not self.url.target.startswith(b"/"):
            # The log shows this repr, and a `target` extension may contain userinfo.
            url = unless_secret(url, self.url.target) or str(self.url.origin)
        return f"<Request [{method} {url!r}]>"


class Response:
    """A response: its head, and its body as a stream.

    Args:
        status: The status code.
        headers: The header fields, a mapping or a sequence of pairs.
        content: The body: bytes, or an asynchronous or ordinary iterable of bytes.
        extensions: A mapping; the README describes the extensions of a response.

    Attributes:
        status: int.
        headers: `Headers`, in the order and case of the wire.
        stream: The body, an asynchronous iterable of bytes.
        extensions: dict, with `http_version`, `network_stream`, `trailing_headers`, `reason_phrase` (HTTP/1.1
            only), `stream_id` (HTTP/2 only).

    Raises:
        TypeError: An argument is of the wrong type.
    """

    __slots__ = ("_content", "_iterator", "extensions", "headers", "status", "stream")

    def __init__(
        self,
        status: int,
        *,
        headers: HeaderTypes | None = None,
        content: ContentTypes | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(status, int):
            raise TypeError(f"status must be an int, but got {type(status).__name__}")
        self.status: int = status
        self.headers: Headers = to_headers(headers)
        self.stream: AsyncIterable[bytes] = to_stream(content)
        self.extensions: dict[str, Any] = to_extensions(extensions)
        self._content: bytes | None = None
        # The iterator over the body, from the first call of `aiter_stream` or `aread` on.
        self._iterator: CollectableStream | ContentIterator | None = None

    @property
    def content(self) -> bytes:
        """The whole body, after `await response.aread()`.

        Raises:
            RuntimeError: `aread` was not called, or did not complete.
        """
        if self._content is None:
            raise RuntimeError("the body was not read yet; call 'await response.aread()' first")
        return self._content

    @trio.lowlevel.enable_ki_protection
    async def aread(self) -> bytes:
        """Read the whole body, keep it as `content`, and return it.

        Called again, it returns the same bytes.

        Raises:
            RuntimeError: `aiter_stream` was called before, or an earlier call of `aread` did not complete.
            ReadTimeout: The server sent nothing within the `read` timeout.
            ReadError: The connection broke.
            RemoteProtocolError: The body is malformed or ends early.

        When it is cancelled, the part of the body that it has read is lost; close the response then.
        """
        await trio.lowlevel.checkpoint()
        try:
            return await self._read_without_checkpoint()
        except ExchangeError as exc:
            drop_library_frames(exc)
            raise

    async def _read_without_checkpoint(self) -> bytes:
        """Do the same as `aread`, but without the checkpoint: for a caller that has just passed one.

        Errors and the effect of cancellation are those of `aread`.
        """
        if self._content is None:
            if self._iterator is not None:
                raise RuntimeError(READ_ONLY_ONCE)
            # Set first: if reading fails, a part of the body is lost, and no later call may read the rest.
            self._iterator = SPENT
            stream = self.stream
            if isinstance(stream, CollectableStream):
                self._content = await stream.collect()
            else:
                self._content = b"".join([chunk async for chunk in stream])
        return self._content

    def aiter_stream(self) -> AsyncIterator[bytes]:
        """Return an asynchronous iterator over the body, which yields bytes as they arrive.

        Called again before the end of the body, it returns the same iterator, which continues where it was.
        When the iterator is cancelled, no data is lost.

        Returns:
            The iterator. It raises `ReadTimeout` if the server sent nothing within the `read` timeout,
            `ReadError` if the connection broke, and `RemoteProtocolError` if the body is malformed or ends
            early.

        Raises:
            RuntimeError: The body was iterated to its end, or `aread` was called.
        """
        iterator, stream = self._iterator, self.stream
        if iterator is None:
            iterator = stream if isinstance(stream, CollectableStream) else ContentIterator(stream)
            self._iterator = iterator
        elif iterator.ended:
            raise RuntimeError(READ_ONLY_ONCE)
        return iterator

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the response, and discard the rest of its body.

        Closing a closed response does nothing. When it is cancelled, the response is closed nevertheless.
        """
        close = getattr(self.stream, "aclose", None)
        if close is None:
            await trio.lowlevel.checkpoint()
        else:
            await close()

    def __repr__(self) -> str:
        return f"<Response [{self.status}]>"


def received_response(
    status: int, headers: Headers, stream: AsyncIterable[bytes], extensions: dict[str, Any]
) -> Response:
    """Make a response of parts that need neither checks nor copies."""
    response = Response.__new__(Response)
    response.status = status
    response.headers = headers
    response.stream = stream
    response.extensions = extensions
    response._content = None
    response._iterator = None
    return response


class Proxy:
    """A proxy: its address, and how to connect to it.

    An `http` or `https` proxy opens tunnels (CONNECT) and forwards requests. A `socks4` or `socks5` proxy is
    given an address, which is looked up here; a `socks4a` or `socks5h` proxy is given the name. SOCKS needs
    the `socksio` package (the extra `trio-exchange[socks]`).

    Args:
        url: The URL of the proxy, as a `URL`, str or bytes; its userinfo, if any, is the default for `auth`.
        auth: User name and password for the proxy: sent as Basic credentials (RFC 7617) to an HTTP proxy,
            by the method of RFC 1929 with SOCKS5. SOCKS4 has only the user name.
        headers: Headers for the proxy, sent with CONNECT and with forwarded requests. They do not replace
            headers of the same name that a request has.
        ssl_context: The TLS settings for an `https` proxy; None for `default_ssl_context()`. The pool writes
            its ALPN offer to it.
        http2: Whether to use HTTP/2 with an `https` proxy that selects it by ALPN, so that tunnels share
            connections.

    Attributes:
        url: `URL`, without userinfo.
        auth: A pair of bytes, or None.
        headers: `Headers`; for an HTTP proxy with `auth` the first is Proxy-Authorization.
        ssl_context: As given.
        http2: As given.

    Raises:
        TypeError: An argument is of the wrong type.
        InvalidURL: The URL has another scheme than these, no host, or a path; or see `URL`.
        ValueError: The credentials can't be sent to a proxy of this kind.
        LocalProtocolError: A header can't be sent.
    """

    __slots__ = ("auth", "headers", "http2", "ssl_context", "url")

    def __init__(
        self,
        url: URL | bytes | str,
        auth: tuple[bytes | str, bytes | str] | None = None,
        headers: HeaderTypes | None = None,
        ssl_context: ssl.SSLContext | None = None,
        *,
        http2: bool = False,
    ) -> None:
        self.url: URL
        if isinstance(url, URL):
            userinfo = None
            self.url = url
        else:
            userinfo, scheme, host, port, target = _parse_proxy_url(url)
            self.url = URL(scheme=scheme, host=host, port=port, target=target)
        if self.url.scheme not in PROXY_PORTS:
            schemes = ", ".join(scheme.decode() for scheme in PROXY_PORTS)
            given = bytes(url) if isinstance(url, URL) else url
            name = self.url.scheme.decode("latin-1")
            shown = unless_secret(f", not {name!r}{scheme_hint(self.url)}", given)
            raise InvalidURL(f"a proxy's scheme must be one of {schemes}{shown}")
        if not self.url.host:
            raise InvalidURL("a proxy's URL must have a host")
        if self.url.target != b"/":
            raise InvalidURL(f"a proxy's URL can't have a path or a query; {_IN_CREDENTIALS}")
        check_ssl_context(ssl_context)
        check_bool("http2", http2)
        if auth is None and userinfo is not None:
            user, _, password = userinfo.partition(b":")
            auth = (_unquote(user), _unquote(password))
        self.auth: tuple[bytes, bytes] | None = None
        self.headers: Headers = to_headers(headers)
        self.ssl_context: ssl.SSLContext | None = ssl_context
        self.http2: bool = http2
        if auth is not None:
            user, password = to_pair("auth must be a pair of user name and password", auth)
            self.auth = (
                to_bytes("the proxy's user name", user),
                to_bytes("the proxy's password", password),
            )
            _check_credentials(self.url.scheme, *self.auth)
            if self.url.scheme in (b"http", b"https"):
                credentials = base64.b64encode(b"%b:%b" % self.auth)
                self.headers.insert(0, (b"Proxy-Authorization", b"Basic " + credentials))
        _check_proxy_headers(self.headers)

    def __repr__(self) -> str:
        user = "" if self.auth is None else ", auth=(user and password hidden)"
        return f"Proxy({str(self.url.origin)!r}{user})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proxy) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    @property
    def _parts(self) -> tuple[object, ...]:
        return self.url.origin, self.auth, tuple(self.headers), self.ssl_context, self.http2


_IN_CREDENTIALS = "in credentials '/', '?', '#' and '@' must be percent-encoded"


def _parse_proxy_url(url: bytes | str) -> ParsedURL:
    """Parse a proxy's URL, with error messages that show no part of a password."""
    at, fragment = (b"@", b"#") if isinstance(url, bytes) else ("@", "#")
    given: Any = url
    try:
        parsed = parse_url(url)
    except InvalidURL:
        if at not in given:
            raise
    else:
        if fragment not in given:
            return parsed
    raise InvalidURL(f"a proxy's URL must be SCHEME://[USER:PASSWORD@]HOST[:PORT]; {_IN_CREDENTIALS}")


def _check_credentials(scheme: bytes, user: bytes, password: bytes) -> None:
    """Check that credentials can be sent to a proxy, with error messages that do not show them."""
    match scheme:
        case b"socks4" | b"socks4a":
            if password:
                raise ValueError("SOCKS4 has no passwords, only user names")
            if b"\0" in user:
                raise ValueError("a user name for SOCKS4 can't have a zero byte")
        case b"socks5" | b"socks5h":
            # RFC 1929, section 2, except that it requires a password: some servers have users without one.
            if not 0 < len(user) < 256 or len(password) > 255:
                raise ValueError(
                    "for SOCKS5 the user name must be 1 to 255 bytes long, the password at most 255"
                )
        case _:
            # RFC 7617, section 2.
            if b":" in user:
                raise ValueError("a user name for an HTTP proxy can't have a colon")


def _check_proxy_headers(headers: HeaderList) -> None:
    """Check a proxy's headers, which are added to requests that have been checked already."""
    names = [name.lower() for name, _ in headers]
    for name, value in headers:
        check_field(name, value)
        if name.lower() in (b"host", b"proxy-authorization"):
            check_single_field(name, names.count(name.lower()) > 1)
        if name.lower() in (b"content-length", b"transfer-encoding"):
            raise LocalProtocolError(
                f"a proxy's headers can't have {name!r}, which a request's content decides"
            )


def _unquote(text: bytes) -> bytes:
    """Decode percent-encoding (RFC 3986, section 2.1)."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text)
