"""TODO _proxies.chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._connect.dialers import Dialer
from .._connect.factory import ConnectionFactory
from .._connections.manager import ConnectionManager
from .._models import Proxy
from .http import Forwarding, NewManager, TunnelDialer


@dataclass(frozen=True)
class Chain:
    """A pool's proxies.

    Attributes:
        way: Through all of them.
        forwarding: To the last, if it forwards requests.
        dispatchers: Of the connections to proxies, the last proxy's first.
    """

    dialer: Dialer
    forwarding: Forwarding | None
    managers: list[ConnectionManager]


def chain(proxies: Sequence[Proxy], direct: Dialer, new_manager: NewManager) -> Chain:
    """Build the way through proxies, first hop first.

    Raises:
        ImportError: A proxy needs socksio, which is not installed.
    """
    result = Chain(direct, None, [])
    for proxy in proxies:
        result = _with_hop(result, proxy, new_manager)
    return result


def _with_hop(before: Chain, proxy: Proxy, new_manager: NewManager) -> Chain:
    before.dialer.proxy_name = f"the proxy {proxy.url.origin}"
    if proxy.url.scheme.startswith(b"socks"):
        return Chain(_socks(before.dialer, proxy), None, before.managers)
    factory = ConnectionFactory(
        before.dialer, proxy.ssl_context, http2=proxy.http2, tls_trace_point="proxy.start_tls"
    )
    tunnels = TunnelDialer(proxy, factory, new_manager)
    return Chain(tunnels, Forwarding(proxy, factory), [tunnels.manager, *before.managers])


def _socks(dialer: Dialer, proxy: Proxy) -> Dialer:
    try:
        from .socks import SOCKSDialer
    except ImportError as exc:
        raise ImportError(
            "a SOCKS proxy needs the socksio package: pip install 'trio-exchange[socks]'", name=exc.name
        ) from exc
    return SOCKSDialer(dialer, proxy)
