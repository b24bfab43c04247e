from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from trio.testing import MockClock

from tests.harness.certificates import (
    alpn_server,
    client_context,
    demanding_context,
    fail_handshake,
    make_tls,
    new_tls,
)
from tests.harness.checks import assert_settles, assert_unharmed, open_sockets
from tests.harness.networks import Network, Sockets
from tests.harness.peers import DELIVERIES, Script, swallow
from tests.harness.servers import serve_tcp
from tests.harness.streams import Wrapped, WrappedHalfCloseable
from trio_exchange import (
    ConnectError,
    ConnectionPool,
    ConnectTimeout,
    NetworkStream,
    Proxy,
    ProxyError,
    ReadError,
    WriteError,
    default_ssl_context,
)
from trio_exchange._connect.tls import TLSSettings, _make_context, default_context_for, start_tls
from trio_exchange._connect.transport import Transport
from trio_exchange.testing import ScriptedPeer


@pytest.fixture(autouse=True)
def _no_contexts_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    _make_context.cache_clear()
    yield
    _make_context.cache_clear()


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return path


# -- The default context.


def test_the_default_context_is_always_the_same() -> None:
    assert default_ssl_context() is default_ssl_context()


def test_the_default_context_verifies() -> None:
    context = default_ssl_context()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_every_offer_has_its_own_default_context() -> None:
    assert default_context_for(["h2"]) is default_context_for(("h2",))
    assert default_context_for(["h2"]) is not default_context_for(["h2", "http/1.1"])
    assert default_context_for(()) is default_ssl_context()


def subjects(context: ssl.SSLContext) -> list[Any]:
    return [dict(part[0] for part in ca["subject"]) for ca in context.get_ca_certs()]  # type: ignore[misc]


def test_ssl_cert_file_replaces_the_systems_trust_store(
    ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = default_ssl_context()
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    context = default_ssl_context()
    assert context is not before
    assert context is default_ssl_context()
    assert [subject["organizationName"].startswith("trustme") for subject in subjects(context)] == [True]
    monkeypatch.delenv("SSL_CERT_FILE")
    assert default_ssl_context() is before


@pytest.fixture
def ca_directory(ca_file: Path, tmp_path: Path) -> Path:
    """A directory as OpenSSL wants it: the files' names are hashes."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl program, which makes the name, is not installed")
    command = [openssl, "x509", "-noout", "-subject_hash", "-in", str(ca_file)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    directory = tmp_path / "certs"
    directory.mkdir()
    (directory / f"{name}.0").write_bytes(ca_file.read_bytes())
    return directory


@pytest.mark.parametrize(
    ("variable", "fixture"), [("SSL_CERT_FILE", "ca_file"), ("SSL_CERT_DIR", "ca_directory")]
)
async def test_what_the_environment_names_is_what_a_pool_trusts(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tls: Sockets, variable: str, fixture: str
) -> None:
    monkeypatch.setenv(variable, str(request.getfixturevalue(fixture)))
    async with tls.pool(ssl_context=None) as pool:
        assert (await pool.request("GET", tls.url)).status == 200


async def test_without_them_our_authority_is_not_trusted(tls: Sockets) -> None:
    async with tls.pool(ssl_context=None) as pool:
        with pytest.raises(ConnectError, match=r"certificate of 127\.0\.0\.1 could not be verified: unable"):
            await pool.request("GET", tls.url)
        assert_unharmed(pool)


@pytest.mark.parametrize(("text", "error"), [(None, FileNotFoundError), ("nothing", ssl.SSLError)])
def test_a_file_that_is_not_there_or_no_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, error: type[Exception]
) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(error):
        default_ssl_context()


async def test_a_file_that_is_not_there_leaves_the_pool_unharmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Network
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    async with network.pool(ssl_context=None, max_connections=1) as pool:
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                await pool.request("GET", "https://example.com/")
        assert_unharmed(pool)
    assert network.dialled == []


class FakeTruststore(types.ModuleType):
    """Stands for the `truststore` package, whose context verifies with the platform's own functions."""

    class SSLContext(ssl.SSLContext):
        pass


@pytest.mark.parametrize(
    ("platform", "module", "ca_file_set", "kind"),
    [
        ("darwin", FakeTruststore("truststore"), False, FakeTruststore.SSLContext),
        ("darwin", None, False, ssl.SSLContext),
        ("darwin", FakeTruststore("truststore"), True, ssl.SSLContext),
        ("linux", FakeTruststore("truststore"), False, ssl.SSLContext),
    ],
    ids=["macos", "macos without truststore", "macos with a file of its own", "other platforms"],
)
def test_only_macos_uses_truststore(
    monkeypatch: pytest.MonkeyPatch, ca_file: Path, platform: str, module: Any, ca_file_set: bool, kind: type
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, "truststore", module)
    if ca_file_set:
        monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    context = default_ssl_context()
    assert type(context) is kind
    assert context.protocol is ssl.PROTOCOL_TLS_CLIENT
    assert context is default_ssl_context()


# -- Starting TLS.


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        (("http/1.1",), ["http/1.1"], "http/1.1"),
        (("h2", "http/1.1"), ["http/1.1"], "http/1.1"),
        (("h2", "http/1.1"), ["http/1.1", "h2"], "http/1.1"),
        (("http/1.1",), [], None),
    ],
)
async def test_alpn(
    nursery: trio.Nursery, ours: tuple[str, ...], theirs: list[str], chosen: str | None
) -> None:
    client, server = trio.testing.memory_stream_pair()
    nursery.start_soon(trio.SSLStream(server, alpn_server(*theirs), server_side=True).do_handshake)
    tls = await start_tls(
        Transport(client), TLSSettings(make_tls().client, "example.com", ours, "example.com")
    )
    assert tls.trio_stream.selected_alpn_protocol() == chosen


