"""The values that go in and come out: `URL`, `Origin`, `Request`, `Response`, `Proxy`.

Text is accepted where HTTP's own alphabet is ASCII, and is kept as bytes from there on; bytes pass as
they are. The one exception is a host name in a URL, which may be any Unicode name and is encoded by IDNA.

A `Request` is what the caller said, unchanged. What HTTP needs besides (Host, Content-Length,
Transfer-Encoding) and all checks of what may go on the wire are made by `prepare`, once, just before a
connection is looked for, so that nothing is sent of a request that can't be sent whole.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import inspect
import ipaddress
import re
import ssl
import weakref
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from difflib import get_close_matches
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    NamedTuple,
    SupportsBytes,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    overload,
)

import idna
import trio

from ._entrypoints import drop_own_frames
from ._exceptions import ExchangeError, InvalidURL, LocalProtocolError

T = TypeVar("T")

#: Headers where no user sees them.
HeaderList: TypeAlias = list[tuple[bytes, bytes]]
# A mapping's type of keys is invariant, hence three of them.
HeaderTypes: TypeAlias = (
    Mapping[str, bytes | str]
    | Mapping[bytes, bytes | str]
    | Mapping[bytes | str, bytes | str]
    | Sequence[tuple[bytes | str, bytes | str]]
)
ContentTypes: TypeAlias = bytes | bytearray | memoryview | AsyncIterable[bytes] | Iterable[bytes]

DEFAULT_PORTS = {b"http": 80, b"https": 443, b"ws": 80, b"wss": 443}
PROXY_PORTS = {
    b"http": 80,
    b"https": 443,
    b"socks4": 1080,
    b"socks4a": 1080,
    b"socks5": 1080,
    b"socks5h": 1080,
}
_PORTS = {**DEFAULT_PORTS, **PROXY_PORTS}
_WITH_TLS = {b"http": b"https", b"ws": b"wss"}
_WITHOUT_TLS = {b"https": b"http", b"wss": b"ws"}

# RFC 9110, 9.2.2.
IDEMPOTENT_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))

# Methods whose requests usually have no content (RFC 9110, 9.3): a stream of unknown length given with
# one of them is looked into before the head is sent, see `Prepared.peek_body`.
_USUALLY_WITHOUT_CONTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"DELETE", b"CONNECT"))

# RFC 3986, appendix B, with the scheme required to look like one, and the fragment left out.
_URL = re.compile(rb"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?#]*))?([^?#]*)(\?[^#]*)?", re.DOTALL)
_AUTHORITY = re.compile(rb"(?:(.*)@)?(\[[^\[\]@]*\]|[^:\[\]@]*)(?::([0-9]*))?", re.DOTALL)
_NOT_IN_URL = re.compile(rb"[\x00-\x20\x7f]")
_BRACKETED = re.compile(rb"\[(.*)\]", re.DOTALL)
_URL_TEXT = re.compile(_URL.pattern.decode(), re.DOTALL)
# Also percent-encoded, and the characters that IDNA maps to it.
_AT = re.compile("[@\ufe6b\uff20]|%(?:25)*40")
# RFC 3986, 3.2.2, without percent-encoding, which resolvers and certificates don't know.
_NAME = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=-]*")

# RFC 9110, 5.6.2 and 5.5.
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff]+(?:[ \t]+[\x21-\x7e\x80-\xff]+)*)?")
# Visible ASCII without the number sign: a fragment is never sent.
_TARGET = re.compile(rb"[\x21\x22\x24-\x7e]+")
# As many digits as the parser takes.
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,20}")


def _to_bytes(name: str, value: bytes | str, of: bytes = b"") -> bytes:
    """Take bytes, or text in ASCII. An error says that it is the `name`, of which one is told by `of`."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        try:
            return value.encode("ascii")
        except UnicodeEncodeError as exc:
            # The value may be a secret.
            raise TypeError(
                f"{name} given as str must be ASCII, but the character at index {exc.start} is not"
                f"{f', for {of!r}' if of else ''}; encode it to bytes first"
            ) from None
    raise TypeError(
        f"{name} must be bytes or str, but got {type(value).__name__}{f' for {of!r}' if of else ''}"
    )


