"""Real proxies on loopback, each in a folder of its own, and the ways through them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from trio_exchange import Proxy

from .process import Process, find, running

# The password has a colon, which is where careless code splits it.
USER = "user"
PASSWORD = "pass:word"
USERINFO = "user:pass%3Aword"
# tinyproxy can't have one.
PLAIN_PASSWORD = "password"
PLAIN_USERINFO = "user:password"

#: What the rules of squid and of tinyproxy forbid, and which port those of danted.
FORBIDDEN_HOST = "forbidden.test"
FORBIDDEN_PORT = 9

Running = contextlib.AbstractContextManager[Process]


def template(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


# -- The servers.


def running_squid() -> Running:
    """It listens for anybody, for who knows the password, and for anybody with TLS."""

    def command(port: int, *_: int) -> list[str]:
        # Its shared memory has the service's name.
        return [find("squid") or "squid", "-N", "-n", f"interop{port}", "-f", "squid.conf"]

    files = {name: template(name) for name in ("squid.conf", "squid-password.sh")}
    return running(command, scheme="http", files=files, ports=3, as_nobody=True)


def running_tinyproxy(*options: str) -> Running:
    """Options are lines of its configuration."""

    def command(_: int) -> list[str]:
        return [find("tinyproxy") or "tinyproxy", "-d", "-c", "tinyproxy.conf"]

    configuration = "\n".join((template("tinyproxy.conf"), *options))
    files = {"tinyproxy.conf": configuration, "forbidden": f"^{FORBIDDEN_HOST}$\n"}
    return running(command, scheme="http", files=files, as_nobody=True)


def running_danted() -> Running:
    """SOCKS4 and SOCKS5."""

    def command(_: int) -> list[str]:
        return [find("danted") or "danted", "-f", "danted.conf", "-p", "danted.pid"]

    return running(command, scheme="socks5", files={"danted.conf": template("danted.conf")}, as_nobody=True)


def running_microsocks(*options: str) -> Running:
    """SOCKS5."""

    def command(port: int) -> list[str]:
        return [find("microsocks") or "microsocks", "-i", "127.0.0.1", "-p", str(port), *options]

    return running(command, scheme="socks5", as_nobody=True)


def running_v2ray() -> Running:
    """SOCKS4, SOCKS4a and SOCKS5; on the second port SOCKS5 with a password.

    It agrees to everything at once, and dials then.
    """

    def command(*_: int) -> list[str]:
        return [find("v2ray") or "v2ray", "-config", "v2ray.json"]

    files = {"v2ray.json": template("v2ray.json")}
    return running(command, scheme="socks4a", files=files, ports=2, as_nobody=True)


def running_haproxy(backend: int) -> Running:
    """TLS before the proxy on a port of loopback; on the second port HTTP/2 too, with 25 streams at once."""

    def command(*_: int) -> list[str]:
        return [find("haproxy") or "haproxy", "-db", "-f", "haproxy.cfg"]

    files = {"haproxy.cfg": template("haproxy.cfg").replace("$backend", str(backend))}
    return running(command, files=files, ports=2, as_nobody=True)


def running_nghttpx_proxy(backend: int) -> Running:
    """HTTP/2, with 100 streams at once, and HTTP/1.1 with TLS before the proxy on a port of loopback."""

    def command(port: int) -> list[str]:
        program = [find("nghttpx") or "nghttpx", "--conf", "nghttpx.conf", "--http2-proxy"]
        return [*program, "-f", f"127.0.0.1,{port}", "-b", f"127.0.0.1,{backend}", "key.pem", "server.pem"]

    # More than 8 tunnels to the same host would otherwise wait for each other.
    configuration = "workers=1\nno-ocsp=yes\nbackend-connections-per-host=100\n"
    return running(command, files={"nghttpx.conf": configuration}, as_nobody=True)


# -- All of them.


class Servers:
    """Each server, started when it is first asked for.

    Args:
        stack: Ends them.
        require: Skips, or fails, where a program is missing.
    """

    def __init__(self, stack: contextlib.ExitStack, require: Callable[[str], None]) -> None:
        self._stack = stack
        self._require = require

    def _start(self, program: str, server: Callable[[], Running]) -> Process:
        self._require(program)
        return self._stack.enter_context(server())

    @cached_property
    def squid(self) -> Process:
        return self._start("squid", running_squid)

    @cached_property
    def tinyproxy(self) -> Process:
        return self._start("tinyproxy", running_tinyproxy)

    @cached_property
    def tinyproxy_password(self) -> Process:
        return self._start("tinyproxy", lambda: running_tinyproxy(f"BasicAuth {USER} {PLAIN_PASSWORD}"))

    @cached_property
    def danted(self) -> Process:
        return self._start("danted", running_danted)

    @cached_property
    def microsocks(self) -> Process:
        return self._start("microsocks", running_microsocks)

    @cached_property
    def microsocks_password(self) -> Process:
        return self._start("microsocks", lambda: running_microsocks("-u", USER, "-P", PASSWORD))

    @cached_property
    def v2ray(self) -> Process:
        return self._start("v2ray", running_v2ray)

    @cached_property
    def haproxy(self) -> Process:
        """Before squid's port with a password."""
        return self._start("haproxy", lambda: running_haproxy(self.squid.ports[1]))

    @cached_property
    def nghttpx(self) -> Process:
        """Before squid's port without a password."""
        return self._start("nghttpx", lambda: running_nghttpx_proxy(self.squid.port))


