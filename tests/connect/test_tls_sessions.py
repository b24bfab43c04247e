"""TLS sessions that new connections resume, and those that they must not."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from tests.harness.certificates import (
    alpn_server,
    client_context,
    demanding_context,
    make_tls,
    new_tls,
)
from tests.harness.checks import assert_unharmed
from tests.harness.peers import respond
from tests.harness.proxies import proxy_tls
from tests.harness.servers import serve_tcp
from tests.harness.streams import socket_streams
from trio_exchange import ConnectError, ConnectionPool, Proxy, RemoteProtocolError, Response
from trio_exchange._connect import tls_sessions
from trio_exchange._connect.tls_sessions import Resumption, TLSSessions
from trio_exchange.testing import ScriptedPeer

VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
ONE_REQUEST_EACH: dict[str, Any] = {"max_keepalive_connections": 0}


@pytest.fixture(autouse=True)
def no_sessions_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget how many sessions other tests of this process have read."""
    monkeypatch.setattr(TLSSessions, "leaked", 0)


def new_server(*names: str, ca: trustme.CA | None = None) -> ssl.SSLContext:
    """A server with session tickets of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (ca or make_tls().ca).issue_cert(*(names or ("127.0.0.1", "localhost", "example.com"))).configure_cert(
        context
    )
    return context


def new_client() -> ssl.SSLContext:
    return client_context(make_tls().ca)


def tls_of(response: Response) -> ssl.SSLObject:
    tls = response.extensions["network_stream"].get_extra_info("ssl_object")
    assert isinstance(tls, ssl.SSLObject)
    return tls


async def until_all_closed(pool: ConnectionPool) -> None:
    while pool.connections:
        await trio.testing.wait_all_tasks_blocked()


async def resumed(pool: ConnectionPool, url: str, name: str | None = None) -> bool | None:
    """Send a request on a new connection, and return whether that has resumed a session."""
    await until_all_closed(pool)
    extensions = {} if name is None else {"sni_hostname": name}
    response = await pool.request("GET", url, extensions=extensions)
    assert response.status == 200
    return tls_of(response).session_reused


# -- When a session is resumed.


@VERSIONS
async def test_new_connections_resume_the_session(nursery: trio.Nursery, version: ssl.TLSVersion) -> None:
    context = new_server()
    context.maximum_version = version
    server = await serve_tcp(nursery, respond, tls=context)
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(4)] == [False, True, True, True]
        response = await pool.request("GET", server.url)
    assert tls_of(response).version() == version.name.replace("_", ".")
    # The certificate of the full handshake is still there.
    assert tls_of(response).getpeercert()


@VERSIONS
async def test_the_option_turns_it_off(nursery: trio.Nursery, version: ssl.TLSVersion) -> None:
    context = new_server()
    context.maximum_version = version
    server = await serve_tcp(nursery, respond, tls=context)
    async with ConnectionPool(new_client(), tls_session_resumption=False, **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(3)] == [False, False, False]


def test_the_option_is_a_bool() -> None:
    wrong: Any = 1
    with pytest.raises(TypeError, match="tls_session_resumption must be True or False, not 1"):
        ConnectionPool(tls_session_resumption=wrong)


async def test_a_session_of_a_server_without_tickets(nursery: trio.Nursery) -> None:
    context = new_server()
    context.num_tickets = 0
    server = await serve_tcp(nursery, respond, tls=context)
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(2)] == [False, False]


async def test_connections_that_open_at_once_keep_one_session(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, respond, tls=new_server())
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        async with trio.open_nursery() as requests:
            for _ in range(5):
                requests.start_soon(pool.request, "GET", server.url)
        assert len(sessions_of(pool)) == 1
        assert await resumed(pool, server.url)


def sessions_of(pool: ConnectionPool) -> TLSSessions:
    internal: Any = pool
    sessions = internal._origins.sessions
    assert isinstance(sessions, TLSSessions)
    return sessions


# -- Whom a session is for.


async def handshake_as(
    name: str, client: ssl.SSLContext, server: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> Any:
    """Do a handshake without this library, receive a byte, and return the client's `ssl.SSLObject`."""
    near, far = socket_streams()
    with near.socket, far.socket:
        tls: Any = trio.SSLStream(near, client, server_hostname=name)
        peer = trio.SSLStream(far, server, server_side=True)
        if session is not None:
            tls.session = session
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tls.do_handshake)
            await peer.send_all(b"x")
        assert await tls.receive_some(1) == b"x"
        return tls._ssl_object


@VERSIONS
async def test_openssl_verifies_no_name_when_it_resumes(version: ssl.TLSVersion) -> None:
    """Why sessions are never shared between names."""
    client, server = new_client(), new_server("example.com")
    server.maximum_version = version
    first = await handshake_as("example.com", client, server)
    with pytest.raises(BaseExceptionGroup):
        await handshake_as("wrong.example", client, server)
    resumed = await handshake_as("wrong.example", client, server, first.session)
    assert resumed.session_reused


