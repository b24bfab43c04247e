"""The proxy that the environment names for a URL, by the conventions of `http_proxy` and `no_proxy`.

No standard says what these variables mean. This follows what most programs agree on; where they differ,
it follows `urllib.request` in which variable counts, and is as generous as any in what `no_proxy` may list.

It is for callers who want it: a pool reads no environment.
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

# An IPv6 address has a port only after brackets, and is otherwise left whole.
_HOST_AND_PORT = re.compile(r"(\[[^\[\]]*\]|[^:]*):([0-9]{1,5})")
_BRACKETS = re.compile(r"[\[\]]")
_ALL_OF_DOMAIN = re.compile(r"^\*?\.")


def proxy_from_environment(url: URL | bytes | str) -> Proxy | None:
    """The proxy that the environment names for a URL.

    It is the value of `http_proxy` for http and ws URLs, of `https_proxy` for https and wss, and of
    `all_proxy` where that is not set or empty. Without a scheme of its own, it is that of an http proxy.

    All variables may be in upper case too. One in lower case goes before, even if it is empty, which
    undoes the other. HTTP_PROXY is ignored in a CGI program (where REQUEST_METHOD is set): there it is
    a header sent by the client.

    `no_proxy` lists hosts that are reached directly, separated by commas or white space:

    - `example.com`, `.example.com` or `*.example.com`: the host of that name and all its subdomains;
    - `192.0.2.1`, `2001:db8::1` or `[2001:db8::1]`: the host whose address that is in the URL,
      however it is spelled; names are not resolved;
    - `192.0.2.0/24` or `2001:db8::/32`: the hosts with such an address in the URL;
    - `example.com:8080`, `192.0.2.1:8080` or `[2001:db8::1]:8080`: the same, at that port alone;
    - `*`: all hosts.

    Case, a dot at the end, and an IPv6 address's zone don't matter. What is none of these is ignored.

    Args:
        url: What will be requested.

    Returns:
        The proxy, or None where the environment names none: also for schemes other than these four,
        which a pool refuses.

    Raises:
        TypeError, InvalidURL: It is not a URL, see `URL`.
        InvalidURL: The variable's value is not a proxy's URL, or is one that `Proxy` refuses.
            So is `socks:`, which some take for version 4, others for 5.
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
    """The variable's name as it is spelled in the environment, and its value, empty if there is none."""
    # Windows' own mapping finds a name in any case, and would find HTTP_PROXY for http_proxy.
    environ = dict(os.environ)
    if name not in environ and not (name == "http_proxy" and "REQUEST_METHOD" in environ):
        name = name.upper()
    return name, environ.get(name, "").strip()


def _to_proxy(name: str, value: str) -> Proxy:
    proxy: Proxy | None = None
    with contextlib.suppress(TypeError, ValueError, LocalProtocolError):
        proxy = Proxy(value if "://" in value else f"http://{value}")
    if proxy is None:
        # Neither the value nor an error about it is shown, as credentials may be anywhere in it.
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
        # Zones don't count in this comparison.
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
