"""HTTP/2 with a real nginx, over TLS where it is negotiated, and by prior knowledge."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from trio_exchange import ConnectionPool, Response

from .actions import TIMEOUTS, Transport, header, in_parallel, pieces, served_by, until_all_closed
from .nginx import KIB, MIB, Nginx

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

TRANSPORTS: dict[str, Callable[[Nginx], Transport]] = {
    "tls": lambda nginx: Transport(
        nginx.https_url, {"ssl_context": nginx.client_ssl_context(), "http2": True}
    ),
    "tcp": lambda nginx: Transport(nginx.http2_url, {"http1": False, "http2": True}),
}


@pytest.fixture(params=TRANSPORTS)
def via(request: pytest.FixtureRequest, nginx: Nginx) -> Transport:
    return TRANSPORTS[request.param](nginx)


async def get(pool: ConnectionPool, url: str) -> Response:
    response = await pool.request("GET", url, extensions=TIMEOUTS)
    assert response.status == 200
    assert response.extensions["http_version"] == b"HTTP/2"
    return response


async def digest(pool: ConnectionPool, url: str) -> str:
    result = hashlib.sha256()
    async with pool.stream("GET", url, extensions=TIMEOUTS) as response:
        async for chunk in response.aiter_stream():
            result.update(chunk)
    return result.hexdigest()


def digest_of(nginx: Nginx, name: str) -> str:
    with nginx.file(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def test_what_is_spoken(nginx: Nginx) -> None:
    context = nginx.client_ssl_context()
    for http2, version in ((True, b"HTTP/2"), (False, b"HTTP/1.1")):
        async with ConnectionPool(context, http2=http2) as pool:
            response = await pool.request("GET", f"{nginx.https_url}/1k", extensions=TIMEOUTS)
            assert response.extensions["http_version"] == version
            assert response.content == nginx.file("1k").read_bytes()
            assert ("stream_id" in response.extensions) == (version == b"HTTP/2")
            assert ("reason_phrase" in response.extensions) == (version == b"HTTP/1.1")


# Many requests


async def test_one_connection_serves_one_after_the_other(via: Transport) -> None:
    async with via.pool() as pool:
        seen = [await served_by(pool, f"{via.url}/connection") for _ in range(50)]
        assert [requests for _, _, requests in seen] == list(range(1, 51))
        assert {connection for _, connection, _ in seen} == {seen[0][1]}


@pytest.mark.parametrize("connections", [1, 10])
async def test_many_concurrent_requests(nginx: Nginx, via: Transport, connections: int) -> None:
    """nginx takes 128 streams at once on a connection."""
    names = ["1k", "1k", "1k", "1m", "text"]
    contents = {name: nginx.file(name).read_bytes() for name in names}

    async def ask(index: int) -> None:
        name = names[index % len(names)]
        assert (await get(pool, f"{via.url}/{name}")).content == contents[name]

    async with via.pool(max_connections=connections) as pool:
        await in_parallel(500, ask)
        numbers = pool.statistics()
    assert numbers.requests_served == 500
    assert 1 <= numbers.connections_opened <= min(connections, 5)


# Large bodies


async def test_large_downloads_side_by_side(nginx: Nginx, via: Transport) -> None:
    expected = digest_of(nginx, "100m")
    results = []

    async def download(_: int) -> None:
        results.append(await digest(pool, f"{via.url}/100m"))

    async def ask(_: int) -> None:
        assert (await get(pool, f"{via.url}/1k")).content == nginx.file("1k").read_bytes()

    async with via.pool(max_connections=1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(in_parallel, 2, download)
        nursery.start_soon(in_parallel, 50, ask)
    assert results == [expected] * 2


@pytest.mark.parametrize("body", ["bytes", "pieces"])
async def test_large_uploads_side_by_side(nginx: Nginx, via: Transport, body: str) -> None:
    contents = [os.urandom(32 * MIB), os.urandom(16 * MIB)]

    async def put(index: int) -> None:
        content: Any = contents[index] if body == "bytes" else pieces(contents[index])
        response = await pool.request(
            "PUT", f"{via.url}/store/h2-{index}", content=content, extensions=TIMEOUTS
        )
        assert response.status in (201, 204)
        stored = nginx.file(f"store/h2-{index}")
        assert stored.read_bytes() == contents[index]
        stored.unlink()

    async with via.pool(max_connections=1) as pool:
        await in_parallel(2, put)


async def test_an_answer_before_the_body_was_read(nginx: Nginx, via: Transport) -> None:
    async with via.pool(max_connections=1) as pool:
        for path, status in (("early", 200), ("limited", 413)):
            response = await pool.request(
                "POST", f"{via.url}/{path}", content=pieces(b"x" * 8 * MIB), extensions=TIMEOUTS
            )
            assert response.status == status
            assert (await get(pool, f"{via.url}/1k")).content == nginx.file("1k").read_bytes()


# What else there is


async def test_trailers(via: Transport) -> None:
    async with via.pool() as pool:
        response = await pool.request(
            "GET", f"{via.url}/trailers.html", headers={"TE": "trailers"}, extensions=TIMEOUTS
        )
    assert len(response.content) == KIB + MIB
    trailers = dict(response.extensions["trailing_headers"])
    assert trailers[b"x-served-by"] == b"interop"
    assert trailers[b"x-bytes"].isdigit()


async def test_answers_without_a_body(nginx: Nginx, via: Transport) -> None:
    async with via.pool() as pool:
        head = await pool.request("HEAD", f"{via.url}/100m", extensions=TIMEOUTS)
        assert (head.status, head.content) == (200, b"")
        assert header(head, b"content-length") == b"%d" % (100 * MIB)
        empty = await pool.request("GET", f"{via.url}/empty", extensions=TIMEOUTS)
        assert (empty.status, empty.content) == (204, b"")
        etag = header(head, b"etag")
        assert etag is not None
        same = await pool.request(
            "GET", f"{via.url}/100m", headers={"If-None-Match": etag}, extensions=TIMEOUTS
        )
        assert (same.status, same.content) == (304, b"")
        assert pool.statistics().connections_opened == 1


async def test_the_host_reaches_the_server(nginx: Nginx, via: Transport) -> None:
    async with via.pool() as pool:
        response = await pool.request(
            "GET", f"{via.url}/names", headers={"Host": "exchange.test"}, extensions=TIMEOUTS
        )
    assert response.content.startswith(b"exchange.test ")


# Requests that are given up


async def test_leaving_large_responses_early(nginx: Nginx, via: Transport) -> None:
    """Each has a good part of its window under way; more of them than the connection's window holds."""
    async with via.pool(max_connections=1) as pool:
        for _ in range(100):
            async with pool.stream("GET", f"{via.url}/100m", extensions=TIMEOUTS) as response:
                async for chunk in response.aiter_stream():
                    assert chunk
                    break
        assert (await get(pool, f"{via.url}/1m")).content == nginx.file("1m").read_bytes()
        assert pool.statistics().connections_opened == 1