@VERSIONS
async def test_a_session_is_not_shared_between_names(nursery: trio.Nursery, version: ssl.TLSVersion) -> None:
    context = new_server("127.0.0.1", "example.com")
    context.maximum_version = version
    server = await serve_tcp(nursery, respond, tls=context)
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert not await resumed(pool, server.url)
        assert not await resumed(pool, server.url, "example.com")
        assert await resumed(pool, server.url, "example.com")
        for _ in range(2):
            with pytest.raises(ConnectError, match=r"certificate of wrong\.example could not be verified"):
                await resumed(pool, server.url, "wrong.example")
        assert await resumed(pool, server.url)
        await until_all_closed(pool)
        assert_unharmed(pool)


async def test_a_session_is_not_shared_between_ports(nursery: trio.Nursery) -> None:
    context = new_server()
    one = await serve_tcp(nursery, respond, tls=context)
    other = await serve_tcp(nursery, respond, tls=context)
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for server in (one, other)] == [False, False]
        assert [await resumed(pool, server.url) for server in (one, other)] == [True, True]


@VERSIONS
async def test_a_session_is_not_shared_between_client_certificates(
    nursery: trio.Nursery, version: ssl.TLSVersion
) -> None:
    ca = make_tls().ca
    context = demanding_context(ca, "127.0.0.1")
    context.maximum_version = version
    seen: list[Any] = []

    async def serve(peer: ScriptedPeer) -> None:
        async for _ in peer:
            stream: Any = peer.stream
            seen.append(stream.getpeercert()["subjectAltName"][0][1])
            await peer.send_response(200)

    server = await serve_tcp(nursery, serve, tls=context)
    clients = {}
    for name in ("alice.example", "bob.example"):
        clients[name] = new_client()
        ca.issue_cert(name).configure_cert(clients[name])
    for name in ("alice.example", "bob.example", "alice.example"):
        async with ConnectionPool(clients[name], **ONE_REQUEST_EACH) as pool:
            assert not await resumed(pool, server.url)
    assert seen == ["alice.example", "bob.example", "alice.example"]


@VERSIONS
async def test_a_session_without_verification_is_no_excuse_for_one_with(
    nursery: trio.Nursery, version: ssl.TLSVersion
) -> None:
    stranger = new_tls("127.0.0.1")
    stranger.server.maximum_version = version
    server = await serve_tcp(nursery, respond, tls=stranger.server)
    context = new_client()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with ConnectionPool(context, **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(2)] == [False, True]
        context.verify_mode, context.check_hostname = ssl.CERT_REQUIRED, True
        with pytest.raises(ConnectError, match="could not be verified"):
            await resumed(pool, server.url)


async def test_the_name_is_verified_once_names_are_checked(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, respond, tls=new_server("other.example"))
    context = new_client()
    context.check_hostname = False
    async with ConnectionPool(context, **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(2)] == [False, True]
        context.check_hostname = True
        with pytest.raises(ConnectError, match="could not be verified"):
            await resumed(pool, server.url)


class VerifyingContext(ssl.SSLContext):
    """Stands for a context that verifies the peer itself, as that of the truststore package does."""


async def test_a_derived_context_gets_full_handshakes(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, respond, tls=new_server())
    context = VerifyingContext(ssl.PROTOCOL_TLS_CLIENT)
    make_tls().ca.configure_trust(context)
    async with ConnectionPool(context, **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(2)] == [False, False]


async def test_contexts_and_offers_have_sessions_of_their_own() -> None:
    client = new_client()
    tls = await handshake_as("example.com", client, new_server())
    sessions = TLSSessions()
    Resumption(sessions, "peer", client, ("http/1.1",)).succeeded(tls)
    assert Resumption(sessions, "peer", client, ("http/1.1",)).offered is not None
    assert Resumption(sessions, "peer", client, ("h2",)).offered is None
    assert Resumption(sessions, "other peer", client, ("http/1.1",)).offered is None
    assert Resumption(sessions, "peer", new_client(), ("http/1.1",)).offered is None