class Headers(list[tuple[bytes, bytes]]):
    """Header fields, in the order and case of the wire: a list of pairs of name and value, all bytes.

    It compares, and can be changed, like any list. Besides, fields are found by name, given as bytes or
    ASCII str, in any case: `headers.get("Content-Type")`, `"Content-Type" in headers`.
    mypy with strict equality reports a name before `in`, since the items are pairs; use `get` there.
    """

    __slots__ = ()

    @overload
    def get(self, name: bytes | str) -> bytes | None: ...

    @overload
    def get(self, name: bytes | str, default: T) -> bytes | T: ...

    def get(self, name: bytes | str, default: T | None = None) -> bytes | T | None:
        """The value of the first field of that name.

        Args:
            name: The field's name, in any case.
            default: What to return where there is no such field.

        Raises:
            TypeError: The name is neither bytes nor str.
        """
        wanted = _folded(name)
        for key, value in self:
            if key.lower() == wanted:
                return value
        return default

    def get_all(self, name: bytes | str) -> list[bytes]:
        """The values of all fields of that name, in their order; an empty list where there is none.

        Args:
            name: The fields' name, in any case.

        Raises:
            TypeError: The name is neither bytes nor str.
        """
        wanted = _folded(name)
        return [value for key, value in self if key.lower() == wanted]

    @overload
    def __getitem__(self, index: SupportsIndex) -> tuple[bytes, bytes]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[bytes, bytes]]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (bytes, str)):
            raise TypeError(f"headers are a list of pairs; find one by headers.get({index!r})")
        return super().__getitem__(index)

    def copy(self) -> Headers:
        """A copy, of the same type."""
        return Headers(self)

    def __contains__(self, item: object) -> bool:
        if isinstance(item, (bytes, str)):
            return self.get(item) is not None
        return super().__contains__(item)


def _folded(name: bytes | str) -> bytes | None:
    """A header's name in lower case; None for text that is no header's name."""
    if isinstance(name, bytes):
        return name.lower()
    if isinstance(name, str):
        return name.lower().encode() if name.isascii() else None
    raise TypeError(f"a header's name must be bytes or str, but got {type(name).__name__}")


def to_headers(value: HeaderTypes | None) -> Headers:
    """Take what a caller gives as headers.

    Raises:
        TypeError: It is neither a mapping nor a sequence of pairs, or a name or value is neither bytes nor
            ASCII str.
    """
    if value is None:
        return Headers()
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes, bytearray)):
        raise TypeError(f"headers must be a mapping or a sequence of pairs, but got {type(value).__name__}")
    return Headers(map(_to_header, pairs))


def _to_header(pair: Any) -> tuple[bytes, bytes]:
    name, value = _to_pair("each header must be a pair of name and value", pair)
    name = _to_bytes("header names", name)
    return name, _to_bytes("header values", value, name)


def _to_pair(message: str, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"{message}, but got {type(pair).__name__}")
    if len(pair) != 2:
        raise TypeError(f"{message}, but got {len(pair)} items")
    return pair[0], pair[1]


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


def check_yes_or_no(name: str, value: object) -> None:
    """Check the argument called `name`.

    Raises:
        TypeError: It is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_chunk(chunk: object) -> None:
    """Check what the content's iterator gave.

    Raises:
        LocalProtocolError: It is not bytes, nor like them.
    """
    if not isinstance(chunk, (bytes, bytearray, memoryview)):
        raise LocalProtocolError(f"the content's iterator must give bytes, but gave {type(chunk).__name__}")


class ByteStream:
    """Content that is there as a whole; it can be iterated any number of times."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __bytes__(self) -> bytes:
        return self.data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _SyncIterator(iter((self.data,)))

    def __repr__(self) -> str:
        return f"<ByteStream [{len(self.data)} bytes]>"


class IterableStream:
    """Content from an ordinary iterable of bytes, shown as an asynchronous one."""

    __slots__ = ("iterable",)

    def __init__(self, iterable: Iterable[bytes]) -> None:
        self.iterable = iterable

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _SyncIterator(iter(self.iterable))


class _SyncIterator:
    """An ordinary iterator as an asynchronous one, each step a checkpoint."""

    __slots__ = ("_iterator",)

    def __init__(self, iterator: Iterator[bytes]) -> None:
        self._iterator = iterator

    def __aiter__(self) -> _SyncIterator:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        for chunk in self._iterator:
            return chunk
        raise StopAsyncIteration


