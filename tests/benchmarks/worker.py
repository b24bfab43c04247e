"""One process, one client, one case. It keeps its connections open, and measures when told to.

A process for each keeps the clients out of each other's heap, and lets the rounds alternate between
event loops.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from typing import Literal, Protocol, cast

import trio

from .cases import Work
from .loops import Sample, Send, drain_on_asyncio, drain_on_trio

WARM_UPS = 10

Drain = Callable[[Send, int, int], Awaitable[Sample]]


class Client(Protocol):
    """Each operation is one request, whose answer is read to its end and checked."""

    async def get(self, lane: int) -> None: ...

    async def download(self, lane: int) -> None: ...

    async def upload(self, lane: int) -> None: ...


class ClientModule(Protocol):
    LOOP: Literal["trio", "asyncio"]

    def open_client(self, work: Work) -> AbstractAsyncContextManager[Client]: ...


def main() -> None:
    work = Work.from_json(sys.argv[1])
    module = cast(ClientModule, importlib.import_module(f".clients.{work.module}", __package__))
    if module.LOOP == "asyncio":
        asyncio.run(serve(module, work, drain_on_asyncio))
    else:
        trio.run(serve, module, work, drain_on_trio)


async def serve(module: ClientModule, work: Work, drain: Drain) -> None:
    sockets = count_sockets()
    async with module.open_client(work) as client:
        send = cast(Send, getattr(client, work.case.operation))
        emit(await warm_up(send, work, drain, sockets))
        # The loop stands still while another client is being measured.
        for line in iter(sys.stdin.readline, ""):
            gc.collect()
            emit(await drain(send, work.lanes, int(line)))


async def warm_up(send: Send, work: Work, drain: Drain, sockets: int) -> Sample:
    """Open all connections. The last sample tells roughly what a request costs."""
    for _ in range(WARM_UPS):
        sample = await drain(send, work.lanes, work.lanes)
        opened = count_sockets() - sockets
        if opened >= work.case.connections:
            # Connecting made the sample too dear; where that is dear itself, the sample has to do.
            return sample if sample.cpu > 1 else await drain(send, work.lanes, work.lanes)
    raise RuntimeError(f"{work.client} has only {opened} of {work.case.connections} connections open")


def count_sockets() -> int:
    return sum(is_socket(int(name)) for name in os.listdir("/dev/fd"))


def is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        # The one that listed the folder is closed by now.
        return False


def emit(sample: Sample) -> None:
    print(json.dumps(asdict(sample)), flush=True)


if __name__ == "__main__":
    main()
