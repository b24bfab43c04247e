"""HTTP proxies: tunnels by CONNECT, and requests that the proxy forwards.

Theory of operation. `TunnelDialer` is a `Dialer`: it returns a byte stream to a host and port, on which any
protocol may be spoken, including that of a further proxy.

The tunnel is the stream of a 2xx response to CONNECT (RFC 9110, section 9.3.6). CONNECT is sent by a
connection manager of the same class as the one that sends the pool's requests. Over HTTP/1.1 each tunnel
takes a connection of its own; over HTTP/2 tunnels share connections. These connections are not counted in the
pool's limit: each connection of the pool needs at most one of them, and a common limit could deadlock, with
tunnels waiting for connections that wait for tunnels.

A request to an `http` origin needs no tunnel if the last proxy speaks HTTP: it is *forwarded*, that is, sent
to the proxy itself with its target in absolute form (RFC 9112, section 3.2.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

import trio

from .._connect.attempt import Attempt
from .._connect.dialers import Dialer
from .._connect.factory import ConnectionFactory, ConnectionKey
from .._connect.transport import Transport
from .._connections.manager import Checkout, ConnectionManager
from .._exceptions import ExchangeError, ExchangeFailed, ProxyError
from .._fields import HeaderList
from .._http.connection import HTTPConnection
from .._http.request import PreparedRequest, RequestBody, RequestContext
from .._models import Proxy, Request, Response
from .._timeouts import Timeouts
from .._trace import span, tracer_for
from .._urls import authority_of, bracketed

#: Makes a connection manager, given the function that returns the factory for a key.
NewManager: TypeAlias = Callable[[Callable[[ConnectionKey], ConnectionFactory]], ConnectionManager]

# How many bytes of a refusal's body are kept, and for how many seconds they are waited for.
_MAX_REFUSAL_BODY = 64 * 1024
_BODY_GRACE = 2.0


class Forwarding:
    """How to send requests to a proxy that forwards them.

    Args:
        proxy: The proxy.
        factory: Makes the connections to it.

    Attributes:
        factory: As given.
        key: The key of the connections to the proxy, which requests to all origins share.
    """

    def __init__(self, proxy: Proxy, factory: ConnectionFactory) -> None:
        self.factory = factory
        self.key = ConnectionKey.for_proxy(proxy)
        self._headers = proxy.headers[:]

    def rewrite(self, prepared: PreparedRequest) -> PreparedRequest:
        """Copy a request, with an absolute target (RFC 9112, section 3.2.2) and the proxy's headers."""
        target = prepared.target
        if target.startswith(b"/"):
            target = self._origin_of(prepared) + target
        elif target == b"*":
            # An OPTIONS request for the whole server has no path (RFC 9112, section 3.2.4).
            target = self._origin_of(prepared)
        headers = merged(prepared.headers, self._headers) if self._headers else prepared.headers
        return prepared.replace(target=target, headers=headers)

    def _origin_of(self, prepared: PreparedRequest) -> bytes:
        url = prepared.request.url
        return b"%b://%b" % (url.scheme, authority_of(url))


def merged(headers: HeaderList, more: HeaderList) -> HeaderList:
    """Return `headers`, followed by those of `more` whose names are not in `headers`."""
    names = {name.lower() for name, _ in headers}
    return [*headers, *(pair for pair in more if pair[0].lower() not in names)]


class TunnelDialer(Dialer):
    """Connects through an HTTP proxy, by CONNECT.

    Args:
        proxy: The proxy.
            factory: Makes the connections to it.
        new_manager: Makes the manager of these connections.

    Attributes:
        manager: The manager of the connections to the proxy.
    """

    def __init__(self, proxy: Proxy, factory: ConnectionFactory, new_manager: NewManager) -> None:
        self._proxy = proxy
        self._key = ConnectionKey.for_proxy(proxy)
        self.manager: ConnectionManager = new_manager(lambda _: factory)

    async def connect(self, host: str, port: int, attempt: Attempt) -> Transport:
        """Open a tunnel through the proxy. Arguments and errors are those of `Dialer.connect`.

        Raises:
            ProxyError: The proxy refused, or violated HTTP.
        """
        target = b"%b:%d" % (bracketed(host.encode("ascii")), port)
        peer_name = target.decode("ascii") if self.proxy_name is None else self.proxy_name
        tunnel = _TunnelRequest(self._proxy, self._key, target, peer_name, attempt)
        checkout = Checkout(self._key, attempt.tracer, within=attempt)
        await self.manager.exchange(tunnel.context, checkout, tunnel.open)
        return tunnel.transport