def _to_stream(content: ContentTypes | None) -> AsyncIterable[bytes]:
    if content is None:
        return ByteStream(b"")
    if isinstance(content, (bytes, bytearray, memoryview)):
        return ByteStream(bytes(content))
    iterable: Any = content
    is_async = isinstance(iterable, AsyncIterable)
    if is_async or (isinstance(iterable, Iterable) and not isinstance(iterable, (str, Mapping))):
        if isinstance(iterable, SupportsBytes):
            return ByteStream(bytes(iterable))
        return iterable if is_async else IterableStream(iterable)
    raise TypeError(
        f"content must be bytes or an (asynchronous) iterable of bytes, but got {type(content).__name__}"
    )


class Origin:
    """Whom a connection is to: scheme, host and port (RFC 9110, 4.3.1).

    Attributes:
        scheme: Such as `b"https"`.
        host: Name or address, without brackets.
        port: Always a number; the scheme's own where the URL named none.
    """

    __slots__ = ("host", "port", "scheme")

    def __init__(self, scheme: bytes, host: bytes, port: int) -> None:
        self.scheme: bytes = scheme
        self.host: bytes = host
        self.port: int = port

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Origin)
            and self.scheme == other.scheme
            and self.host == other.host
            and self.port == other.port
        )

    def __hash__(self) -> int:
        return hash((self.scheme, self.host, self.port))

    def __str__(self) -> str:
        return f"{self.scheme.decode('latin-1')}://{bracketed(self.host).decode('latin-1')}:{self.port}"

    def __repr__(self) -> str:
        return f"Origin(scheme={self.scheme!r}, host={self.host!r}, port={self.port!r})"


def with_tls(origin: Origin) -> Origin | None:
    """The origin of the same port with TLS, None if it has TLS already."""
    scheme = _WITH_TLS.get(origin.scheme)
    return None if scheme is None else Origin(scheme, origin.host, origin.port)


def without_tls(origin: Origin) -> Origin | None:
    """The origin of the same port without TLS, None if it has none already."""
    scheme = _WITHOUT_TLS.get(origin.scheme)
    return None if scheme is None else Origin(scheme, origin.host, origin.port)


class URL:
    """A URL, taken apart as far as a request needs it (RFC 3986).

    Give it whole, `URL("https://www.example.com/path?query")`, or in parts,
    `URL(scheme=b"https", host=b"www.example.com", port=443, target=b"/path?query")`.

    A fragment is dropped, as it is never sent. A host name that is not ASCII is encoded by IDNA, an IPv6
    address stands in brackets in the whole form and may do so in the parts, and may have a zone
    identifier (RFC 6874), which serves to connect and is never sent.

    Args:
        url: The URL as a whole, str or bytes. With it, no parts.
        scheme: Such as `b"https"`; lower-cased.
        host: Host name or address; lower-cased.
        port: 1 to 65535, or None for the scheme's own.
        target: Path and query as they are sent, `b"/"` if empty.

    Attributes:
        scheme: bytes, empty if there was none.
        host: bytes, without brackets, empty if there was none.
        port: int, or None where the URL named none.
        target: bytes, path and query.

    `str(url)` is the whole URL again, `repr(url)` what makes it.

    Raises:
        TypeError: A part is neither bytes nor text, or the URL is given both ways.
        InvalidURL: The port is not a port, the authority can't be parsed, scheme or authority contain white
            space or control characters, text is not ASCII outside the host name, or the URL contains
            userinfo (credentials before an `@`, which would otherwise be dropped without a word: send them
            as an Authorization header).
    """

    __slots__ = ("host", "port", "scheme", "target")

    scheme: bytes
    host: bytes
    port: int | None
    target: bytes

    def __init__(
        self,
        url: bytes | str = "",
        *,
        scheme: bytes | str = b"",
        host: bytes | str = b"",
        port: int | None = None,
        target: bytes | str = b"",
    ) -> None:
        if url or not isinstance(url, (bytes, str)):
            if scheme or host or port or target:
                raise TypeError("a URL is given as a whole or in parts, not both")
            userinfo, self.scheme, self.host, self.port, self.target = _parse_url(url)
            if userinfo is not None:
                raise InvalidURL(_USERINFO_REFUSED)
        else:
            self.scheme = _part_to_bytes("scheme", scheme).lower()
            if _NOT_IN_URL.search(self.scheme):
                shown = unless_secret(f": {self.scheme!r}", self.scheme)
                raise InvalidURL(f"the URL's scheme has white space or control characters{shown}")
            self.host = _to_host(host, host)
            self.port = _to_port(port)
            self.target = _part_to_bytes("target", target) or b"/"

    @property
    def origin(self) -> Origin:
        """The URL's origin, with the scheme's own port where the URL named none."""
        return Origin(self.scheme, self.host, self.port or _PORTS.get(self.scheme, 0))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, URL) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    @property
    def _parts(self) -> tuple[bytes, bytes, int | None, bytes]:
        return self.scheme, self.host, self.port, self.target

    def __bytes__(self) -> bytes:
        port = b"" if self.port is None else b":%d" % self.port
        return b"%b://%b%b%b" % (self.scheme, bracketed(self.host), port, self.target)

    def __str__(self) -> str:
        scheme = self.scheme + b":" if self.scheme else b""
        host = b"//" + bracketed(self.host) if self.host else b""
        port = b"" if self.port is None else b":%d" % self.port
        # A target in another form, such as `*`, is no part of the host's name.
        space = b" " if self.host and not self.target.startswith(b"/") else b""
        return (scheme + host + port + space + self.target).decode("latin-1")

    def __repr__(self) -> str:
        whole = str(self)
        with contextlib.suppress(InvalidURL):
            if URL(whole) == self:
                return f"URL({whole!r})"
        return f"URL(scheme={self.scheme!r}, host={self.host!r}, port={self.port!r}, target={self.target!r})"


