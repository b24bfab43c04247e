from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from trio_exchange import ConnectError, ConnectionPool, ConnectTimeout, default_ssl_context
from trio_exchange._streams import Transport
from trio_exchange._tls import TLSSettings, _make_context, default_context_for, start_tls
from trio_exchange.testing import MemoryConnector, ScriptedPeer

from .peers import Server, assert_unharmed, client_context, open_sockets, respond, serve_tcp


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
    assert tls.selected_alpn_protocol() == chosen


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


async def test_a_server_that_speaks_no_tls(client_context: ssl.SSLContext, nursery: trio.Nursery) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with ConnectionPool(client_context, connector=MemoryConnector(nursery, serve)) as pool:
        with pytest.raises(ConnectError, match=r"the TLS handshake with example\.com failed"):
            await pool.request("GET", "https://example.com/")
        assert_unharmed(pool)


async def test_a_server_that_hangs_up_in_the_handshake(
    client_context: ssl.SSLContext, nursery: trio.Nursery
) -> None:
    async def serve(peer: ScriptedPeer) -> None:
        await peer.receive_some()

    async with ConnectionPool(client_context, connector=MemoryConnector(nursery, serve)) as pool:
        with pytest.raises(ConnectError, match=r"the TLS handshake with example\.com failed") as info:
            await pool.request("GET", "https://example.com/")
        assert info.value.__cause__ is not None


async def mute(peer: ScriptedPeer) -> None:
    """Never answer; wait until the client has gone."""
    while await peer.receive_some():
        pass


async def test_the_connect_timeout_covers_the_handshake(
    client_context: ssl.SSLContext, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    connector = MemoryConnector(nursery, mute)
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
        await mute(peer)

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
