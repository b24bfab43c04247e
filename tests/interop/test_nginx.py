"""The client against a real nginx: what users do every day, and what servers do to clients."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio

import trio_exchange
from tests.harness.streams import read_exactly
from trio_exchange import ConnectionPool

from .actions import (
    TIMEOUTS,
    Transport,
    header,
    in_parallel,
    pieces,
    served_by,
    until_all_closed,
)
from .nginx import KIB, MIB, Nginx

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]


TRANSPORTS: dict[str, Callable[[Nginx], Transport]] = {
    "http": lambda nginx: Transport(nginx.http_url, {}),
    "https": lambda nginx: Transport(nginx.https_url, {"ssl_context": nginx.client_ssl_context()}),
    "unix": lambda nginx: Transport("http://localhost", {"uds": nginx.socket_path}),
}


@pytest.fixture(params=TRANSPORTS)
def via(request: pytest.FixtureRequest, nginx: Nginx) -> Transport:
    return TRANSPORTS[request.param](nginx)


# Downloads


async def test_get(nginx: Nginx, via: Transport) -> None:
    async with via.pool() as pool:
        response = await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)
    assert response.status == 200
    assert response.content == nginx.file("1k").read_bytes()
    assert header(response, b"content-length") == b"1024"
    assert response.extensions["http_version"] == b"HTTP/1.1"
    assert response.extensions["reason_phrase"] == b"OK"


async def test_one_shot_request(nginx: Nginx) -> None:
    response = await trio_exchange.request("GET", f"{nginx.http_url}/1m", extensions=TIMEOUTS)
    assert response.content == nginx.file("1m").read_bytes()


async def test_large_download_in_a_stream(nginx: Nginx, via: Transport) -> None:
    digest = hashlib.sha256()
    async with (
        via.pool() as pool,
        pool.stream("GET", f"{via.url}/100m", extensions=TIMEOUTS) as response,
    ):
        async for chunk in response.aiter_stream():
            digest.update(chunk)
    with nginx.file("100m").open("rb") as file:
        assert digest.hexdigest() == hashlib.file_digest(file, "sha256").hexdigest()


async def test_connection_is_reused(via: Transport) -> None:
    async with via.pool() as pool:
        seen = [await served_by(pool, f"{via.url}/connection") for _ in range(20)]
        assert len(pool.connections) == 1
    assert {connection for _, connection, _ in seen} == {seen[0][1]}
    assert [requests for _, _, requests in seen] == list(range(1, 21))


async def test_many_concurrent_requests(nginx: Nginx, via: Transport) -> None:
    names = ["1k", "1m", "text"]
    contents = {name: nginx.file(name).read_bytes() for name in names}

    async def get(index: int) -> None:
        name = names[index % len(names)]
        response = await pool.request("GET", f"{via.url}/{name}", extensions=TIMEOUTS)
        assert response.content == contents[name]
        assert len(pool.connections) <= 20

    async with via.pool(max_connections=20) as pool:
        await in_parallel(600, get)
        assert len(pool.connections) <= 20


async def test_leaving_a_large_response_early(nginx: Nginx, via: Transport) -> None:
    async with via.pool(max_connections=2) as pool:
        for _ in range(5):
            async with pool.stream("GET", f"{via.url}/100m", extensions=TIMEOUTS) as response:
                async for chunk in response.aiter_stream():
                    assert chunk
                    break
        response = await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)
        assert response.content == nginx.file("1k").read_bytes()


async def test_cancelling_anywhere_frees_the_pool(nginx: Nginx, via: Transport) -> None:
    chance = random.Random(7)

    async def get_or_give_up(index: int) -> None:
        with trio.move_on_after(chance.uniform(0, 0.1)):
            await pool.request("GET", f"{via.url}/{chance.choice(['1k', '1m', '100m'])}", extensions=TIMEOUTS)

    async with via.pool(max_connections=5) as pool:
        await in_parallel(100, get_or_give_up)
        for _ in range(10):
            response = await pool.request("GET", f"{via.url}/1m", extensions=TIMEOUTS)
            assert response.content == nginx.file("1m").read_bytes()
        assert pool.statistics().waiting == 0
        assert len(pool.connections) <= 5


# The ways in which a response says where it ends


async def test_chunked_response(nginx: Nginx, via: Transport) -> None:
    async with via.pool() as pool:
        response = await pool.request("GET", f"{via.url}/chunked.html", extensions=TIMEOUTS)
        assert len(pool.connections) == 1
    assert header(response, b"transfer-encoding") == b"chunked"
    assert response.content == nginx.file("1k").read_bytes() + nginx.file("1m").read_bytes()


async def test_files_in_chunks(nginx: Nginx, via: Transport) -> None:
    async with via.pool() as pool:
        for name in ("1k", "1m"):
            response = await pool.request("GET", f"{via.url}/chunked/{name}", extensions=TIMEOUTS)
            assert header(response, b"transfer-encoding") == b"chunked"
            assert response.content == nginx.file(name).read_bytes()
        assert len(pool.connections) == 1


async def test_response_that_ends_with_the_connection(nginx: Nginx, via: Transport) -> None:
    async with via.pool() as pool:
        response = await pool.request("GET", f"{via.url}/until-close.html", extensions=TIMEOUTS)
        assert header(response, b"transfer-encoding") is None
        assert header(response, b"content-length") is None
        assert response.content == nginx.file("1k").read_bytes() + nginx.file("1m").read_bytes()
        await until_all_closed(pool, seconds=2)


async def test_trailers(via: Transport) -> None:
    async with (
        via.pool() as pool,
        pool.stream(
            "GET", f"{via.url}/trailers.html", headers={"TE": "trailers"}, extensions=TIMEOUTS
        ) as response,
    ):
        body = await response.aread()
        trailers = {name.lower(): value for name, value in response.extensions["trailing_headers"]}
    assert len(body) == KIB + MIB
    assert trailers[b"x-served-by"] == b"interop"
    assert b"x-bytes" in trailers


async def test_compressed_content_is_left_as_it_is(nginx: Nginx, via: Transport) -> None:
    async with via.pool() as pool:
        response = await pool.request(
            "GET", f"{via.url}/text", headers={"Accept-Encoding": "gzip"}, extensions=TIMEOUTS
        )
    assert header(response, b"content-encoding") == b"gzip"
    assert gzip.decompress(response.content) == nginx.file("text").read_bytes()


async def test_head_has_no_body(via: Transport) -> None:
    async with via.pool() as pool:
        for name in ("1k", "100m", "chunked.html"):
            response = await pool.request("HEAD", f"{via.url}/{name}", extensions=TIMEOUTS)
            assert response.status == 200
            assert response.content == b""
        _, _, requests = await served_by(pool, f"{via.url}/connection")
    assert requests == 4


async def test_not_modified_and_no_content_have_no_body(via: Transport) -> None:
    async with via.pool() as pool:
        first = await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)
        etag = header(first, b"etag")
        assert etag is not None
        second = await pool.request(
            "GET", f"{via.url}/1k", headers={"If-None-Match": etag}, extensions=TIMEOUTS
        )
        third = await pool.request("GET", f"{via.url}/empty", extensions=TIMEOUTS)
        _, _, requests = await served_by(pool, f"{via.url}/connection")
    assert (second.status, second.content) == (304, b"")
    assert (third.status, third.content) == (204, b"")
    assert requests == 4


async def test_redirect_is_handed_out(via: Transport) -> None:
    async with via.pool() as pool:
        response = await pool.request("GET", f"{via.url}/redirect", extensions=TIMEOUTS)
    assert response.status == 302
    assert (header(response, b"location") or b"").endswith(b"/1k")


async def test_byte_ranges(nginx: Nginx, via: Transport) -> None:
    content = nginx.file("1m").read_bytes()

    async def get(ranges: str) -> trio_exchange.Response:
        return await pool.request("GET", f"{via.url}/1m", headers={"Range": ranges}, extensions=TIMEOUTS)

    async with via.pool() as pool:
        one = await get("bytes=1000-1999")
        several = await get("bytes=0-9,500-509,-10")
        none = await get(f"bytes={2 * MIB}-")
        assert len(pool.connections) == 1
    assert (one.status, one.content) == (206, content[1000:2000])
    assert header(one, b"content-range") == b"bytes 1000-1999/1048576"
    assert several.status == 206
    assert all(part in several.content for part in (content[:10], content[500:510], content[-10:]))
    assert none.status == 416


# Uploads


BODIES: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda content: content,
    "async-iterator": pieces,
    "sync-iterator": lambda content: [
        content[start : start + 1000] for start in range(0, len(content), 1000)
    ],
}


@pytest.mark.parametrize("size", [0, 1, 100_000, 10 * MIB])
@pytest.mark.parametrize("body", BODIES)
async def test_upload_arrives_whole(nginx: Nginx, via: Transport, body: str, size: int) -> None:
    content = os.urandom(size)
    async with via.pool() as pool:
        for _ in range(2):
            response = await pool.request(
                "PUT", f"{via.url}/store/upload", content=BODIES[body](content), extensions=TIMEOUTS
            )
            assert response.status in (201, 204)
            assert nginx.file("store/upload").read_bytes() == content
        _, _, requests = await served_by(pool, f"{via.url}/connection")
    assert requests == 3


async def test_upload_with_declared_length(nginx: Nginx, via: Transport) -> None:
    content = os.urandom(MIB)
    async with via.pool() as pool:
        response = await pool.request(
            "PUT",
            f"{via.url}/store/declared",
            headers={"Content-Length": str(MIB)},
            content=pieces(content),
            extensions=TIMEOUTS,
        )
    assert response.status in (201, 204)
    assert nginx.file("store/declared").read_bytes() == content


async def test_concurrent_uploads_and_downloads(nginx: Nginx, via: Transport) -> None:
    content = os.urandom(MIB)

    async def exchange(index: int) -> None:
        if index % 2:
            response = await pool.request(
                "PUT", f"{via.url}/store/{index}", content=pieces(content), extensions=TIMEOUTS
            )
            assert response.status in (201, 204)
            assert nginx.file(f"store/{index}").read_bytes() == content
        else:
            response = await pool.request("GET", f"{via.url}/1m", extensions=TIMEOUTS)
            assert response.content == nginx.file("1m").read_bytes()

    async with via.pool(max_connections=8) as pool:
        await in_parallel(60, exchange)


@pytest.mark.parametrize("body", BODIES)
async def test_answer_before_the_body_was_read(nginx: Nginx, via: Transport, body: str) -> None:
    async with via.pool(max_connections=1) as pool:
        for _ in range(3):
            response = await pool.request(
                "POST",
                f"{via.url}/early",
                content=BODIES[body](bytes(4 * MIB)),
                extensions=TIMEOUTS,
            )
            assert (response.status, response.content) == (200, b"early")
        response = await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)
        assert response.content == nginx.file("1k").read_bytes()


@pytest.mark.parametrize("size", [2 * KIB, 10 * MIB])
@pytest.mark.parametrize("body", BODIES)
async def test_body_that_is_too_large(nginx: Nginx, via: Transport, body: str, size: int) -> None:
    async with via.pool(max_connections=1) as pool:
        for _ in range(3):
            response = await pool.request(
                "POST", f"{via.url}/limited", content=BODIES[body](bytes(size)), extensions=TIMEOUTS
            )
            assert response.status == 413
        response = await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)
        assert response.content == nginx.file("1k").read_bytes()


class Expecting:
    """A request with Expect, which notes what was asked of its body and what came informally."""

    def __init__(self, pool: ConnectionPool, url: str) -> None:
        self.asked = 0
        self.informational: list[int] = []
        self._pool = pool
        self._url = url

    async def send(self) -> trio_exchange.Response:
        return await self._pool.request(
            "POST",
            self._url,
            headers={"Expect": "100-continue", "Content-Length": str(MIB)},
            content=self._body(),
            extensions={**TIMEOUTS, "informational": self._note},
        )

    async def _body(self) -> AsyncIterator[bytes]:
        for _ in range(16):
            self.asked += 1
            yield bytes(MIB // 16)

    async def _note(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.informational.append(status)


async def test_continue(via: Transport) -> None:
    async with via.pool() as pool:
        request = Expecting(pool, f"{via.url}/sink")
        response = await request.send()
        _, _, requests = await served_by(pool, f"{via.url}/connection")
    assert response.status == 204
    assert request.informational == [100]
    assert request.asked == 16
    assert requests == 2


async def test_refused_instead_of_continued(via: Transport) -> None:
    async with via.pool(max_connections=1) as pool:
        for _ in range(3):
            request = Expecting(pool, f"{via.url}/limited")
            response = await request.send()
            assert response.status == 413
            assert request.informational == []
            assert request.asked == 0


# Connections that the server ends


async def test_server_ends_a_connection_after_some_requests(via: Transport) -> None:
    async with via.pool() as pool:
        seen = [await served_by(pool, f"{via.url}/few-requests") for _ in range(12)]
    assert [requests for _, _, requests in seen] == [1, 2, 3] * 4


async def test_server_ends_connections_under_load(via: Transport) -> None:
    async def get(index: int) -> None:
        for _ in range(10):
            _, _, requests = await served_by(pool, f"{via.url}/few-requests")
            assert requests <= 3

    async with via.pool(max_connections=10) as pool:
        await in_parallel(40, get)


async def test_server_ends_an_idle_connection(via: Transport) -> None:
    async with via.pool() as pool:
        first = await served_by(pool, f"{via.url}/short-keepalive")
        await until_all_closed(pool, seconds=2)
        second = await served_by(pool, f"{via.url}/short-keepalive")
    assert first[1] != second[1]


def pauses_about(seconds: float) -> Iterator[float]:
    """Pauses that end just when the server gives up waiting, to meet its close in every phase."""
    return (seconds + 0.001 * step for step in range(-8, 9))


async def test_idempotent_requests_survive_the_close_of_an_idle_connection(via: Transport) -> None:
    async def get(index: int) -> None:
        for pause in pauses_about(0.1):
            await served_by(pool, f"{via.url}/short-keepalive")
            await trio.sleep(pause)

    async with via.pool(max_connections=20) as pool:
        await in_parallel(20, get)


async def test_other_requests_are_never_sent_twice(nginx: Nginx, via: Transport) -> None:
    log = nginx.folder / "once.log"
    known = len(log.read_text().split())
    answered: list[str] = []

    async def post(index: int) -> None:
        for step, pause in enumerate(pauses_about(0.1)):
            name = f"{index}-{step}"
            try:
                response = await pool.request(
                    "POST", f"{via.url}/once?id={name}", content=b"x", extensions=TIMEOUTS
                )
            except (trio_exchange.NetworkError, trio_exchange.RemoteProtocolError):
                pass
            else:
                assert response.status == 200
                answered.append(name)
            await trio.sleep(pause)

    async with via.pool(max_connections=20) as pool:
        await in_parallel(20, post)
    acted_on = log.read_text().split()[known:]
    assert len(acted_on) == len(set(acted_on))
    assert set(answered) <= set(acted_on)


async def test_reload_under_load(own_nginx: Nginx) -> None:
    transports = [make(own_nginx) for make in TRANSPORTS.values()]
    workers: set[bytes] = set()
    done = trio.Event()

    async def keep_asking(pool: ConnectionPool, url: str) -> None:
        while not done.is_set():
            worker, _, _ = await served_by(pool, url)
            workers.add(worker)

    async def keep_downloading(pool: ConnectionPool, url: str) -> None:
        content = own_nginx.file("1m").read_bytes()
        while not done.is_set():
            response = await pool.request("GET", url, extensions=TIMEOUTS)
            assert response.content == content

    async def pause_between(pool: ConnectionPool, url: str) -> None:
        while not done.is_set():
            await served_by(pool, url)
            await trio.sleep(0.02)

    async def load(transport: Transport) -> None:
        async with transport.pool(max_connections=10) as pool, trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(keep_asking, pool, f"{transport.url}/connection")
                nursery.start_soon(pause_between, pool, f"{transport.url}/connection")
                nursery.start_soon(keep_downloading, pool, f"{transport.url}/1m")

    async with trio.open_nursery() as nursery:
        for transport in transports:
            nursery.start_soon(load, transport)
        for _ in range(6):
            await trio.sleep(0.4)
            own_nginx.reload()
        await trio.sleep(0.4)
        done.set()
    assert len(workers) >= 4


async def test_idle_connections_after_a_reload(own_nginx: Nginx) -> None:
    for make in TRANSPORTS.values():
        transport = make(own_nginx)
        async with transport.pool() as pool:
            before = await served_by(pool, f"{transport.url}/connection")
            own_nginx.reload()
            await until_all_closed(pool, seconds=5)
            after = await served_by(pool, f"{transport.url}/connection")
        assert before[0] != after[0]


async def test_server_that_is_gone(own_nginx: Nginx) -> None:
    transports = [make(own_nginx) for make in TRANSPORTS.values()]
    own_nginx.stop()
    for transport in transports:
        async with transport.pool() as pool:
            with pytest.raises(trio_exchange.ConnectError):
                await pool.request("GET", f"{transport.url}/1k", extensions=TIMEOUTS)
            assert not pool.connections


async def test_server_that_dies_within_a_response(own_nginx: Nginx) -> None:
    async def get(transport: Transport) -> None:
        async with pool.stream("GET", f"{transport.url}/100m", extensions=TIMEOUTS) as response:
            own_nginx.stop()
            await response.aread()

    transport = TRANSPORTS["https"](own_nginx)
    async with transport.pool() as pool:
        with pytest.raises((trio_exchange.RemoteProtocolError, trio_exchange.ReadError)):
            await get(transport)
        await until_all_closed(pool, seconds=2)


# TLS


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_tls_versions(nginx: Nginx, version: ssl.TLSVersion) -> None:
    context = nginx.client_ssl_context()
    context.minimum_version = context.maximum_version = version
    async with ConnectionPool(ssl_context=context) as pool:
        async with pool.stream("GET", f"{nginx.https_url}/protocol", extensions=TIMEOUTS) as response:
            tls = response.extensions["network_stream"].get_extra_info("ssl_object")
            assert tls.version() == (await response.aread()).decode()
        await trio.sleep(0.1)
        _, _, requests = await served_by(pool, f"{nginx.https_url}/connection")
    # Session tickets that arrive while the connection is idle are no reason to give it up.
    assert requests == 2


async def test_unknown_authority(nginx: Nginx) -> None:
    async with ConnectionPool() as pool:
        with pytest.raises(trio_exchange.ConnectError, match=r"127\.0\.0\.1"):
            await pool.request("GET", f"{nginx.https_url}/1k", extensions=TIMEOUTS)
        assert not pool.connections


async def test_certificate_for_another_host(nginx: Nginx) -> None:
    extensions = {**TIMEOUTS, "sni_hostname": "elsewhere.test"}
    async with ConnectionPool(ssl_context=nginx.client_ssl_context()) as pool:
        with pytest.raises(trio_exchange.ConnectError, match=r"elsewhere\.test"):
            await pool.request("GET", f"{nginx.https_url}/1k", extensions=extensions)
        assert not pool.connections


async def test_server_name_indication(nginx: Nginx) -> None:
    extensions = {**TIMEOUTS, "sni_hostname": "exchange.test"}
    async with ConnectionPool(ssl_context=nginx.client_ssl_context()) as pool:
        response = await pool.request(
            "GET",
            f"{nginx.https_url}/names",
            headers={"Host": "exchange.test"},
            extensions=extensions,
        )
    assert response.content.split() == [b"exchange.test"] * 3


async def test_tls_to_a_port_without_it(nginx: Nginx) -> None:
    async with ConnectionPool(ssl_context=nginx.client_ssl_context()) as pool:
        with pytest.raises(trio_exchange.ConnectError):
            await pool.request("GET", f"https://127.0.0.1:{nginx.http_port}/1k", extensions=TIMEOUTS)
        assert not pool.connections


async def test_plain_text_to_a_port_with_tls(nginx: Nginx) -> None:
    async with ConnectionPool() as pool:
        response = await pool.request("GET", f"http://127.0.0.1:{nginx.https_port}/1k", extensions=TIMEOUTS)
    assert response.status == 400
    assert b"HTTPS port" in response.content


# Targets, upgrades, and requests that are refused


async def test_absolute_target(via: Transport) -> None:
    extensions = {**TIMEOUTS, "target": b"http://exchange.test/names"}
    async with via.pool() as pool:
        response = await pool.request("GET", via.url, extensions=extensions)
    assert response.content.split()[0] == b"exchange.test"


async def test_refused_connect_is_an_ordinary_response(nginx: Nginx, via: Transport) -> None:
    extensions = {**TIMEOUTS, "target": b"exchange.test:443"}
    async with via.pool(max_connections=1) as pool:
        for _ in range(2):
            response = await pool.request("CONNECT", via.url, extensions=extensions)
            # Some versions refuse the method, some the form of its target.
            assert response.status in (400, 405)
            assert str(response.status).encode() in response.content
        response = await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)
        assert response.content == nginx.file("1k").read_bytes()


async def test_target_that_is_too_long(nginx: Nginx, via: Transport) -> None:
    async with via.pool(max_connections=1) as pool:
        for _ in range(2):
            response = await pool.request("GET", f"{via.url}/{'x' * 20_000}", extensions=TIMEOUTS)
            assert response.status == 414
        response = await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)
        assert response.content == nginx.file("1k").read_bytes()


async def answer_one_upgrade(listener: trio.SocketListener) -> None:
    """The application behind nginx: agrees, says hello in the same packet, then echoes."""
    stream = await listener.accept()
    async with stream:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some()
        assert b"upgrade: echo" in head.lower()
        await stream.send_all(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhello")
        async for data in stream:
            await stream.send_all(data)


async def listen_on_unix_socket(path: str) -> trio.SocketListener:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(path)
    sock.listen()
    return trio.SocketListener(sock)


async def test_upgrade(nginx: Nginx, via: Transport) -> None:
    path = nginx.folder / "upgrade.sock"
    listener = await listen_on_unix_socket(str(path))
    headers = {"Connection": "upgrade", "Upgrade": "echo"}
    content = os.urandom(MIB)
    try:
        async with listener, via.pool(max_connections=1) as pool, trio.open_nursery() as nursery:
            nursery.start_soon(answer_one_upgrade, listener)
            url = f"{via.url}/upgrade"
            async with pool.stream("GET", url, headers=headers, extensions=TIMEOUTS) as response:
                assert response.status == 101
                stream = response.extensions["network_stream"]
                assert await read_exactly(stream, 5) == b"hello"
                nursery.start_soon(stream.write, content)
                assert await read_exactly(stream, len(content)) == content
            assert (await pool.request("GET", f"{via.url}/1k", extensions=TIMEOUTS)).status == 200
    finally:
        path.unlink()


# TLS sessions


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=str)
@pytest.mark.parametrize("resumption", [True, False], ids=["on", "off"])
async def test_tls_sessions_are_resumed(
    nginx: Nginx, version: ssl.TLSVersion, resumption: bool, http2: bool
) -> None:
    context = nginx.client_ssl_context()
    context.minimum_version = context.maximum_version = version
    reused = []
    async with ConnectionPool(
        context, http2=http2, max_keepalive_connections=0, tls_session_resumption=resumption
    ) as pool:
        for _ in range(3):
            response = await pool.request("GET", f"{nginx.https_url}/protocol", extensions=TIMEOUTS)
            assert response.content == version.name.replace("_", ".").encode()
            tls = response.extensions["network_stream"].get_extra_info("ssl_object")
            reused.append(tls.session_reused)
    assert reused == [False, resumption, resumption]