class _ParsedURL(NamedTuple):
    userinfo: bytes | None
    scheme: bytes
    host: bytes
    port: int | None
    target: bytes


_USERINFO_REFUSED = (
    "a URL with userinfo (a user name or password before '@') is refused; "
    "send credentials in an Authorization header"
)


def unless_secret(text: str, url: bytes | str) -> str:
    """The part of an error's message that shows something of a URL, if there is no `@` in that URL.

    What stands before an `@` may be a password, wherever it is: of a URL with a mistake nobody can tell
    where its parts were meant to begin.
    """
    given = url if isinstance(url, str) else url.decode("utf-8", "replace")
    return "" if _AT.search(given) else text


def scheme_hint(url: URL) -> str:
    """What an error about a URL's scheme adds where it seems to be missing: `localhost:8080/`."""
    whole = str(url).removeprefix("//")
    if whole.startswith("/") or (url.scheme and (url.host or not url.target[:1].isdigit())):
        return ""
    return unless_secret(f"; did you mean 'http://{whole}'?", whole)


def _parse_url(url: bytes | str) -> _ParsedURL:
    text = _url_to_bytes(url)
    # No credentials are kept, nor much.
    return _parse_new_url(text) if b"@" in text or len(text) > 1024 else _parse_known_url(text)


@functools.lru_cache(maxsize=512)
def _parse_known_url(url: bytes) -> _ParsedURL:
    return _parse_new_url(url)


def _parse_new_url(url: bytes) -> _ParsedURL:
    match = _URL.match(url)
    assert match is not None, "every part of the pattern is optional"
    scheme, authority, path, query = match.groups()
    for name, part in (("scheme", scheme), ("host", authority)):
        if part is not None and _NOT_IN_URL.search(part):
            raise InvalidURL(f"the URL's {name} has white space or control characters")
    target = (path or b"/") + (query or b"")
    if not authority and b"@" in path and not url.startswith(b"/"):
        # Such as `user:password@host`.
        raise InvalidURL(_USERINFO_REFUSED)
    fragment = url[match.end() :]
    if fragment and not (
        unless_secret("shown", fragment)
        or (scheme and scheme.lower() in _PORTS and authority and _TARGET.fullmatch(target))
    ):
        # The '@' is about to be dropped, and later errors would show what stands before it.
        raise InvalidURL("the URL can't be requested, and may have a password before its '@'")
    if authority is None:
        return _ParsedURL(None, (scheme or b"").lower(), b"", None, target)
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise _bad_authority(authority, url)
    userinfo, host, port = parts.groups()
    return _ParsedURL(
        userinfo,
        (scheme or b"").lower(),
        _to_host(host, url),
        _parse_port(port, url) if port else None,
        target,
    )


