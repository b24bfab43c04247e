"""The names of Trio that are not public and that `_connect/trio_internals.py` uses are still there."""

from __future__ import annotations

import errno
import ssl
from typing import Any

import pytest
import trio
import trio.testing

from tests.harness.certificates import make_tls
from trio_exchange._connect import trio_internals


async def test_trio_keeps_the_ssl_object_and_what_it_has_not_decrypted() -> None:
    near, far = trio.testing.memory_stream_pair()
    tls = make_tls()
    client = trio.SSLStream(near, tls.client, server_hostname="localhost")
    server = trio.SSLStream(far, tls.server, server_side=True)
    for name in trio_internals._USED:
        assert hasattr(client, name), f"Trio {trio.__version__} has no SSLStream.{name} any more"
    assert isinstance(trio_internals.ssl_object(client), ssl.SSLObject)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    for record in (b"one", b"two"):
        await server.send_all(record)
    internals = trio_internals.tls_internals(client)
    assert internals is not None
    assert isinstance(internals.incoming, ssl.MemoryBIO)
    assert isinstance(internals.outgoing, ssl.MemoryBIO)
    assert internals.may_send()
    assert not internals.receive_lock.locked()
    assert await client.receive_some() == b"one"
    assert trio_internals.has_undecrypted(client)
    assert await client.receive_some() == b"two"
    assert not trio_internals.has_undecrypted(client)


async def test_trio_sends_what_is_in_its_bio_and_notes_a_failure() -> None:
    near, far = trio.testing.memory_stream_pair()
    tls = make_tls()
    client = trio.SSLStream(near, tls.client, server_hostname="localhost")
    server = trio.SSLStream(far, tls.server, server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    internals = trio_internals.tls_internals(client)
    assert internals is not None
    internals.ssl_object.write(b"abc")
    await internals.flush()
    assert not internals.outgoing.pending
    assert await server.receive_some() == b"abc"
    await far.aclose()
    internals.ssl_object.write(b"abc")
    with pytest.raises(trio.BrokenResourceError):
        await internals.flush()
    assert not internals.may_send()


def test_trio_with_other_internals() -> None:
    near, _ = trio.testing.memory_stream_pair()
    stream: Any = trio.SSLStream(near, make_tls().client, server_hostname="localhost")
    del stream._inner_send_lock
    assert trio_internals.tls_internals(stream) is None


def test_without_an_ssl_object_the_stream_stands_for_it() -> None:
    near, _ = trio.testing.memory_stream_pair()
    stream: Any = trio.SSLStream(near, make_tls().client, server_hostname="localhost")
    del stream._ssl_object
    assert trio_internals.ssl_object(stream) is stream


async def test_trio_still_words_a_failed_attempt_as_before() -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(OSError, match="all attempts to connect") as info:
            await trio.open_tcp_stream("127.0.0.1", port)
    group = info.value.__cause__
    assert isinstance(group, ExceptionGroup)
    (attempt,) = group.exceptions
    assert isinstance(attempt, ConnectionRefusedError)
    assert attempt.errno == errno.ECONNREFUSED
    match = trio_internals.FAILED_ATTEMPT.fullmatch(str(attempt.strerror))
    assert match, f"Trio {trio.__version__} says {attempt.strerror!r}"
    assert match.groups() == ("127.0.0.1", str(port))
