"""`TLSStream`: TLS on a transport, with as few system calls, copies and task switches as plain TCP needs.

Theory of operation. The handshake, the closing, and everything that the user does with a raw stream is the
work of a `trio.SSLStream`. Between those HTTP reads and writes through a `TLSStream`, which uses the same
`ssl.SSLObject` and the same two `ssl.MemoryBIO`s, and therefore has no state of TLS of its own:

- *Receiving* takes all that has arrived at the socket, and returns the content of all its records. A
  `trio.SSLStream` returns one record for each call, and makes several checkpoints for it.
- *Sending* encrypts and hands the records to the kernel at once. What the kernel does not accept goes back
  to the outgoing BIO, and the `trio.SSLStream` sends it.

At any time, each operation may be left to the `trio.SSLStream` instead, since a `TLSStream` keeps to its
locks. It is left there where TLS needs something unusual (a TLS 1.2 renegotiation, in which sending waits for
receiving), where a probe must not wait, and where a release of Trio has other internals.
"""

from __future__ import annotations

import ssl
from typing import Any

import trio

from .._exceptions import without_frames
from .tls_sessions import Resumption
from .transport import RECEIVE_SIZE, Pollable, Readiness, Transport, poll
from .trio_internals import tls_internals

# The most content of one record (RFC 8446, section 5.1).
_RECORD_SIZE = 16 * 1024
# The number of receives that wait before the next attempt to receive without waiting.
_WAITS = 8