def _url_to_bytes(url: bytes | str) -> bytes:
    """Encode a URL whose host name, and nothing else, may be other than ASCII."""
    if not isinstance(url, str) or url.isascii():
        return _to_bytes("url", url)
    match = _URL_TEXT.match(url)
    assert match is not None, "every part of the pattern is optional"
    scheme, authority, path, query = match.groups(default="")
    userinfo, at, host_and_port = authority.rpartition("@")
    host, colon, port = host_and_port.partition(":")
    if not userinfo.isascii():
        raise InvalidURL(_USERINFO_REFUSED)
    if not port.isascii():
        raise _bad_authority(authority, url)
    if not (scheme or authority or path.startswith("/")):
        hint = "" if "://" in url else unless_secret(f", such as 'http://{url}'", url)
        raise InvalidURL(f"a URL must begin with SCHEME://HOST{hint}")
    fragment = url[match.end() :]
    parts = {"path": path, "query": query, "fragment": fragment}
    for name, part in parts.items():
        if not part.isascii():
            raise _not_ascii(name, part, url)
    separator = "://" if scheme else "//"
    encoded = _encode_idna(host, url).decode()
    return f"{scheme}{separator}{userinfo}{at}{encoded}{colon}{port}{path}{query}{fragment}".encode()


def _part_to_bytes(name: str, value: bytes | str) -> bytes:
    if isinstance(value, str) and not value.isascii():
        raise _not_ascii(name, value, value)
    return _to_bytes(name, value)


def _bad_authority(authority: bytes | str, url: bytes | str) -> InvalidURL:
    shown = unless_secret(f", not {authority!r}", url)
    colon: Any = b":" if isinstance(authority, bytes) else ":"
    hint = "; an IPv6 address needs brackets, such as [::1]" if authority.count(colon) > 1 else ""
    return InvalidURL(f"the URL's authority must be HOST or HOST:PORT{shown}{hint}")


def _not_ascii(name: str, part: str, url: str) -> InvalidURL:
    """Find the error to raise for a URL whose part `name` has a character that no URL has."""
    character = next(filter(lambda character: not character.isascii(), part))
    encoded = "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
    shown = unless_secret(f", {character!r} as {encoded!r}", url)
    return InvalidURL(f"the URL's {name} must be ASCII, with all else percent-encoded{shown}")


def _encode_idna(host: str, url: str) -> bytes:
    try:
        return idna.encode(host, uts46=True)
    except idna.IDNAError as exc:
        if unless_secret(host, url):
            raise InvalidURL(f"{host!r} is not a host name: {exc}") from exc
    # Its cause, too, would show what stands before the '@'.
    raise InvalidURL("what the URL has for a host is not a host name")


def _to_host(host: bytes | str, url: bytes | str) -> bytes:
    """Check the host that a URL has."""
    if isinstance(host, str) and not host.isascii():
        return _encode_idna(host, host)
    raw = _to_bytes("host", host)
    if b"@" in raw:
        raise InvalidURL("the host must be a name or an address, without '@' and what is before it")
    if _NOT_IN_URL.search(raw):
        shown = unless_secret(f": {raw!r}", url)
        raise InvalidURL(f"the host has white space or control characters{shown}")
    in_brackets = _BRACKETED.fullmatch(raw)
    if in_brackets is None and b":" not in raw:
        if not _NAME.fullmatch(raw):
            shown = unless_secret(f", not {raw!r}", url)
            raise InvalidURL(f"the host must be a name or an address{shown}")
        return raw.lower()
    if in_brackets is not None:
        raw = in_brackets[1].replace(b"%25", b"%", 1)
    if not _is_ipv6(raw):
        shown = unless_secret(f", not {raw!r}", url)
        raise InvalidURL(f"a host with brackets or colons must be an IPv6 address{shown}")
    address, percent, zone = raw.partition(b"%")
    return address.lower() + percent + zone


def _is_ipv6(address: bytes) -> bool:
    try:
        ipaddress.IPv6Address(address.decode("ascii"))
    except ValueError:
        return False
    return True


def _parse_port(digits: bytes, url: bytes) -> int:
    significant = digits.lstrip(b"0")
    # Python refuses to make a number of too many digits.
    port = int(significant or b"0") if len(significant) < 6 else 0
    if not 0 < port < 65536:
        shown = unless_secret(f", not {digits.decode()}", url)
        raise InvalidURL(f"port must be between 1 and 65535{shown}")
    return port


def _to_port(port: int | None) -> int | None:
    if port is None:
        return None
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port must be an int or None, but got {type(port).__name__}")
    if not 0 < port < 65536:
        raise InvalidURL(f"port must be between 1 and 65535, not {port}")
    return port


