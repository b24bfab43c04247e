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

from tests.harness.certificates import client_context, demanding_context, fail_handshake, make_tls
from tests.harness.checks import assert_unharmed, open_sockets
from tests.harness.peers import DELIVERIES, Script, respond, swallow
from tests.harness.servers import Server, serve_tcp
from tests.harness.streams import WrappedHalfCloseable
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
from trio_exchange.testing import MemoryConnector, ScriptedPeer


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


async def test_ssl_cert_file_is_what_a_pool_trusts(
    ca_file: Path, server_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    server = await serve_tcp(nursery, respond, tls=server_context)
    async with ConnectionPool() as pool:
        assert (await pool.request("GET", server.url)).status == 200


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


async def test_ssl_cert_dir_is_what_a_pool_trusts(
    ca_directory: Path,
    server_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(ca_directory))
    server = await serve_tcp(nursery, respond, tls=server_context)
    async with ConnectionPool() as pool:
        assert (await pool.request("GET", server.url)).status == 200


async def test_without_them_our_authority_is_not_trusted(
    server_context: ssl.SSLContext, nursery: trio.Nursery
) -> None:
    server = await serve_tcp(nursery, respond, tls=server_context)
    async with ConnectionPool() as pool:
        with pytest.raises(ConnectError, match=r"certificate of 127\.0\.0\.1 could not be verified"):
            await pool.request("GET", server.url)


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(FileNotFoundError):
        default_ssl_context()


def test_a_file_that_is_no_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.pem"
    path.write_text("nothing")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(ssl.SSLError):
        default_ssl_context()


async def test_a_file_that_is_not_there_leaves_the_pool_unharmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    connector = MemoryConnector(nursery, respond)
    async with ConnectionPool(connector=connector, max_connections=1) as pool:
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                await pool.request("GET", "https://example.com/")
        assert_unharmed(pool)
    assert connector.dialled == []


class FakeTruststore(types.ModuleType):
    """Stands for the `truststore` package, whose context verifies with the platform's own functions."""

    class SSLContext(ssl.SSLContext):
        pass


def test_macos_uses_truststore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "truststore", FakeTruststore("truststore"))
    context = default_ssl_context()
    assert isinstance(context, FakeTruststore.SSLContext)
    assert context.protocol is ssl.PROTOCOL_TLS_CLIENT
    assert context is default_ssl_context()


def test_macos_without_truststore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "truststore", None)
    assert type(default_ssl_context()) is ssl.SSLContext


def test_macos_with_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, ca_file: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "truststore", FakeTruststore("truststore"))
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    assert type(default_ssl_context()) is ssl.SSLContext


def test_other_platforms_need_no_truststore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "truststore", FakeTruststore("truststore"))
    assert type(default_ssl_context()) is ssl.SSLContext


# -- Starting TLS.


async def serve_handshake(
    stream: trio.abc.Stream, context: ssl.SSLContext, seen: list[trio.SSLStream[Any]]
) -> None:
    tls = trio.SSLStream(stream, context, server_side=True)
    await tls.do_handshake()
    seen.append(tls)


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        (("http/1.1",), ["http/1.1"], "http/1.1"),
        (("h2", "http/1.1"), ["http/1.1"], "http/1.1"),
        (("h2", "http/1.1"), ["http/1.1", "h2"], "http/1.1"),
        (("http/1.1",), [], None),
    ],
)
async def test_alpn(ca: trustme.CA, ours: tuple[str, ...], theirs: list[str], chosen: str | None) -> None:
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("example.com").configure_cert(server_context)
    if theirs:
        server_context.set_alpn_protocols(theirs)
    client, server = trio.testing.memory_stream_pair()
    transport = Transport(client)
    seen: list[trio.SSLStream[Any]] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_handshake, server, server_context, seen)
        tls = await start_tls(transport, TLSSettings(client_context(ca), "example.com", ours, "example.com"))
    assert tls.trio_stream.selected_alpn_protocol() == chosen