class TLSStream(Pollable):
    """TLS on a transport, for one task that sends and one that receives.

    Args:
        stream: The stream whose handshake is complete.
        resumption: Is told whether any data was received; None to tell nothing.

    Attributes:
        trio_stream: The argument `stream`. While no task is sending or receiving, a program may switch to it.
    """

    __slots__ = (
        "_failure",
        "_internals",
        "_received",
        "_receiving",
        "_resumption",
        "_transport",
        "_undecrypted",
        "_waits",
        "trio_stream",
    )

    def __init__(self, stream: trio.SSLStream[Transport], resumption: Resumption | None = None) -> None:
        self.trio_stream: trio.SSLStream[Transport] = stream
        self._transport: Transport = stream.transport_stream
        self._internals: Any = tls_internals(stream)
        # None once data was received.
        self._resumption = resumption
        # Why nothing more can be received. It may have been found behind data, which is returned first.
        self._failure: ssl.SSLError | None = None
        # Whether bytes from the transport may still contain data, or the reason of the end.
        self._undecrypted = True
        # Whether a task waits for records here, and an event for another task that waits for them too.
        self._receiving = False
        self._received: trio.Event | None = None
        self._waits = 0

    def __repr__(self) -> str:
        return f"<TLSStream over {self._transport!r}>"

    @property
    def transport_stream(self) -> trio.abc.Stream:
        """The stream below, under the name that it has in all streams that run on another."""
        return self.trio_stream

    def peek(self) -> Readiness:
        """Return what receiving would find. READABLE may mean part of a record, or records without data."""
        if self._internals is None:
            return poll(self.trio_stream)
        readiness = self._transport.peek()
        if readiness is Readiness.QUIET and self._undecrypted and self._has_undecrypted():
            return Readiness.READABLE
        return readiness

    def _has_undecrypted(self) -> bool:
        internals = self._internals
        return bool(internals.incoming.pending or internals.ssl_object.pending() or self._failure)

    # -- Sending.

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. This is a checkpoint only if it has to wait.

        Raises:
            trio.BrokenResourceError: The connection is broken, and its transport defers no errors.
            trio.ClosedResourceError: The connection was closed on this side.

        When it is cancelled, an unknown part of `data` has been sent.
        """
        internals = self._internals
        if internals is None or not self._transport.is_socket or not internals.may_send() or not data:
            await self.trio_stream.send_all(data)
            return
        try:
            internals.ssl_object.write(data)
        except ssl.SSLWantReadError:
            await self._send_after_renegotiation(data)
            return
        except ssl.SSLError as exc:
            raise trio.BrokenResourceError from exc
        self._send_records()
        if internals.outgoing.pending:
            await internals.flush()

    async def _send_after_renegotiation(self, data: bytes | bytearray | memoryview) -> None:
        # The task that receives has the transport to itself. OpenSSL has taken nothing of `data`.
        while self._receiving:
            self._received = self._received or trio.Event()
            await self._received.wait()
        await self.trio_stream.send_all(data)

    def _send_records(self) -> None:
        """Send as many of the outgoing bytes as the kernel accepts at once."""
        outgoing = self._internals.outgoing
        records = outgoing.read()
        sent = self._transport.send_or_defer(records)
        if sent < len(records):
            outgoing.write(memoryview(records)[sent:])

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the stream may accept data."""
        await self.trio_stream.wait_send_all_might_not_block()

    # -- Receiving.

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive some bytes; `b""` at the end of the stream. This is a checkpoint.

        Raises:
            WouldBlock: Receiving would have to wait while the transport is probing.
            trio.BrokenResourceError: The connection is broken.
            trio.ClosedResourceError: The connection was closed on this side.

        Cancellation loses no data.
        """
        internals, transport = self._internals, self._transport
        size = max_bytes or RECEIVE_SIZE
        if internals is None or (transport.probing and self._failure is None):
            self._undecrypted = True
            return bytes(await self.trio_stream.receive_some(size))
        # As without TLS: the data has often arrived once other tasks have run, and after a miss the next
        # receives wait directly.
        if not self._waits or self._undecrypted:
            await trio.lowlevel.checkpoint()
            data = self._receive_nowait(size)
            if data is not None:
                return data
            self._waits = _WAITS
        self._waits -= 1
        data = None
        while data is None:
            if internals.outgoing.pending:
                # The peer may wait for these records before it sends more.
                await internals.flush()
            if internals.receive_lock.locked():
                # A task that is sending waits for the records of a renegotiation.
                self._undecrypted = True
                return bytes(await self.trio_stream.receive_some(size))
            data = self._take(await self._wait_for_records(), size)
        return data

    async def _wait_for_records(self) -> bytes:
        self._receiving = True
        try:
            return await self._transport.receive_later(RECEIVE_SIZE)
        finally:
            self._receiving = False
            if self._received is not None:
                self._received.set()
                self._received = None

    def _receive_nowait(self, size: int) -> bytes | None:
        """Receive what has arrived; None if it contains no data."""
        if self._undecrypted:
            data = self._decrypt(size)
            if data is not None:
                return data
        if self._internals.receive_lock.locked():
            return None
        records = self._transport.receive_nowait(RECEIVE_SIZE)
        return None if records is None else self._take(records, size)

    def _take(self, records: bytes, size: int) -> bytes | None:
        """Take bytes from the transport, and return the data that is complete; None if there is none."""
        if records:
            self._internals.incoming.write(records)
        else:
            self._internals.incoming.write_eof()
        return self._decrypt(size)

    def _decrypt(self, size: int) -> bytes | None:
        """Return the content of the records that have arrived, up to `size` bytes; None if there is none."""
        if self._failure is not None:
            return self._end(self._failure)
        internals = self._internals
        read, incoming = internals.ssl_object.read, internals.incoming
        chunks = []
        self._undecrypted = False
        try:
            # One call reads at most one record. A larger buffer than that would be allocated in vain.
            while chunk := read(_RECORD_SIZE if size > _RECORD_SIZE else size):
                chunks.append(chunk)
                size -= len(chunk)
                if size < _RECORD_SIZE:
                    self._undecrypted = True
                    break
                if not incoming.pending:
                    break
            else:
                self._failure = ssl.SSLZeroReturnError()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            self._failure = without_frames(exc)
        if self._failure is not None:
            self._undecrypted = True
        elif internals.outgoing.pending and self._transport.is_socket and internals.may_send():
            # An answer of TLS itself, such as to a KeyUpdate. It need not be sent before the next data, but
            # a cancellation while waiting to send it would lose the data that was received.
            self._send_records()
        if not chunks:
            return None if self._failure is None else self._end(self._failure)
        if self._resumption is not None:
            self._resumption.succeeded(internals.ssl_object)
            self._resumption = None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    @staticmethod
    def _end(failure: ssl.SSLError) -> bytes:
        # As HTTP frames its messages, the end of TLS and that of the connection mean the same.
        if isinstance(failure, (ssl.SSLZeroReturnError, ssl.SSLEOFError)):
            return b""
        raise trio.BrokenResourceError from failure

    # -- Closing.

    def close_nowait(self) -> bool:
        """Do as `aclose`, without a checkpoint, if the stream runs on a socket; return whether it does."""
        self._end_resumption()
        return self._transport.close_nowait()

    async def aclose(self) -> None:
        """Close the connection, without a closure alert, as servers expect of clients of HTTP."""
        self._end_resumption()
        await self.trio_stream.aclose()

    def _end_resumption(self) -> None:
        if self._resumption is not None:
            self._resumption.failed()
            self._resumption = None