def bracketed(host: bytes) -> bytes:
    """The host as it stands in an authority: IPv6 addresses in brackets and without their zone."""
    if b":" in host:
        return b"[%b]" % host.partition(b"%")[0]
    return host


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
        self.method: bytes = _to_bytes("method", method)
        self.url: URL = url if isinstance(url, URL) else _to_url(url)
        self.headers: Headers = to_headers(headers)
        self.stream: AsyncIterable[bytes] = _to_stream(content)
        self.extensions: dict[str, Any] = to_extensions(extensions)
        target = self.extensions.get("target")
        if target is not None:
            self.url = URL(scheme=self.url.scheme, host=self.url.host, port=self.url.port)
            self.url.target = _to_bytes("the target extension", target)

    def __repr__(self) -> str:
        method, url = self.method.decode("ascii", "backslashreplace"), str(self.url)
        if not self.url.target.startswith(b"/"):
            # The log shows this, and a `target` extension may have userinfo.
            url = unless_secret(url, self.url.target) or str(self.url.origin)
        return f"<Request [{method} {url!r}]>"


class CollectableStream:
    """The base of bodies that can be had whole for less than a checkpoint for every piece of them.

    Such a body is its own iterator.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        def __aiter__(self) -> AsyncIterator[bytes]:
            """The body itself."""
            raise NotImplementedError

        @property
        def ended(self) -> bool:
            """Whether it was read to its end."""
            raise NotImplementedError

        async def __anext__(self) -> bytes:
            """The next piece of it."""
            raise NotImplementedError

        async def collect(self) -> bytes:
            """Read all that is left of the body, and close it."""
            raise NotImplementedError


def _to_url(url: Any) -> URL:
    if not isinstance(url, (bytes, str)):
        raise TypeError(f"url must be a URL, bytes or str, but got {type(url).__name__}")
    return URL(url)


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
        self.stream: AsyncIterable[bytes] = _to_stream(content)
        self.extensions: dict[str, Any] = to_extensions(extensions)
        self._content: bytes | None = None
        # What reads the body, from the first call of `aiter_stream` or `aread` on.
        self._iterator: CollectableStream | _ContentIterator | None = None

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
                raise RuntimeError(_ONLY_ONCE)
            # Should this fail, what was read of the body is lost.
            self._iterator = _SPENT
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
            iterator = stream if isinstance(stream, CollectableStream) else _ContentIterator(stream)
            self._iterator = iterator
        elif iterator.ended:
            raise RuntimeError(_ONLY_ONCE)
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


class _ContentIterator:
    """An asynchronous iterator that knows whether it has come to its end."""

    __slots__ = ("_iterator", "ended")

    def __init__(self, content: AsyncIterable[bytes]) -> None:
        self._iterator = aiter(content)
        self.ended: bool = False

    def __aiter__(self) -> _ContentIterator:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._iterator)
        except StopAsyncIteration:
            self.ended = True
            raise


_ONLY_ONCE = "the body can be read only once; it was read before, at least in part"
# Of a body that was read as a whole.
_SPENT = _ContentIterator(ByteStream(b""))
_SPENT.ended = True


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
        check_yes_or_no("http2", http2)
        if auth is None and userinfo is not None:
            user, _, password = userinfo.partition(b":")
            auth = (_unquote(user), _unquote(password))
        self.auth: tuple[bytes, bytes] | None = None
        self.headers: Headers = to_headers(headers)
        self.ssl_context: ssl.SSLContext | None = ssl_context
        self.http2: bool = http2
        if auth is not None:
            user, password = _to_pair("auth must be a pair of user name and password", auth)
            self.auth = (
                _to_bytes("the proxy's user name", user),
                _to_bytes("the proxy's password", password),
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


def _parse_proxy_url(url: bytes | str) -> _ParsedURL:
    """Take a proxy's URL apart, with errors that don't show what may be part of a password."""
    at, fragment = (b"@", b"#") if isinstance(url, bytes) else ("@", "#")
    given: Any = url
    try:
        parsed = _parse_url(url)
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
        _check_header(name, value)
        if name.lower() in (b"host", b"proxy-authorization"):
            _check_single(name, names.count(name.lower()) > 1)
        if name.lower() in (b"content-length", b"transfer-encoding"):
            raise LocalProtocolError(
                f"a proxy's headers can't have {name!r}, which a request's content decides"
            )


def _unquote(text: bytes) -> bytes:
    """Undo percent-encoding (RFC 3986, 2.1)."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes.fromhex(match[1].decode()), text)


