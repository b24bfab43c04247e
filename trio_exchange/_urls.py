"""URLs and origins: parsing, encoding of host names, and error messages that reveal no credentials.

A URL is parsed by the regular expression of RFC 3986, appendix B. The scheme, host and port, which decide
where a request goes, are checked and normalized here. The path and query are kept as they are, and are
checked only when they are about to be sent. A URL with an `@` may have a password anywhere before it, also
where the URL is malformed; so no error message shows any part of such a URL (`unless_secret`).
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import re
from typing import Any, NamedTuple

import idna

from ._exceptions import InvalidURL
from ._fields import to_bytes

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

# RFC 3986, appendix B, with the syntax of schemes (section 3.1) and without the fragment.
_URL = re.compile(rb"(?:([A-Za-z][A-Za-z0-9+.-]*):)?(?://([^/?#]*))?([^?#]*)(\?[^#]*)?", re.DOTALL)
_AUTHORITY = re.compile(rb"(?:(.*)@)?(\[[^\[\]@]*\]|[^:\[\]@]*)(?::([0-9]*))?", re.DOTALL)
_NOT_IN_URL = re.compile(rb"[\x00-\x20\x7f]")
_BRACKETED = re.compile(rb"\[(.*)\]", re.DOTALL)
_URL_TEXT = re.compile(_URL.pattern.decode(), re.DOTALL)
# An `@`, also percent-encoded, and the characters that IDNA maps to it.
_AT = re.compile("[@\ufe6b\uff20]|%(?:25)*40")
# RFC 3986, section 3.2.2, without percent-encoding, which neither resolvers nor certificates support.
_NAME = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=-]*")


# Visible ASCII without `#`: a fragment is never sent (RFC 9110, section 7.1).
TARGET = re.compile(rb"[\x21\x22\x24-\x7e]+")


class Origin:
    """An origin: scheme, host and port (RFC 9110, section 4.3.1).

    Attributes:
        scheme: Such as `b"https"`.
        host: Name or address, without brackets.
        port: Port number; the scheme's default if the URL has none.
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
    """Return the origin with the same port and TLS, None if it has TLS already."""
    scheme = _WITH_TLS.get(origin.scheme)
    return None if scheme is None else Origin(scheme, origin.host, origin.port)


def without_tls(origin: Origin) -> Origin | None:
    """Return the origin with the same port and without TLS, None if it has no TLS already."""
    scheme = _WITHOUT_TLS.get(origin.scheme)
    return None if scheme is None else Origin(scheme, origin.host, origin.port)


class URL:
    """A URL, split into the parts that a request needs (RFC 3986).

    It is made from a whole URL, `URL("https://www.example.com/path?query")`, or from its parts,
    `URL(scheme=b"https", host=b"www.example.com", port=443, target=b"/path?query")`.

    A fragment is dropped, since it is never sent. A host name that is not ASCII is encoded by IDNA. An IPv6
    address needs brackets in a whole URL, and may have them as a part. It may have a zone identifier
    (RFC 6874), which is used to connect and never sent.

    Args:
        url: The whole URL, str or bytes; then no other argument may be given.
        scheme: Such as `b"https"`; converted to lower case.
        host: Host name or address; converted to lower case.
        port: 1 to 65535; None for the scheme's default.
        target: Path and query, sent as they are; `b"/"` if empty.

    Attributes:
        scheme: bytes, empty if the URL has none.
        host: bytes, without brackets, empty if the URL has none.
        port: int; None if the URL has none.
        target: bytes, path and query.

    `str(url)` returns the whole URL, and `repr(url)` an expression that makes an equal one.

    Raises:
        TypeError: A part is neither bytes nor str, or both a whole URL and parts are given.
        InvalidURL: The port is not a number from 1 to 65535, the authority can't be parsed, the scheme or
            authority contains white space or control characters, or text outside the host name is not
            ASCII. A URL with userinfo (credentials before an `@`) is refused too, since they would never
            be sent: send them in an Authorization header.
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
            userinfo, self.scheme, self.host, self.port, self.target = parse_url(url)
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
        """The URL's origin, with the scheme's default port if the URL has none."""
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
        # Separates a target such as `*` from the host, of which it would seem to be a part.
        space = b" " if self.host and not self.target.startswith(b"/") else b""
        return (scheme + host + port + space + self.target).decode("latin-1")

    def __repr__(self) -> str:
        whole = str(self)
        with contextlib.suppress(InvalidURL):
            if URL(whole) == self:
                return f"URL({whole!r})"
        return f"URL(scheme={self.scheme!r}, host={self.host!r}, port={self.port!r}, target={self.target!r})"


class ParsedURL(NamedTuple):
    """The parts of a URL, and its userinfo, which only a proxy's URL may have."""

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
    """Return `text`, a part of an error message that shows a part of `url`; empty if `url` has an `@`.

    In a malformed URL it is unknown where each part was meant to begin, so that anything before an `@` may
    be a password.
    """
    given = url if isinstance(url, str) else url.decode("utf-8", "replace")
    return "" if _AT.search(given) else text


