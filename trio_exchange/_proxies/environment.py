"""The proxy for a URL from environment variables: `http_proxy`, `https_proxy`, `all_proxy`, `no_proxy`.

No standard defines these variables. This module follows the behaviour that most programs share. Where they
differ, it follows `urllib.request` for the choice of the variable, and accepts in `no_proxy` every form of
entry that any of them accepts.

A pool reads no environment variables: only a program that calls `proxy_from_environment` uses them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re

from .._exceptions import InvalidURL, LocalProtocolError
from .._models import Proxy
from .._urls import URL

_VARIABLES = {b"http": "http_proxy", b"ws": "http_proxy", b"https": "https_proxy", b"wss": "https_proxy"}

# Only a bracketed IPv6 address can have a port; the colons of any other are part of the address.
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]*\]|[^:]*):([0-9]{1,5})")
_BRACKETS = re.compile(r"[\[\]]")
_ALL_OF_DOMAIN = re.compile(r"^\*?\.")


def proxy_from_environment(url: URL | bytes | str) -> Proxy | None:
    """Return the proxy that the environment variables name for a URL.

    The variable is `http_proxy` for http and ws URLs, and `https_proxy` for https and wss URLs; if it is
    unset or empty, `all_proxy`. A value without a scheme is the address of an http proxy.

    Variable names may also be in upper case. The lower-case variable takes precedence, even if it is empty,
    which cancels the other. HTTP_PROXY is ignored in a CGI program (REQUEST_METHOD is set), since the client
    can set it there by the header `Proxy`.

    `no_proxy` lists the hosts to connect to directly, separated by commas or white space:

    - `example.com`, `.example.com` or `*.example.com`: this host and all its subdomains;
    - `192.0.2.1`, `2001:db8::1` or `[2001:db8::1]`: URLs with this address, in any spelling; names are not
      resolved;
    - `192.0.2.0/24` or `2001:db8::/32`: URLs with an address in this network;
    - `example.com:8080`, `192.0.2.1:8080` or `[2001:db8::1]:8080`: the same, at this port only;
    - `*`: all hosts.

    Case, a trailing dot and the zone of an IPv6 address are ignored. An entry in any other form is ignored.

    Args:
        url: The URL to be requested.

    Returns:
        The proxy; None if the environment names none, or if the URL has another scheme than these four.

    Raises:
        TypeError, InvalidURL: `url` is not a URL, see `URL`.
        InvalidURL: The variable's value is not the URL of a proxy, or is one that `Proxy` refuses. A `socks:`
            URL is refused, since programs disagree whether it means version 4 or 5.
    """
    if not isinstance(url, URL):
        url = URL(url)
    variable = _VARIABLES.get(url.scheme)
    if variable is None:
        return None
    for name, value in (_lookup(variable), _lookup("all_proxy")):
        if value:
            return None if _is_exempt(url) else _to_proxy(name, value)
    return None


def _lookup(name: str) -> tuple[str, str]:
    """Return the variable's name as spelled in the environment, and its value, empty if it is unset."""
    # A plain dict: on Windows os.environ ignores case, and would return HTTP_PROXY for http_proxy.
    environ = dict(os.environ)
    if name not in environ and not (name == "http_proxy" and "REQUEST_METHOD" in environ):
        name = name.upper()
    return name, environ.get(name, "").strip()


def _to_proxy(name: str, value: str) -> Proxy:
    proxy: Proxy | None = None
    with contextlib.suppress(TypeError, ValueError, LocalProtocolError):
        proxy = Proxy(value if "://" in value else f"http://{value}")
    if proxy is None:
        # Neither the value nor the error about it is shown: the value may contain credentials anywhere.
        raise InvalidURL(
            f"the environment variable {name} must be a proxy's URL, [SCHEME://][USER:PASSWORD@]HOST[:PORT], "
            "with the scheme http, https, socks4, socks4a, socks5 or socks5h, and credentials that fit it"
        )
    return proxy


def _is_exempt(url: URL) -> bool:
    _, entries = _lookup("no_proxy")
    return any(_covers(entry, url) for entry in re.split(r"[,\s]+", entries))


def _covers(entry: str, url: URL) -> bool:
    if entry == "*":
        return True
    if with_port := _HOST_AND_PORT.fullmatch(entry):
        entry = with_port[1]
        if int(with_port[2]) != url.origin.port:
            return False
    entry = entry.removesuffix(".")
    host = url.host.decode("ascii").removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _covers_name(entry, host)
    return _covers_address(entry, address)


def _covers_address(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        # This comparison ignores zones.
        return address in ipaddress.ip_network(_BRACKETS.sub("", entry), strict=False)
    except ValueError:
        return False


def _covers_name(entry: str, host: str) -> bool:
    domain = _ALL_OF_DOMAIN.sub("", entry)
    if not domain.isascii():
        try:
            domain = URL(host=domain).host.decode("ascii")
        except ValueError:
            return False
    return domain != "" and f".{host}".endswith(f".{domain.lower()}")