class Prepared:
    """A request that has been checked and completed, ready for any connection.

    Attributes:
        request: The request as the caller made it.
        method: bytes.
        target: bytes.
        headers: As they go on the wire, Host and framing included.
        body: The body if it is there as a whole, else None.
        idempotent: Whether the method is idempotent (RFC 9110, 9.2.2).
        expects_continue: Whether the body waits for `100 (Continue)` (RFC 9110, 10.1.1).
        protocol: What an extended CONNECT asks for (RFC 8441), else None.
    """

    __slots__ = (
        "_failure",
        "_iterator",
        "_peeked",
        "body",
        "expects_continue",
        "headers",
        "idempotent",
        "method",
        "protocol",
        "request",
        "target",
    )

    def __init__(self, request: Request) -> None:
        if request.extensions:
            check_extension_names(request.extensions)
        callback = request.extensions.get("informational")
        if callback is not None and not callable(callback):
            raise TypeError(f"the informational extension must be an async function, not {callback!r}")
        self.request: Request = request
        # Weak, since its traceback leads to the request.
        self._failure: weakref.ref[ExchangeError] | None = None
        self.protocol: bytes | None = _protocol(request)
        self.method: bytes = request.method
        self.target: bytes = request.url.target
        self.idempotent: bool = request.method in IDEMPOTENT_METHODS
        stream = request.stream
        self.body: bytes | None = stream.data if isinstance(stream, ByteStream) else None
        self._iterator: AsyncIterator[bytes] | None = None
        self._peeked: bytes | None = None
        self.headers: HeaderList
        self.expects_continue: bool
        self.headers, self.expects_continue = _complete_headers(request, self.body)

    @property
    def failure(self) -> ExchangeError | None:
        """How an exchange of it failed, if due to the network or the server, and without an answer."""
        return None if self._failure is None else self._failure()

    @failure.setter
    def failure(self, error: ExchangeError) -> None:
        self._failure = weakref.ref(error)

    @property
    def body_can_be_sent_again(self) -> bool:
        """Whether `iterate_body` would give the same body once more, or was not called yet."""
        if self.body is not None or self._iterator is None or self._peeked is not None:
            return True
        stream = self.request.stream
        return isinstance(stream, IterableStream) and isinstance(stream.iterable, Collection)

    def iterate_body(self) -> AsyncIterator[bytes]:
        """Start to take the body from the caller's iterable."""
        if self._peeked is None or self._iterator is None:
            self._iterator = aiter(self.request.stream)
            return self._iterator
        peeked, self._peeked = self._peeked, None
        return _Peeked(peeked, self._iterator)

    @trio.lowlevel.disable_ki_protection
    async def close_body(self) -> None:
        """End the caller's generator wherever it is; its clean-up is not left to garbage collection."""
        iterator: Any = self._iterator
        if inspect.isasyncgen(iterator):
            await iterator.aclose()

    async def peek_body(self) -> None:
        """Find out whether a stream of unknown length has any content at all.

        Adapters hand every request's body over as a stream, also the empty one of a GET. Sent as an
        empty chunked body it confuses servers that don't expect one there, so with a method that
        seldom has content the first chunk is waited for, and decides.

        Not so with a generator that the caller made for this very request. It has content, and may have
        cancel scopes around its yields, so that all of it has to be taken in one task.
        """
        if self.body is not None or self.method not in _USUALLY_WITHOUT_CONTENT:
            return
        if inspect.isasyncgen(self.request.stream):
            return
        if not any(name.lower() == b"transfer-encoding" for name, _ in self.headers):
            return
        self._iterator = aiter(self.request.stream)
        while (chunk := await next_chunk(self._iterator)) is not END_OF_BODY:
            check_chunk(chunk)
            if memoryview(chunk).nbytes:
                self._peeked = chunk
                return
        self.body = b""
        self.expects_continue = False
        self.headers = [pair for pair in self.headers if pair[0].lower() != b"transfer-encoding"]


#: What `next_chunk` returns when the iterator has ended.
END_OF_BODY: Final = object()