async def test_a_pool_offers_http_1(
    ca: trustme.CA, client_context: ssl.SSLContext, nursery: trio.Nursery
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    server = await serve_tcp(nursery, respond, tls=context)
    async with ConnectionPool(client_context) as pool:
        response = await pool.request("GET", server.url)
    ssl_object = response.extensions["network_stream"].get_extra_info("ssl_object")
    assert ssl_object.selected_alpn_protocol() == "http/1.1"


async def serve_tls_and_note_sni(nursery: trio.Nursery, ca: trustme.CA, names: list[str | None]) -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("example.com").configure_cert(context)

    def note(sock: object, name: str | None, context: ssl.SSLContext) -> None:
        names.append(name)

    context.sni_callback = note
    return await serve_tcp(nursery, respond, tls=context)


@pytest.mark.parametrize("name", ["example.com", b"example.com", "example.com."])
async def test_the_sni_name_is_asked_for_and_verified(
    ca: trustme.CA, client_context: ssl.SSLContext, nursery: trio.Nursery, name: str | bytes
) -> None:
    names: list[str | None] = []
    server = await serve_tls_and_note_sni(nursery, ca, names)
    async with ConnectionPool(client_context) as pool:
        response = await pool.request("GET", server.url, extensions={"sni_hostname": name})
    assert response.status == 200
    assert names == ["example.com"]


async def test_another_name_than_the_certificates_is_refused(
    ca: trustme.CA, client_context: ssl.SSLContext, nursery: trio.Nursery
) -> None:
    names: list[str | None] = []
    server = await serve_tls_and_note_sni(nursery, ca, names)
    async with ConnectionPool(client_context) as pool:
        with pytest.raises(ConnectError, match=r"certificate of other\.example .* Hostname mismatch"):
            await pool.request("GET", server.url, extensions={"sni_hostname": "other.example"})
        assert_unharmed(pool)


@pytest.mark.parametrize("name", [".x", "a\0b"])
async def test_a_name_that_can_not_be_one(
    client_context: ssl.SSLContext, nursery: trio.Nursery, name: str
) -> None:
    ended = trio.Event()

    async def serve(peer: ScriptedPeer) -> None:
        assert await peer.receive_some() == b""
        ended.set()

    async with ConnectionPool(client_context, connector=MemoryConnector(nursery, serve)) as pool:
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
    client_context: ssl.SSLContext,
    nursery: trio.Nursery,
    scheme: str,
    answer: bytes,
    message: str,
    byte_by_byte: bool,
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(answer, byte_by_byte=byte_by_byte)

    async with ConnectionPool(client_context, connector=MemoryConnector(nursery, serve)) as pool:
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


async def test_a_proxy_that_speaks_no_tls(client_context: ssl.SSLContext, nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(b"HTTP/1.1 400 X\r\n\r\n")

    proxy = Proxy("https://proxy.example:3128", ssl_context=client_context)
    async with ConnectionPool(proxy=proxy, connector=MemoryConnector(nursery, serve)) as pool:
        with pytest.raises(
            ConnectError, match=r"proxy\.example:3128 failed: .*; use http://proxy\.example:3128$"
        ):
            await pool.request("GET", "https://example.com/")


async def test_a_server_that_hangs_up_in_the_handshake(
    client_context: ssl.SSLContext, nursery: trio.Nursery
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()

    async with ConnectionPool(client_context, connector=MemoryConnector(nursery, serve)) as pool:
        with pytest.raises(ConnectError, match=r"the TLS handshake with example\.com failed") as info:
            await pool.request("GET", "https://example.com/")
        assert info.value.__cause__ is not None


async def test_the_connect_timeout_covers_the_handshake(
    client_context: ssl.SSLContext, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    connector = MemoryConnector(nursery, swallow)
    async with ConnectionPool(client_context, connector=connector) as pool:
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
    nursery: trio.Nursery, ca: trustme.CA, stream_pair: Any, size: int, alpn: str
) -> None:
    connector = MemoryConnector(nursery, demanding_server(ca, alpn), stream_pair=stream_pair)
    async with ConnectionPool(client_context(ca), http2=True, connector=connector) as pool:
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
    nursery: trio.Nursery, ca: trustme.CA, stream_pair: Any, url: str, http2: bool
) -> None:
    script = demanding_server(ca, "h2" if http2 else "http/1.1")
    connector = MemoryConnector(nursery, script, stream_pair=stream_pair)
    proxy = Proxy("https://example.com:8080", ssl_context=client_context(ca), http2=http2)
    async with ConnectionPool(proxy=proxy, connector=connector) as pool:
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


async def test_what_was_received_when_sending_fails_after_connect(nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.send(b"last words")
        await trio.sleep_forever()

    server = await serve_tcp(nursery, serve, tls=make_tls().server)
    async with (
        ConnectionPool(make_tls().client) as pool,
        pool.stream("CONNECT", server.url, extensions={"target": "x:1"}) as response,
    ):
        stream = response.extensions["network_stream"]
        stream.get_extra_info("socket").shutdown(socket.SHUT_WR)
        with pytest.raises(WriteError, match="Broken pipe"):
            await stream.write(b"x")
        received = b""
        while len(received) < 10:
            received += await stream.read()
        assert received == b"last words"


async def test_sending_fails_where_nothing_explains_it(nursery: trio.Nursery) -> None:
    async def nothing(peer: ScriptedPeer) -> None:
        pass

    async def garbage(peer: ScriptedPeer) -> None:
        assert isinstance(peer.stream, trio.SSLStream)
        await peer.stream.transport_stream.send_all(b"x" * 100)

    for then in (nothing, garbage):
        async with started_tls(nursery, after_tls(then), breaks=True) as tls:
            await tls.read(5)
            with pytest.raises(WriteError, match="Broken pipe"):
                await tls.write(b"x")
            if then is garbage:
                with pytest.raises(ReadError, match="the connection broke"):
                    await tls.read()


async def test_what_breaks_tls_is_said(nursery: trio.Nursery) -> None:
    async def garbage(peer: ScriptedPeer) -> None:
        assert isinstance(peer.stream, trio.SSLStream)
        await peer.stream.transport_stream.send_all(b"x" * 100)

    async with started_tls(nursery, after_tls(garbage), breaks=False) as tls:
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
    async def nothing(peer: ScriptedPeer) -> None:
        pass

    async def read() -> None:
        received.append(await tls.read())

    async def write() -> None:
        with pytest.raises(WriteError, match="Broken pipe"):
            await tls.write(b"x")

    # Trio shuffles the tasks that are ready, so each delay is tried several times.
    for delay in [0, 1, 2, 3] * 8:
        received: list[bytes] = []
        async with started_tls(nursery, after_tls(nothing), breaks=True) as tls:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(write)
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                tasks.start_soon(read)
            assert received == [b"hello"]