async def test_a_pool_offers_http_1(nursery: trio.Nursery) -> None:
    sockets = Sockets(nursery, alpn_server("h2", "http/1.1"))
    async with sockets.pool() as pool:
        response = await pool.request("GET", sockets.url)
    ssl_object = response.extensions["network_stream"].get_extra_info("ssl_object")
    assert ssl_object.selected_alpn_protocol() == "http/1.1"


@pytest.fixture
def names() -> Iterator[list[str | None]]:
    """The server names that the clients of servers with TLS ask for."""
    asked: list[str | None] = []
    context = make_tls().server
    context.sni_callback = lambda _, name, __: asked.append(name)
    yield asked
    context.sni_callback = None


@pytest.mark.parametrize("name", ["example.com", b"example.com", "example.com."])
async def test_the_sni_name_is_asked_for_and_verified(
    tls: Sockets, names: list[str | None], name: str | bytes
) -> None:
    async with tls.pool() as pool:
        response = await pool.request("GET", tls.url, extensions={"sni_hostname": name})
    assert response.status == 200
    assert names == ["example.com"]


async def test_another_name_than_the_certificates_is_refused(nursery: trio.Nursery) -> None:
    other = new_tls("other.example")
    sockets = Sockets(nursery, other.server)
    async with sockets.pool(ssl_context=other.client) as pool:
        before = open_sockets()
        for name, asked, kind in (("127.0.0.1", None, "IP address"), ("a.example", "a.example", "Hostname")):
            with pytest.raises(ConnectError, match=f"certificate of {name} .* verified: {kind} mismatch"):
                await pool.request("GET", sockets.url, extensions={"sni_hostname": asked})
            await assert_settles(pool)
            assert open_sockets() <= before
        extensions = {"sni_hostname": "other.example"}
        assert (await pool.request("GET", sockets.url, extensions=extensions)).status == 200


async def test_another_server_name_is_another_connection(tls: Sockets, names: list[str | None]) -> None:
    async with tls.pool() as pool:
        for name in (None, "localhost", b"example.com", "localhost", None):
            extensions = {} if name is None else {"sni_hostname": name}
            await pool.request("GET", tls.url, extensions=extensions)
        assert pool.statistics().open == 3
    assert names == [None, "localhost", "example.com"]


@pytest.mark.parametrize("name", [".x", "a\0b"])
async def test_a_name_that_can_not_be_one(network: Network, name: str) -> None:
    ended = trio.Event()

    async def serve(peer: ScriptedPeer) -> None:
        assert await peer.receive_some() == b""
        ended.set()

    async with network.pool(serve) as pool:
        with pytest.raises(ConnectError, match="TLS can't be started for"):
            await pool.request("GET", "https://h/", extensions={"sni_hostname": name})
        await ended.wait()
        assert_unharmed(pool)