@trio.lowlevel.disable_ki_protection
async def next_chunk(iterator: AsyncIterator[bytes]) -> Any:
    """Take the next chunk of a body from the caller's iterator, or `END_OF_BODY`.

    Ctrl-C may interrupt the iterator, as it may interrupt any code of the program.
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


def _protocol(request: Request) -> bytes | None:
    protocol = request.extensions.get("protocol")
    if protocol is None:
        return None
    protocol = _to_bytes("the protocol extension", protocol)
    if not _TOKEN.fullmatch(protocol):
        raise LocalProtocolError(f"the protocol extension must be a token, not {protocol!r}")
    if request.method != b"CONNECT":
        raise LocalProtocolError(f"the protocol extension needs the method CONNECT, not {request.method!r}")
    return protocol


def _complete_headers(request: Request, body: bytes | None) -> tuple[HeaderList, bool]:
    """Check everything that goes on the wire, and add what HTTP requires and the caller left out.

    Returns:
        The headers, and whether the body waits for `100 (Continue)`.

    Raises:
        LocalProtocolError: Naming the part that can't be sent.
    """
    if not _TOKEN.fullmatch(request.method):
        raise LocalProtocolError(f"the method must be a token, not {request.method!r}")
    if not _TARGET.fullmatch(request.url.target):
        shown = unless_secret(f": {request.url.target!r}", bytes(request.url))
        message = (
            "the target must be ASCII, not empty, and without fragment, white space or control characters"
            f"{shown}"
        )
        if request.extensions.get("target") is None:
            raise InvalidURL(f"{message}; percent-encode them in the URL, ' ' as '%20'")
        raise LocalProtocolError(message)
    has_host = has_length = has_coding = expects_continue = False
    for name, value in request.headers:
        _check_header(name, value)
        match name.lower():
            case b"host":
                _check_single(name, has_host)
                has_host = True
            case b"content-length":
                _check_single(name, has_length)
                has_length = True
                _check_content_length(value, body)
            case b"transfer-encoding":
                _check_single(name, has_coding)
                has_coding = True
                if value.lower() != b"chunked":
                    raise LocalProtocolError(f"Transfer-Encoding can only be chunked, not {value!r}")
            case b"expect":
                expects_continue = value.lower() == b"100-continue"
    if has_length and has_coding:
        raise LocalProtocolError("a request can't have both Content-Length and Transfer-Encoding")
    headers = request.headers[:] if has_host else [(b"Host", _host_header(request)), *request.headers]
    if body is None:
        if not (has_length or has_coding):
            headers.append((b"Transfer-Encoding", b"chunked"))
    elif not (has_length or has_coding) and (body or request.method in (b"POST", b"PUT", b"PATCH")):
        # RFC 9110, 8.6: these three say that their content is empty.
        headers.append((b"Content-Length", b"%d" % len(body)))
    return headers, expects_continue and body != b""


def _check_header(name: bytes, value: bytes) -> None:
    """Check a header field.

    Raises:
        LocalProtocolError: It can't be sent.
    """
    if not _TOKEN.fullmatch(name):
        raise LocalProtocolError(f"a header's name must be a token, not {name!r}")
    if not _FIELD_VALUE.fullmatch(value):
        raise LocalProtocolError(
            f"the value of the header {name!r} has control characters, or white space at an end"
        )


def _check_single(name: bytes, has_it: bool) -> None:
    if has_it:
        raise LocalProtocolError(f"a request can have only one header {name!r}")


def _check_content_length(value: bytes, body: bytes | None) -> None:
    if not _CONTENT_LENGTH.fullmatch(value):
        raise LocalProtocolError(f"Content-Length must be a number of at most 20 digits, not {value!r}")
    if body is not None and int(value) != len(body):
        raise LocalProtocolError(f"Content-Length is {int(value)}, but the content is {len(body)} bytes long")


def split_absolute(target: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Split a target in absolute form (RFC 9112, 3.2.2).

    Returns:
        Scheme, authority without userinfo, and path and query as they are; None if it has another form.
    """
    absolute = None if target.startswith((b"/", b"*")) else _URL.match(target)
    if absolute is None or not absolute[1] or not absolute[2]:
        return None
    scheme, authority, path, query = absolute.groups()
    return scheme, authority.rpartition(b"@")[2], path + (query or b"")


def _host_header(request: Request) -> bytes:
    """The Host header's value (RFC 9112, 3.2): the authority of the target, where that has one."""
    url, target = request.url, request.url.target
    if request.method == b"CONNECT" and not target.startswith((b"/", b"*")) and b"/" not in target:
        return target
    absolute = split_absolute(target)
    if absolute is not None:
        return absolute[1]
    return authority_of(url)


def authority_of(url: URL) -> bytes:
    """Host and port of a URL as they are sent, the port only if it isn't the scheme's (RFC 9110, 4.2.3)."""
    if url.port is None or url.port == DEFAULT_PORTS.get(url.scheme):
        return bracketed(url.host)
    return b"%b:%d" % (bracketed(url.host), url.port)
