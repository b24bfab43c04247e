"""Full duplex, as in gRPC: each message is made when the answer to the one before has been read.

Both directions are bodies, one of a request and one of its response, on a single stream of HTTP/2.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

import struct

import trio

from examples import _peers
from trio_exchange import ConnectionPool, Response

# A body has no borders between its pieces, so that messages bring their own: here those of gRPC, a flag
# that says whether the message is compressed, and its length.
PREFIX = struct.Struct(">BL")


def packed(message: bytes) -> bytes:
    return PREFIX.pack(0, len(message)) + message


class Messages:
    """The messages in a response's body."""

    def __init__(self, response: Response) -> None:
        self._chunks = response.aiter_stream()
        self._buffer = b""

    async def receive(self) -> bytes | None:
        """The next message, or None when there are no more."""
        while True:
            if len(self._buffer) >= PREFIX.size:
                end = PREFIX.size + PREFIX.unpack_from(self._buffer)[1]
                if len(self._buffer) >= end:
                    message, self._buffer = self._buffer[PREFIX.size : end], self._buffer[end:]
                    return message
            try:
                self._buffer += await anext(self._chunks)
            except StopAsyncIteration:
                return None


async def main(url: str) -> None:
    # What is sent to the channel is the request's content, piece by piece.
    requests, content = trio.open_memory_channel[bytes](0)
    async with (
        ConnectionPool(http2=True) as pool,
        pool.stream("POST", f"{url}/echo", content=content) as response,
    ):
        print(f"{response.status} on stream {response.extensions['stream_id']}, before anything was sent")
        answers = Messages(response)
        message = b"ping"
        for _ in range(4):
            print(f"sent:     {message.decode()}")
            await requests.send(packed(message))
            answer = await answers.receive()
            if answer is None:
                raise RuntimeError("the server has ended the conversation")
            print(f"received: {answer.decode()}")
            message = answer + b" ping"
        await requests.aclose()
        if await answers.receive() is None:
            # How it went is known at the end only.
            print(dict(response.extensions["trailing_headers"]))


if __name__ == "__main__":
    _peers.run(main, _peers.https_site)
