"""Upload a file, and show how far it has come.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from hashlib import sha256
from io import BufferedIOBase

import trio

from examples import _peers
from trio_exchange import ConnectionPool


class Upload:
    """A file's content in pieces, which tells after each how many bytes have been sent."""

    def __init__(self, file: BufferedIOBase, progress: Callable[[int], object]) -> None:
        self._file = trio.wrap_file(file)
        self._progress = progress
        self._sent = 0

    def __aiter__(self) -> Upload:
        return self

    async def __anext__(self) -> bytes:
        # A piece is asked for when the one before has been sent.
        self._progress(self._sent)
        chunk = await self._file.read(256 * 1024)
        if not chunk:
            raise StopAsyncIteration
        self._sent += len(chunk)
        return chunk


async def upload(pool: ConnectionPool, url: str, file: BufferedIOBase) -> str:
    size = os.fstat(file.fileno()).st_size

    def progress(sent: int) -> None:
        print(f"{sent:8} of {size} bytes  {'#' * (40 * sent // size)}")

    # Without a Content-Length the body would be sent in chunked coding.
    headers = {"Content-Length": str(size)}
    response = await pool.request("PUT", url, headers=headers, content=Upload(file, progress))
    return response.content.decode()


async def main(url: str) -> None:
    content = os.urandom(2 * 1024 * 1024)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        async with ConnectionPool() as pool:
            received = await upload(pool, f"{url}/file", file)
    print("the server has got", received)
    print("what was sent was ", f"{len(content)} bytes, SHA-256 {sha256(content).hexdigest()}")


if __name__ == "__main__":
    _peers.run(main, _peers.site)