# -- The ways.


def proxy_at(server: Process, *, port: int = 1, **options: Any) -> Proxy:
    """The proxy on one of a server's ports, which are counted from 1."""
    scheme = options.pop("scheme", server.scheme)
    userinfo = options.pop("userinfo", None)
    authority = f"127.0.0.1:{server.ports[port - 1]}"
    if scheme == "https":
        options["ssl_context"] = server.client_ssl_context()
    return Proxy(f"{scheme}://{authority if userinfo is None else f'{userinfo}@{authority}'}", **options)


WAYS: dict[str, Callable[[Servers], Proxy]] = {
    "squid": lambda servers: proxy_at(servers.squid),
    "squid-password": lambda servers: proxy_at(servers.squid, port=2, userinfo=USERINFO),
    "squid-tls": lambda servers: proxy_at(servers.squid, port=3, scheme="https"),
    "tinyproxy": lambda servers: proxy_at(servers.tinyproxy),
    "tinyproxy-password": lambda servers: proxy_at(servers.tinyproxy_password, userinfo=PLAIN_USERINFO),
    "haproxy-tls": lambda servers: proxy_at(servers.haproxy, userinfo=USERINFO),
    "haproxy-http2": lambda servers: proxy_at(servers.haproxy, port=2, userinfo=USERINFO, http2=True),
    "nghttpx": lambda servers: proxy_at(servers.nghttpx),
    "nghttpx-http2": lambda servers: proxy_at(servers.nghttpx, http2=True),
    "danted-socks4": lambda servers: proxy_at(servers.danted, scheme="socks4"),
    "danted-socks5": lambda servers: proxy_at(servers.danted),
    "danted-socks5h": lambda servers: proxy_at(servers.danted, scheme="socks5h"),
    "microsocks": lambda servers: proxy_at(servers.microsocks),
    "microsocks-password": lambda servers: proxy_at(
        servers.microsocks_password, scheme="socks5h", userinfo=USERINFO
    ),
    "v2ray-socks4a": lambda servers: proxy_at(servers.v2ray),
    "v2ray-password": lambda servers: proxy_at(servers.v2ray, port=2, scheme="socks5", userinfo=USERINFO),
}

HTTP_WAYS = [name for name in WAYS if name.startswith(("squid", "tinyproxy", "haproxy", "nghttpx"))]
#: tinyproxy closes the connection after each response.
PERSISTENT_WAYS = [name for name in HTTP_WAYS if not name.startswith("tinyproxy")]
HTTP2_WAYS = [name for name in WAYS if name.endswith("http2")]
