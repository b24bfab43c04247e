"""The values that go in and come out: `URL`, `Origin`, `Request`, `Response`, `Proxy`.

Text is accepted where HTTP's own alphabet is ASCII, and is kept as bytes from there on; bytes pass as
they are. The one exception is a host name in a URL, which may be any Unicode name and is encoded by IDNA.

A `Request` is what the caller said, unchanged. What HTTP needs besides (Host, Content-Length,
Transfer-Encoding) and all checks of what may go on the wire are made by `prepare`, once, just before a
connection is looked for, so that nothing is sent of a request that can't be sent whole.
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
from ._entrypoints import drop_own_frames
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
from ._urls import PROXY_PORTS, URL, ParsedURL, parse_url, scheme_hint, to_url, unless_secret


def to_extensions(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Copy extensions; none are an empty dict.

    Raises:
        TypeError: They are not a mapping.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"extensions must be a mapping or None, but got {type(value).__name__}")
    return dict(value)


#: The extensions of requests.
_REQUEST_EXTENSIONS = frozenset(("timeout", "trace", "sni_hostname", "target", "informational", "protocol"))
# Likely mistakes that are too far from the right name for `get_close_matches`.
_MISTAKEN_EXTENSIONS = {
    "sni": "sni_hostname",
    "server_hostname": "sni_hostname",
    "on_trace": "trace",
    "info": "informational",
}
# At a lower cutoff names that callers may use for themselves, such as `trace_id`, would be mistakes.
_SIMILARITY = 0.8


def check_extension_names(extensions: Mapping[str, Any]) -> None:
    """Check that no name of a request's extensions is nearly, but not quite, a known one.

    Names that resemble none pass: they are the caller's own.

    Raises:
        ValueError: Naming the extension that was meant.
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
    """Check an `ssl_context` argument.

    Raises:
        TypeError: It is neither a context nor None.
    """
    if value is not None and not isinstance(value, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {value!r}")


def check_bool(name: str, value: object) -> None:
    """Check the argument called `name`.

    Raises:
        TypeError: It is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


class Request:
    """A request, as the caller made it.

    Args:
        method: Such as `"GET"`.
        url: A `URL`, or what makes one.
        headers: A mapping or a sequence of pairs; order and case are kept.
        content: The body: bytes, or an asynchronous or ordinary iterable of bytes. An iterable that has a
            `__bytes__` method is converted by `bytes()` first, and sent like bytes.
        extensions: See the README: `timeout`, `trace`, `sni_hostname`, `target`, `informational`,
            `protocol`.

    Attributes:
        method: bytes.
        url: `URL`; the `target` extension, if given, has replaced the target.
        headers: `Headers`.
        stream: The body as an asynchronous iterable of bytes.
        extensions: dict.

    Raises:
        TypeError: An argument is of the wrong type, or text that is not ASCII.
        InvalidURL: See `URL`.
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
            # The log shows this, and a `target` extension may have userinfo.
            url = unless_secret(url, self.url.target) or str(self.url.origin)
        return f"<Request [{method} {url!r}]>"


class Response:
    """A response: its head, and its body as a stream.

    Args:
        status: The status code.
        headers: A mapping or a sequence of pairs.
        content: The body.
        extensions: See the README.

    Attributes:
        status: int.
        headers: `Headers`, in the order and case of the wire.
        stream: The body as an asynchronous iterable of bytes.
        extensions: dict: `http_version`, `network_stream`, `trailing_headers`, `reason_phrase` (HTTP/1.1
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
        # What reads the body, from the first call of `aiter_stream` or `aread` on.
        self._iterator: CollectableStream | ContentIterator | None = None

    @property
    def content(self) -> bytes:
        """The whole body.

        Raises:
            RuntimeError: It was not read yet: `await response.aread()` first.
        """
        if self._content is None:
            raise RuntimeError("the body was not read yet; call 'await response.aread()' first")
        return self._content

    @trio.lowlevel.enable_ki_protection
    async def aread(self) -> bytes:
        """Read the body to its end, keep it as `content`, and return it.

        Raises:
            RuntimeError: `aiter_stream` was called before, or reading was begun and failed.
            ReadTimeout: The server sent nothing for as long as the `read` timeout.
            ReadError: The connection broke.
            RemoteProtocolError: The body is malformed or ends early.

        When it is cancelled, what it had read is lost; close the response then.
        """
        await trio.lowlevel.checkpoint()
        try:
            return await self._read_without_checkpoint()
        except ExchangeError as exc:
            drop_own_frames(exc)
            raise

    async def _read_without_checkpoint(self) -> bytes:
        """`aread` for a caller that has just waited for the network, and need not yield again.

        Errors and what cancellation does are those of `aread`.
        """
        if self._content is None:
            if self._iterator is not None:
                raise RuntimeError(READ_ONLY_ONCE)
            # Should this fail, what was read of the body is lost.
            self._iterator = SPENT
            stream = self.stream
            if isinstance(stream, CollectableStream):
                self._content = await stream.collect()
            else:
                self._content = b"".join([chunk async for chunk in stream])
        return self._content

    def aiter_stream(self) -> AsyncIterator[bytes]:
        """Iterate over the body as it arrives, in pieces of bytes.

        Called again before the end of the body, it goes on where the iteration was left.

        Raises:
            RuntimeError: The body was iterated to its end, or `aread` was called.
            ReadTimeout: From the iterator, as are the following.
            ReadError: The connection broke.
            RemoteProtocolError: The body is malformed or ends early.
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
        """Close the response; what was not read of its body is given up.

        Closing twice is allowed. When it is cancelled, the response is closed all the same.
        """
        close = getattr(self.stream, "aclose", None)
        if close is None:
            await trio.lowlevel.checkpoint()
        else:
            await close()

    def __repr__(self) -> str:
        return f"<Response [{self.status}]>"


class Proxy:
    """A proxy's address and how to speak with it.

    `http` and `https` proxies are asked for tunnels (CONNECT), and given requests to forward. `socks4`
    and `socks5` proxies are given an address that is looked up here, `socks4a` and `socks5h` proxies the
    name; for them the `socksio` package is needed (the extra `trio-exchange[socks]`).

    Args:
        url: Where the proxy listens; its userinfo, if any, is the default for `auth`.
        auth: User name and password, for the proxy alone: sent as Basic credentials (RFC 7617), with SOCKS5
            by its own method (RFC 1929). SOCKS4 has only the user name.
        headers: Sent to the proxy, with CONNECT and with what it forwards. A request's own headers of the
            same name go first.
        ssl_context: For the TLS connection to an `https` proxy; None for `default_ssl_context()`. The pool
            writes its ALPN offer to it.
        http2: Whether to speak HTTP/2 with an `https` proxy that offers it (ALPN), so that tunnels share
            connections to it.

    Attributes:
        url: `URL`, without userinfo.
        auth: Pair of bytes, or None.
        headers: `Headers`, with Proxy-Authorization first where an HTTP proxy has `auth`.
        ssl_context: As given.
        http2: As given.

    Raises:
        TypeError: An argument is of the wrong type.
        InvalidURL: The URL's scheme is none of a proxy's, it has no host, or it has a path; or see `URL`.
        ValueError: The credentials can't be sent to such a proxy.
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
    """Take a proxy's URL apart, with errors that don't show what may be part of a password."""
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
    """Check that credentials can be sent to a proxy; they are secret, so that no error shows them."""
    match scheme:
        case b"socks4" | b"socks4a":
            if password:
                raise ValueError("SOCKS4 has no passwords, only user names")
            if b"\0" in user:
                raise ValueError("a user name for SOCKS4 can't have a zero byte")
        case b"socks5" | b"socks5h":
            # RFC 1929, 2; but servers are known that have users without password.
            if not 0 < len(user) < 256 or len(password) > 255:
                raise ValueError(
                    "for SOCKS5 the user name must be 1 to 255 bytes long, the password at most 255"
                )
        case _:
            # RFC 7617, 2.
            if b":" in user:
                raise ValueError("a user name for an HTTP proxy can't have a colon")


def _check_proxy_headers(headers: HeaderList) -> None:
    """Check what is added to requests that have been checked."""
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
    """Undo percent-encoding (RFC 3986, 2.1)."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text)