class _TunnelRequest:
    """A CONNECT request, and the tunnel's stream once the proxy has opened it."""

    transport: Transport

    def __init__(
        self, proxy: Proxy, key: ConnectionKey, target: bytes, peer_name: str, attempt: Attempt
    ) -> None:
        request = Request("CONNECT", proxy.url, headers=proxy.headers, extensions={"target": target})
        # CONNECT can be repeated like an idempotent request: nothing was sent through the failed tunnel.
        prepared = PreparedRequest(request).replace(idempotent=True)
        # The whole request is one step for the handler, which must not be awaited while the time runs.
        self.context = RequestContext(
            prepared, RequestBody(request.stream), key, Timeouts(), tracer_for(request.extensions)
        )
        self._proxy = proxy
        self._attempt = attempt
        self._what = f"{peer_name} through the proxy {proxy.url.origin}"

    async def open(self, connection: HTTPConnection, _: RequestContext) -> Response:
        """Make the exchange."""
        budget = self._attempt.budget
        budget.spent_on = f"waiting for the proxy {self._proxy.url.origin}"
        info = {"proxy": self._proxy, "target": self.context.prepared.target, "timeout": budget.limit}
        asked = False
        try:
            async with span(self._attempt.tracer, "proxy.connect", info) as step:
                asked = True
                response = await budget.spend(self._ask, connection)
                if not 200 <= response.status < 300:
                    # It is final, however little time there is for its content.
                    raise await self._refusal(response, min(_BODY_GRACE, budget.remaining))
                self.transport = self._attempt.own(response.extensions["network_stream"])
                step.result = _head(response)
        except BaseException:
            if not asked:
                connection.decline()
            raise
        return response

    async def _ask(self, connection: HTTPConnection) -> Response:
        try:
            return await connection.exchange(self.context)
        except ExchangeFailed as exc:
            exc.error = self._no_tunnel(exc.error)
            raise
        except ExchangeError as exc:
            raise self._no_tunnel(exc) from exc

    def _no_tunnel(self, cause: ExchangeError) -> ProxyError:
        error = ProxyError(f"no tunnel to {self._what}: {cause}")
        error.__cause__ = cause
        return error

    async def _refusal(self, response: Response, seconds: float) -> ProxyError:
        try:
            body = await _beginning_of_body(response, seconds)
        finally:
            await response.aclose()
        extensions: dict[str, Any] = {
            name: response.extensions[name]
            for name in ("http_version", "reason_phrase", "stream_id")
            if name in response.extensions
        }
        kept = Response(response.status, headers=response.headers, content=body, extensions=extensions)
        await kept.aread()
        reason = extensions.get("reason_phrase", b"").decode("latin-1")
        return ProxyError(f"no tunnel to {self._what}: {response.status} {reason}".rstrip(), response=kept)


async def _beginning_of_body(response: Response, seconds: float) -> bytes:
    """Return the beginning of a refusal's body, as much as arrives within `seconds`."""
    body = b""
    with trio.move_on_after(seconds), contextlib.suppress(ExchangeError):
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) >= _MAX_REFUSAL_BODY:
                break
    return body[:_MAX_REFUSAL_BODY]


def _head(response: Response) -> Any:
    """Return the result of the trace event `proxy.connect`: the head of the response."""
    extensions = response.extensions
    return (
        extensions["http_version"],
        response.status,
        extensions.get("reason_phrase", b""),
        response.headers,
    )
