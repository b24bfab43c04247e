"""Building the dialer of a pool from the sequence of its proxies.

Each proxy in the sequence is reached through those before it. Only the last one can forward requests: the
others just connect to the next proxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._connect.dialers import Dialer
from .._connect.factory import ConnectionFactory
from .._connect.tls_sessions import TLSSessions
from .._connections.manager import ConnectionManager
from .._connections.protocols import import_protocols
from .._models import Proxy
from .http import Forwarding, NewManager, TunnelDialer


@dataclass(frozen=True)
class Chain:
    """What a pool needs to use its proxies.

    Attributes:
        dialer: Connects through all of them.
        forwarding: How to send requests to the last proxy, None if it does not forward.
        managers: The managers of the connections to HTTP proxies, that of the last proxy first.
    """

    dialer: Dialer
    forwarding: Forwarding | None
    managers: list[ConnectionManager]


def chain(
    proxies: Sequence[Proxy], direct_dialer: Dialer, new_manager: NewManager, sessions: TLSSessions | None
) -> Chain:
    """Build the dialer that connects through proxies.

    Args:
        proxies: The proxies, the first hop first.
        direct_dialer: Connects to the first proxy, or to origins if there is none.
        new_manager: Makes the manager of the connections to an HTTP proxy.
        sessions: The TLS sessions to resume with proxies; None to resume none.

    Raises:
        ImportError: There is a SOCKS proxy, and socksio is not installed.
    """
    result = Chain(direct_dialer, None, [])
    for proxy in proxies:
        result = _add_hop(result, proxy, new_manager, sessions)
    return result


def _add_hop(before: Chain, proxy: Proxy, new_manager: NewManager, sessions: TLSSessions | None) -> Chain:
    before.dialer.proxy_name = f"the proxy {proxy.url.origin}"
    if proxy.url.scheme.startswith(b"socks"):
        return Chain(_socks_dialer(before.dialer, proxy), None, before.managers)
    factory = ConnectionFactory(
        before.dialer,
        proxy.ssl_context,
        http2=proxy.http2,
        tls_trace_point="proxy.start_tls",
        sessions=sessions,
    )
    import_protocols(factory)
    tunnels = TunnelDialer(proxy, factory, new_manager)
    return Chain(tunnels, Forwarding(proxy, factory), [tunnels.manager, *before.managers])


def _socks_dialer(dialer: Dialer, proxy: Proxy) -> Dialer:
    try:
        from .socks import SOCKSDialer
    except ImportError as exc:
        raise ImportError(
            "a SOCKS proxy needs the socksio package: pip install 'trio-exchange[socks]'", name=exc.name
        ) from exc
    return SOCKSDialer(dialer, proxy)