def scheme_hint(url: URL) -> str:
    """Return a hint for an error message if a URL seems to lack its scheme, such as `localhost:8080/`."""
    whole = str(url).removeprefix("//")
    if whole.startswith("/") or (url.scheme and (url.host or not url.target[:1].isdigit())):
        return ""
    return unless_secret(f"; did you mean 'http://{whole}'?", whole)


def parse_url(url: bytes | str) -> ParsedURL:
    """Split a whole URL into its parts, and check them.

    Raises:
        TypeError: The URL is neither bytes nor str.
        InvalidURL: See `URL`; userinfo is allowed here.
    """
    text = _url_to_bytes(url)
    # The cache keeps neither credentials nor long URLs.
    return _parse_new_url(text) if b"@" in text or len(text) > 1024 else _parse_known_url(text)


@functools.lru_cache(maxsize=512)
def _parse_known_url(url: bytes) -> ParsedURL:
    return _parse_new_url(url)


def _parse_new_url(url: bytes) -> ParsedURL:
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
        or (scheme and scheme.lower() in _PORTS and authority and TARGET.fullmatch(target))
    ):
        # The fragment with the `@` is dropped below, and later error messages would show the rest of the URL.
        raise InvalidURL("the URL can't be requested, and may have a password before its '@'")
    if authority is None:
        return ParsedURL(None, (scheme or b"").lower(), b"", None, target)
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise _bad_authority(authority, url)
    userinfo, host, port = parts.groups()
    return ParsedURL(
        userinfo,
        (scheme or b"").lower(),
        _to_host(host, url),
        _parse_port(port, url) if port else None,
        target,
    )


def _url_to_bytes(url: bytes | str) -> bytes:
    """Encode a whole URL to bytes, its host name by IDNA; the other parts must be ASCII."""
    if not isinstance(url, str) or url.isascii():
        return to_bytes("url", url)
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
    return to_bytes(name, value)


def _bad_authority(authority: bytes | str, url: bytes | str) -> InvalidURL:
    shown = unless_secret(f", not {authority!r}", url)
    colon: Any = b":" if isinstance(authority, bytes) else ":"
    hint = "; an IPv6 address needs brackets, such as [::1]" if authority.count(colon) > 1 else ""
    return InvalidURL(f"the URL's authority must be HOST or HOST:PORT{shown}{hint}")


def _not_ascii(name: str, part: str, url: str) -> InvalidURL:
    """Make the error for a part of a URL, called `name`, that has other characters than ASCII."""
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
    # Raised without its cause, which would show what is before the `@`.
    raise InvalidURL("what the URL has for a host is not a host name")


def _to_host(host: bytes | str, url: bytes | str) -> bytes:
    """Check a host, and convert it to its form in `URL.host`.

    Args:
        host: The host, with brackets or without.
        url: The URL that it is from, to decide whether error messages may show the host.

    Raises:
        InvalidURL: It is neither a host name nor an address.
    """
    if isinstance(host, str) and not host.isascii():
        return _encode_idna(host, host)
    raw = to_bytes("host", host)
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
    # int() raises ValueError above 4300 digits.
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
    """Return a host in the form it has in an authority: an IPv6 address in brackets and without its zone."""
    if b":" in host:
        return b"[%b]" % host.partition(b"%")[0]
    return host


def to_url(url: Any) -> URL:
    """Parse a caller's URL.

    Raises:
        TypeError: It is neither bytes nor str.
        InvalidURL: See `URL`.
    """
    if not isinstance(url, (bytes, str)):
        raise TypeError(f"url must be a URL, bytes or str, but got {type(url).__name__}")
    return URL(url)


def split_absolute(target: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Split a target in absolute form (RFC 9112, section 3.2.2).

    Returns:
        The scheme, the authority without userinfo, and the path and query unchanged; None if the target is
        in another form.
    """
    absolute = None if target.startswith((b"/", b"*")) else _URL.match(target)
    if absolute is None or not absolute[1] or not absolute[2]:
        return None
    scheme, authority, path, query = absolute.groups()
    return scheme, authority.rpartition(b"@")[2], path + (query or b"")


def authority_of(url: URL) -> bytes:
    """Return the host, and the port unless it is the scheme's default (RFC 9110, section 4.2.3)."""
    return _authority(url.scheme, url.host, url.port)


@functools.lru_cache(maxsize=512)
def _authority(scheme: bytes, host: bytes, port: int | None) -> bytes:
    if port is None or port == DEFAULT_PORTS.get(scheme):
        return bracketed(host)
    return b"%b:%d" % (bracketed(host), port)