@pytest.mark.parametrize(
    ("scheme", "answer", "message"),
    [
        (
            "https",
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "it sent b'HTTP/1.1 400 Bad Req'; use http://example.com:8443",
        ),
        (
            "wss",
            b"HTTP/1.0 400 X\r\n\r\n",
            "it sent b'HTTP/1.0 400 X\\r\\n\\r\\n'; use ws://example.com:8443",
        ),
        ("https", b"<!DOCTYPE HTML>\n", "it sent b'<!DOCTYPE HTML>\\n'; use http://example.com:8443"),
        ("https", b"220 mail.example ESMTP\r\n", "it sent b'220 mail.example ESM'"),
    ],
    ids=["https", "wss", "a page without a head", "another protocol"],
)
@DELIVERIES
async def test_a_server_that_speaks_no_tls(
    network: Network, scheme: str, answer: bytes, message: str, byte_by_byte: bool
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(answer, byte_by_byte=byte_by_byte)

    async with network.pool(serve) as pool:
        with pytest.raises(ConnectError) as info:
            await pool.request("GET", f"{scheme}://example.com:8443/")
        text = str(info.value)
        beginning = "the TLS handshake with example.com failed: the server does not speak TLS on this port: "
        assert text.startswith(beginning + "it sent b'")
        if byte_by_byte:
            # OpenSSL gives up once it has the header of a record.
            assert "; ".join(text.split("; ")[1:]) == "; ".join(message.split("; ")[1:])
        else:
            assert text == beginning + message
        assert isinstance(info.value.__cause__, trio.BrokenResourceError)
        assert_unharmed(pool)


async def speak_no_tls(peer: ScriptedPeer) -> None:
    await peer.receive_some()
    await peer.send(b"HTTP/1.1 400 X\r\n\r\n")


async def test_a_proxy_that_speaks_no_tls(network: Network, client_context: ssl.SSLContext) -> None:
    proxy = Proxy("https://proxy.example:3128", ssl_context=client_context)
    message = r"proxy\.example:3128 failed: .*; use http://proxy\.example:3128$"
    async with network.pool(speak_no_tls, proxy=proxy) as pool:
        with pytest.raises(ConnectError, match=message):
            await pool.request("GET", "https://example.com/")


async def test_a_server_that_hangs_up_in_the_handshake(network: Network) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()

    async with network.pool(serve) as pool:
        with pytest.raises(ConnectError, match=r"the TLS handshake with example\.com failed") as info:
            await pool.request("GET", "https://example.com/")
        assert info.value.__cause__ is not None


async def test_a_failed_handshake_is_reported_though_its_stream_fails_to_close(network: Network) -> None:
    class Failing(Wrapped):
        async def aclose(self) -> None:
            try:
                await super().aclose()
            finally:
                raise trio.BrokenResourceError("too late")

    async with network.pool(speak_no_tls, wrap=Failing) as pool:
        with pytest.raises(ConnectError, match="TLS handshake"):
            await pool.request("GET", "https://example.com/")
        assert_unharmed(pool)


async def test_the_connect_timeout_covers_the_handshake(network: Network, autojump_clock: MockClock) -> None:
    async with network.pool(swallow) as pool:
        with pytest.raises(ConnectTimeout, match="within 3 seconds"):
            await pool.request("GET", "https://h/", extensions={"timeout": {"connect": 3}})
        assert_unharmed(pool)
        assert trio.current_time() == 3


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_a_handshake_that_ends_early_closes_its_socket(
    client_context: ssl.SSLContext, how: str
) -> None:
    before = open_sockets()
    shaking = trio.Event()

    async def serve(peer: ScriptedPeer) -> None:
        assert await peer.receive_some()
        shaking.set()
        if how == "failed":
            await peer.send(b"no TLS at all")
        await swallow(peer)

    async with trio.open_nursery() as servers:
        server = await serve_tcp(servers, serve)
        url = server.url.replace("http", "https")
        async with ConnectionPool(client_context) as pool, trio.open_nursery() as nursery:

            async def ask() -> None:
                with trio.CancelScope() as scope:
                    scopes.append(scope)
                    if how == "failed":
                        with pytest.raises(ConnectError):
                            await pool.request("GET", url)
                    else:
                        await pool.request("GET", url)

            scopes: list[trio.CancelScope] = []
            nursery.start_soon(ask)
            await shaking.wait()
            if how == "cancelled":
                scopes[0].cancel()
        servers.cancel_scope.cancel()
    assert open_sockets() == before


# -- Alerts.


ALERT = "the server sent the TLS alert 'certificate required'"


def demanding_server(ca: trustme.CA, *alpn: str) -> Script:
    """A server that demands a certificate. With TLS 1.3 the alert comes after the client's handshake."""
    context = demanding_context(ca, "example.com")
    context.set_alpn_protocols(alpn)

    async def serve(peer: ScriptedPeer) -> None:
        await fail_handshake(peer.stream, context)
        await trio.sleep_forever()

    return serve


class Breaks(WrappedHalfCloseable):
    """A stream whose sending fails after the two flights of the handshake, when the alert has come."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        super().__init__(stream)
        self._sends = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._sends += 1
        if self._sends == 3:
            await trio.testing.wait_all_tasks_blocked()
        if self._sends > 2:
            raise trio.BrokenResourceError("sending failed: Broken pipe")
        await self.stream.send_all(data)


def breaking_pair() -> tuple[trio.abc.Stream, trio.abc.Stream]:
    client, server = trio.testing.memory_stream_pair()
    return Breaks(client), server


PAIRS = pytest.mark.parametrize(
    "stream_pair", [trio.testing.memory_stream_pair, breaking_pair], ids=["alert", "failed send first"]
)


def assert_alert(error: BaseException) -> None:
    assert ALERT in str(error)
    broken = error.__cause__
    assert isinstance(broken, trio.BrokenResourceError)
    assert isinstance(broken.__cause__, ssl.SSLError)
    assert broken.__cause__.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


@PAIRS
@pytest.mark.parametrize("size", [0, 1_000_000])
@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
async def test_an_alert_after_the_handshake(
    network: Network, ca: trustme.CA, stream_pair: Any, size: int, alpn: str
) -> None:
    async with network.pool(
        demanding_server(ca, alpn), pair=stream_pair, ssl_context=client_context(ca), http2=True
    ) as pool:
        with pytest.raises(ReadError) as info:
            await pool.request("POST", "https://example.com/", content=b"x" * size)
        assert_alert(info.value)
        while pool.connections:
            await trio.testing.wait_all_tasks_blocked()
        assert_unharmed(pool)


@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
async def test_an_alert_that_comes_before_the_request_is_sent(
    nursery: trio.Nursery, ca: trustme.CA, alpn: str
) -> None:
    async def wait(event: str, info: dict[str, Any]) -> None:
        if event in ("http11.send_request_headers.started", "http2.send_connection_init.started"):
            await trio.testing.wait_all_tasks_blocked(0.01)

    server = await serve_tcp(nursery, demanding_server(ca, alpn))
    async with ConnectionPool(client_context(ca), http2=True) as pool:
        url = f"https://127.0.0.1:{server.port}"
        with pytest.raises(ReadError) as info:
            await pool.request("GET", url, extensions={"trace": wait, "sni_hostname": "example.com"})
        assert_alert(info.value)
        assert_unharmed(pool)


@PAIRS
@pytest.mark.parametrize("http2", [False, True])
@pytest.mark.parametrize("url", ["https://origin.example/", "http://origin.example/"])
async def test_an_alert_of_a_proxy(
    network: Network, ca: trustme.CA, stream_pair: Any, url: str, http2: bool
) -> None:
    script = demanding_server(ca, "h2" if http2 else "http/1.1")
    proxy = Proxy("https://example.com:8080", ssl_context=client_context(ca), http2=http2)
    async with network.pool(script, pair=stream_pair, proxy=proxy) as pool:
        with pytest.raises((ProxyError, ReadError), match=ALERT) as info:
            await pool.request("GET", url)
        error: BaseException | None = info.value
        if isinstance(error, ProxyError):
            error = error.__cause__
        assert error is not None
        assert_alert(error)


@asynccontextmanager
async def started_tls(nursery: trio.Nursery, serve: Script, *, breaks: bool) -> AsyncIterator[NetworkStream]:
    """A stream with TLS, when the server has sent something; sending on it fails if it `breaks`."""
    server = await serve_tcp(nursery, serve)
    tcp = await trio.open_tcp_stream("127.0.0.1", server.port)
    tls = await NetworkStream(tcp).start_tls(client_context(make_tls().ca), "example.com")
    await trio.lowlevel.wait_readable(tcp.socket)
    await trio.testing.wait_all_tasks_blocked()
    if breaks:
        tcp.socket.shutdown(socket.SHUT_WR)
    async with tls:
        yield tls


def after_tls(then: Script) -> Script:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.start_tls(make_tls().server)
        await peer.send(b"hello")
        await then(peer)
        await trio.sleep_forever()

    return serve


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("operation", ["read", "write"])
async def test_an_alert_on_a_stream_that_has_started_tls(
    nursery: trio.Nursery, ca: trustme.CA, operation: str, breaks: bool
) -> None:
    async with started_tls(nursery, demanding_server(ca), breaks=breaks) as tls:
        if operation == "write" and not breaks:
            await tls.write(b"x")
            operation = "read"
        with pytest.raises(ReadError if operation == "read" else WriteError) as info:
            await (tls.read() if operation == "read" else tls.write(b"x"))
        assert_alert(info.value)


async def test_what_was_received_when_sending_fails_is_still_there(nursery: trio.Nursery) -> None:
    async def send(peer: ScriptedPeer) -> None:
        await peer.send(b"last words")

    async with started_tls(nursery, after_tls(send), breaks=True) as tls:
        received = await tls.read(5)
        for _ in range(2):
            with pytest.raises(WriteError, match="Broken pipe"):
                await tls.write(b"x")
        with pytest.raises(trio.BrokenResourceError, match="Broken pipe"):
            await tls.send_all(b"x")
        while len(received) < 15:
            received += await tls.read(5)
        assert received == b"hellolast words"


async def test_what_was_received_when_sending_fails_after_connect(tls: Sockets) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.send(b"last words")
        await trio.sleep_forever()

    async with (
        tls.pool(serve) as pool,
        pool.stream("CONNECT", tls.url, extensions={"target": "x:1"}) as response,
    ):
        stream = response.extensions["network_stream"]
        stream.get_extra_info("socket").shutdown(socket.SHUT_WR)
        with pytest.raises(WriteError, match="Broken pipe"):
            await stream.write(b"x")
        received = b""
        while len(received) < 10:
            received += await stream.read()
        assert received == b"last words"


async def say_no_more(peer: ScriptedPeer) -> None:
    pass


async def send_garbage(peer: ScriptedPeer) -> None:
    assert isinstance(peer.stream, trio.SSLStream)
    await peer.stream.transport_stream.send_all(b"x" * 100)


@pytest.mark.parametrize("then", [say_no_more, send_garbage])
async def test_sending_fails_where_nothing_explains_it(nursery: trio.Nursery, then: Script) -> None:
    async with started_tls(nursery, after_tls(then), breaks=True) as tls:
        await tls.read(5)
        with pytest.raises(WriteError, match="Broken pipe"):
            await tls.write(b"x")
        if then is send_garbage:
            with pytest.raises(ReadError, match="the connection broke"):
                await tls.read()


async def test_what_breaks_tls_is_said(nursery: trio.Nursery) -> None:
    async with started_tls(nursery, after_tls(send_garbage), breaks=False) as tls:
        assert await tls.read(5) == b"hello"
        # In OpenSSL's words, which depend on its version.
        with pytest.raises(ReadError, match=r"^TLS failed: [a-z ]+$"):
            await tls.read()


async def test_the_task_that_reads_is_not_disturbed_when_sending_fails(nursery: trio.Nursery) -> None:
    async def wait(peer: ScriptedPeer) -> None:
        await go.wait()
        await peer.send(b"here")

    async def read() -> None:
        received.append(await tls.read())

    go = trio.Event()
    received: list[bytes] = []
    async with started_tls(nursery, after_tls(wait), breaks=True) as tls:
        assert await tls.read(5) == b"hello"
        async with trio.open_nursery() as tasks:
            tasks.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(WriteError, match="Broken pipe"):
                await tls.write(b"x")
            go.set()
        assert received == [b"here"]


async def test_reading_may_begin_while_it_is_found_out_why_sending_failed(nursery: trio.Nursery) -> None:
    async def read() -> None:
        received.append(await tls.read())

    async def write() -> None:
        with pytest.raises(WriteError, match="Broken pipe"):
            await tls.write(b"x")

    # Trio shuffles the tasks that are ready, so each delay is tried several times.
    for delay in [0, 1, 2, 3] * 8:
        received: list[bytes] = []
        async with started_tls(nursery, after_tls(say_no_more), breaks=True) as tls:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(write)
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                tasks.start_soon(read)
            assert received == [b"hello"]