async def test_a_proxy_and_origins_have_sessions_of_their_own(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_head()
        await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        await peer.start_tls(origin_tls)
        await respond(peer)

    origin_tls = new_server()
    proxy_context = new_server("127.0.0.1", ca=proxy_tls().ca)
    server = await serve_tcp(nursery, serve, tls=proxy_context)
    proxy = Proxy(server.url, ssl_context=client_context(proxy_tls().ca))
    reused: list[tuple[str, bool]] = []

    async def trace(name: str, info: dict[str, Any]) -> None:
        if name.endswith("start_tls.complete"):
            tls = info["return_value"].get_extra_info("ssl_object")
            reused.append((name.split(".")[0], tls.session_reused))

    async with ConnectionPool(new_client(), proxy=proxy, **ONE_REQUEST_EACH) as pool:
        for _ in range(2):
            await pool.request("GET", "https://example.com/", extensions={"trace": trace})
    assert reused == [("proxy", False), ("connection", False), ("proxy", True), ("connection", True)]


async def test_http2(nursery: trio.Nursery) -> None:
    server = await serve_tcp(nursery, respond, tls=alpn_server("http/1.1"))
    async with ConnectionPool(new_client(), http2=True, **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(2)] == [False, True]


# -- When a session is forgotten.


async def serve_in_turn(nursery: trio.Nursery, *scripts: Callable[[ScriptedPeer], Awaitable[None]]) -> Any:
    """A server that plays another script on each connection, beneath TLS."""
    left = iter(scripts)

    async def serve(peer: ScriptedPeer) -> None:
        await next(left)(peer)

    server = await serve_tcp(nursery, serve)
    return server.url.replace("http", "https")


def with_tls(
    context: ssl.SSLContext, script: Callable[[ScriptedPeer], Awaitable[None]] = respond
) -> Callable[[ScriptedPeer], Awaitable[None]]:
    async def play(peer: ScriptedPeer) -> None:
        await peer.start_tls(context)
        await script(peer)

    return play


async def hang_up(peer: ScriptedPeer) -> None:
    await peer.receive_some()


@VERSIONS
async def test_a_failed_handshake_forgets_the_session(nursery: trio.Nursery, version: ssl.TLSVersion) -> None:
    context = new_server()
    context.maximum_version = version
    server = with_tls(context)
    url = await serve_in_turn(nursery, server, server, hang_up, server, server)
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, url) for _ in range(2)] == [False, True]
        with pytest.raises(ConnectError):
            await resumed(pool, url)
        assert [await resumed(pool, url) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("resumption", [True, False])
async def test_a_failed_handshake_without_a_session(nursery: trio.Nursery, resumption: bool) -> None:
    server = with_tls(new_server())
    url = await serve_in_turn(nursery, hang_up, server, server)
    async with ConnectionPool(new_client(), tls_session_resumption=resumption, **ONE_REQUEST_EACH) as pool:
        with pytest.raises(ConnectError):
            await resumed(pool, url)
        assert [await resumed(pool, url) for _ in range(2)] == [False, resumption]


async def test_a_connection_that_ends_without_data_forgets_the_session(nursery: trio.Nursery) -> None:
    context = new_server()
    server, refusing = with_tls(context), with_tls(context, hang_up)
    url = await serve_in_turn(nursery, server, refusing, server, server)
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert not await resumed(pool, url)
        with pytest.raises(RemoteProtocolError, match="without sending a response"):
            await pool.request("POST", url, content=b"x")
        assert [await resumed(pool, url) for _ in range(2)] == [False, True]


@VERSIONS
async def test_a_refused_session_is_replaced(nursery: trio.Nursery, version: ssl.TLSVersion) -> None:
    contexts = [new_server(), new_server()]
    for context in contexts:
        context.maximum_version = version
    before, after = (with_tls(context) for context in contexts)
    url = await serve_in_turn(nursery, before, before, after, after)
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, url) for _ in range(4)] == [False, True, False, True]


async def test_after_ten_minutes_the_certificate_is_verified_again(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("trio_exchange._connect.tls_sessions.time.monotonic", lambda: now)
    server = await serve_tcp(nursery, respond, tls=new_server())
    async with ConnectionPool(new_client(), **ONE_REQUEST_EACH) as pool:
        assert [await resumed(pool, server.url) for _ in range(2)] == [False, True]
        now += 599
        # The ticket that it brings does not prolong the session.
        assert await resumed(pool, server.url)
        now += 1
        assert [await resumed(pool, server.url) for _ in range(2)] == [False, True]


async def test_the_number_of_sessions_is_bounded() -> None:
    client = new_client()
    tls = await handshake_as("example.com", client, new_server())
    sessions = TLSSessions()

    def use(peer: int) -> Resumption:
        return Resumption(sessions, peer, client, ())

    for peer in range(100):
        use(peer).succeeded(tls)
    assert use(0).offered is not None
    use(100).succeeded(tls)
    assert len(sessions) == 100
    assert [peer for peer in range(101) if use(peer).offered is None] == [1]


async def test_a_failure_forgets_no_other_session() -> None:
    client = new_client()
    tls = await handshake_as("example.com", client, new_server())
    sessions = TLSSessions()
    Resumption(sessions, "peer", client, ()).succeeded(tls)
    failing = [Resumption(sessions, "peer", client, ()) for _ in range(2)]
    failing[0].failed()
    Resumption(sessions, "peer", client, ()).succeeded(tls)
    failing[1].failed()
    assert Resumption(sessions, "peer", client, ()).offered is not None


@pytest.mark.parametrize(("leaks", "kept"), [(True, 1), (False, 3)])
async def test_where_reading_leaks_the_number_of_reads_is_bounded(
    monkeypatch: pytest.MonkeyPatch, leaks: bool, kept: int
) -> None:
    monkeypatch.setattr(tls_sessions, "READING_LEAKS", leaks)
    monkeypatch.setattr(TLSSessions, "leaked", 999)
    client = new_client()
    tls = await handshake_as("example.com", client, new_server())
    sessions = TLSSessions()
    for peer in range(3):
        Resumption(sessions, peer, client, ()).succeeded(tls)
    assert len(sessions) == kept