async def test_cancelled_requests_under_load(nginx: Nginx, via: Transport) -> None:
    """Those beside them do not notice, and no connection is lost.

    nginx works on what it has read at once before it lets go of a stream that was reset in it. Where it
    counts more than 128 it refuses streams, and at last it ends the connection.
    """
    chance = random.Random(7)
    contents = {name: nginx.file(name).read_bytes() for name in ("1k", "1m")}
    finished = 0

    async def give_up(_: int) -> None:
        await trio.sleep(chance.uniform(0, 1.0))
        with trio.move_on_after(chance.uniform(0, 0.1)):
            if chance.random() < 0.3:
                upload = pieces(b"x" * 10 * MIB)
                await pool.request("POST", f"{via.url}/sink", content=upload, extensions=TIMEOUTS)
            else:
                name = chance.choice(["1k", "1m", "100m"])
                await pool.request("GET", f"{via.url}/{name}", extensions=TIMEOUTS)

    async def ask(index: int) -> None:
        nonlocal finished
        await trio.sleep(index * 0.01)
        name = chance.choice(["1k", "1m"])
        assert (await get(pool, f"{via.url}/{name}")).content == contents[name]
        finished += 1

    async with via.pool(max_connections=2) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_parallel, 300, give_up)
            nursery.start_soon(in_parallel, 100, ask)
        numbers = pool.statistics()
        assert (numbers.active, numbers.waiting, numbers.connecting) == (0, 0, 0)
        assert numbers.connections_opened <= 2
    assert finished == 100


# GOAWAY


def through(nginx: Nginx, socket: str, **options: Any) -> ConnectionPool:
    """A pool for one of the servers that close connections for reasons of their own."""
    return ConnectionPool(http1=False, http2=True, uds=str(nginx.folder / socket), **options)


@pytest.mark.parametrize("connections", [1, 4])
async def test_a_limit_of_requests_under_load(nginx: Nginx, connections: int) -> None:
    """Every hundredth request ends the connection, while others are on their way on it."""
    answers: Counter[bytes] = Counter()

    async def keep_asking(index: int) -> None:
        method = ("GET", "POST")[index % 2]
        for _ in range(50):
            response = await pool.request(method, "http://localhost/connection", extensions=TIMEOUTS)
            assert response.status == 200
            answers[response.content.split()[1]] += 1

    async with through(nginx, "few.sock", max_connections=connections) as pool:
        await in_parallel(40, keep_asking)
    assert sum(answers.values()) == 2000
    assert max(answers.values()) == 100


async def test_the_server_closes_an_idle_connection(nginx: Nginx) -> None:
    async with through(nginx, "brief.sock") as pool:
        for _ in range(3):
            _, _, requests = await served_by(pool, "http://localhost/connection")
            assert requests == 1
            await until_all_closed(pool, seconds=5)


async def test_reload_under_load(own_nginx: Nginx) -> None:
    """Not one request fails, whatever its method, and none is acted on twice."""
    workers: set[bytes] = set()
    done = trio.Event()
    asked = 0
    content = own_nginx.file("1m").read_bytes()

    async def keep_asking(pool: ConnectionPool, url: str) -> None:
        worker, _, _ = await served_by(pool, f"{url}/connection")
        workers.add(worker)

    async def pause_between(pool: ConnectionPool, url: str) -> None:
        await keep_asking(pool, url)
        await trio.sleep(0.02)

    async def keep_posting(pool: ConnectionPool, url: str) -> None:
        nonlocal asked
        asked += 1
        response = await pool.request("POST", f"{url}/once?id={asked}", content=b"x", extensions=TIMEOUTS)
        assert response.status == 200

    async def keep_downloading(pool: ConnectionPool, url: str) -> None:
        assert (await get(pool, f"{url}/1m")).content == content

    async def keep_uploading(pool: ConnectionPool, url: str) -> None:
        response = await pool.request("POST", f"{url}/sink", content=content, extensions=TIMEOUTS)
        assert response.status == 204

    async def repeat(what: Callable[[ConnectionPool, str], Awaitable[None]], *args: Any) -> None:
        while not done.is_set():
            await what(*args)

    async def load(transport: Transport) -> None:
        async with transport.pool(max_connections=10) as pool, trio.open_nursery() as nursery:
            for what in (keep_asking, pause_between, keep_posting, keep_downloading, keep_uploading):
                for _ in range(4):
                    nursery.start_soon(repeat, what, pool, transport.url)

    async with trio.open_nursery() as nursery:
        for make in TRANSPORTS.values():
            nursery.start_soon(load, make(own_nginx))
        for _ in range(6):
            await trio.sleep(0.4)
            own_nginx.reload()
        await trio.sleep(0.4)
        done.set()
    assert len(workers) >= 4
    acted_on = Counter((own_nginx.folder / "once.log").read_text().split())
    assert len(acted_on) == asked
    assert set(acted_on.values()) == {1}


async def test_idle_connections_after_a_reload(own_nginx: Nginx) -> None:
    for make in TRANSPORTS.values():
        transport = make(own_nginx)
        async with transport.pool() as pool:
            before = await served_by(pool, f"{transport.url}/connection")
            own_nginx.reload()
            await until_all_closed(pool, seconds=5)
            after = await served_by(pool, f"{transport.url}/connection")
        assert before[0] != after[0]
