"""The requests of the soak, and what their ends are held against."""

from __future__ import annotations

import itertools
import time
import traceback
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio

from trio_exchange import ConnectionPool, ExchangeError, Response

from .plans import KINDS, Fault, Plan, Upload, content, make_plan, pieces
from .servers import fingerprint

# No request takes as long, whatever is done to it.
_HANGS_AFTER = 30.0
# How long one may still take that was cancelled.
_CANCELLED_LATE_AFTER = 10.0
_TIMEOUTS = {"connect": 20.0, "read": 20.0, "write": 20.0, "pool": 20.0}
#: What comes from the proxy of the examples when it got no answer.
_PROXY_ERRORS = (502, 504)


class Mismatch(Exception):
    """An answer is not that of its request."""


class UploadFailure(Exception):
    """What the iterator of a failing upload raises."""


class Pieces:
    """An asynchronous iterator of a body."""

    def __init__(self, body: bytes, upload: Upload) -> None:
        self._pieces = iter(pieces(body))
        self._left = 2 if upload.kind == "failing" else -1
        self._pause = upload.pause

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.sleep(self._pause)
        if self._left == 0:
            raise UploadFailure
        self._left -= 1
        for piece in self._pieces:
            return piece
        if self._left >= 0:
            raise UploadFailure
        raise StopAsyncIteration


class Requests:
    """Sends requests, and counts how they end.

    Args:
        seed: Of the plans.
        url: Gives the URL of an origin: whether it is rough, whether it has TLS.
        new_pool: Makes a pool for the requests that have one of their own.

    Attributes:
        pools: By name.
        outcomes: How many requests of each pool ended in each way.
        faults: How many requests there were for each of the servers' faults.
        problems: What should not have happened.
        total: How many requests there were.
    """

    def __init__(
        self, seed: int, url: Callable[[bool, bool], str], new_pool: Callable[[], ConnectionPool]
    ) -> None:
        self._seed = seed
        self._url = url
        self._new_pool = new_pool
        self._numbers = itertools.count()
        self._serial = itertools.count()
        self.only: int | None = None
        self.pools: dict[str, ConnectionPool] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.total = 0

    async def work(self, until: float, nursery: trio.Nursery) -> None:
        """Send one request after the other; the nursery is for what is done beside them."""
        self._nursery = nursery
        while time.monotonic() < until and not self.problems:
            index = next(self._numbers) if self.only is None else self.only
            await self.one(make_plan(self._seed, index))

    async def one(self, plan: Plan) -> None:
        """Send a request, and note how it ends."""
        nonce = f"{plan.index}-{next(self._serial)}"
        begun = trio.current_time()
        outcome = "hangs"
        with trio.move_on_after(_HANGS_AFTER):
            outcome = await self._outcome(plan, nonce)
        self.total += 1
        self.outcomes[plan.pool, outcome] += 1
        self.faults[plan.fault.value] += 1
        late = trio.current_time() - begun - _CANCELLED_LATE_AFTER
        if outcome == "hangs":
            self.problem(plan, f"it did not end within {_HANGS_AFTER:g} seconds")
        elif outcome == "cancelled" and plan.cancel_after is not None and late > plan.cancel_after:
            self.problem(plan, f"it ended {late + _CANCELLED_LATE_AFTER:.1f} seconds after it was cancelled")

    def problem(self, plan: Plan, what: str, exc: BaseException | None = None) -> None:
        """Note what should not have happened, with what one has to know to find out why."""
        lines = [f"request {plan.index}: {what}", f"  {plan}"]
        if plan.pool in self.pools:
            pool = self.pools[plan.pool]
            lines += [f"  {pool}", *(f"    {connection}" for connection in pool.connections)]
        if exc is not None:
            lines += ["".join(traceback.format_exception(exc))]
        self.problems.append("\n".join(lines))

    async def _outcome(self, plan: Plan, nonce: str) -> str:
        error: ExchangeError | None = None
        with trio.CancelScope() as scope:
            if plan.cancel_after is not None:
                scope.deadline = trio.current_time() + plan.cancel_after
            try:
                return await self._send(plan, nonce)
            except UploadFailure as exc:
                if plan.upload is None or plan.upload.kind != "failing":
                    self.problem(plan, "another's upload has failed", exc)
                return "UploadFailure"
            except ExchangeError as exc:
                error = exc
            except Exception as exc:
                self.problem(plan, f"it ended in {exc!r}", exc)
                return type(exc).__name__
        if error is None:
            return "cancelled"
        if plan.must_succeed:
            self.problem(plan, f"it ended in {error!r}, though nothing was done to it", error)
        return type(error).__name__

    async def _send(self, plan: Plan, nonce: str) -> str:
        if plan.pool in self.pools:
            return await self._exchange(self.pools[plan.pool], plan, nonce)
        async with self._new_pool() as pool:
            if plan.close_after is not None:
                self._nursery.start_soon(_close, pool, plan.close_after)
            return await self._exchange(pool, plan, nonce)

    async def _exchange(self, pool: ConnectionPool, plan: Plan, nonce: str) -> str:
        url = f"{self._url(plan.rough, plan.tls)}/{plan.index}"
        headers = {"X-Nonce": nonce}
        body = b""
        if plan.fault is Fault.DEAF:
            headers["X-Deaf"] = "yes"
        if plan.upload is not None:
            body = content(nonce, plan.upload.size)
            if plan.upload.expects_continue:
                headers["Expect"] = "100-continue"
        timeouts = dict(_TIMEOUTS)
        if plan.timeout is not None:
            timeouts[plan.timeout[0]] = plan.timeout[1]
        extensions: dict[str, Any] = {"timeout": timeouts, "informational": _Informed(nonce)}
        if plan.traced:
            extensions["trace"] = _trace
        async with pool.stream(
            plan.method, url, headers=headers, content=_to_content(plan.upload, body), extensions=extensions
        ) as response:
            if response.status in _PROXY_ERRORS and plan.pool == "own proxy":
                return "refused by the proxy"
            _check_head(response, plan, nonce, body)
            if not await _consume(response, plan, nonce):
                return "left"
        return "answered"

    async def tunnel(self, name: str, host: str, port: int) -> None:
        """Send bytes to a server that echoes them, and receive them to their end."""
        nonce = f"tunnel-{next(self._serial)}"
        sent = content(nonce, 50_000)
        received = b""
        stream = await self.pools[name].open_tcp_stream(host, port)
        async with stream, trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            nursery.start_soon(send)
            async for data in stream:
                received += data
        self.outcomes[f"{name}, raw", "answered" if received == sent else "mismatch"] += 1
        self.total += 1
        if received != sent:
            self.problems.append(f"a raw stream of the pool {name!r} gave {len(received)} other bytes")

    def known(self) -> list[str]:
        """The names of the pools through which raw streams go."""
        return [name for name in self.pools if not KINDS[name].shaky]


class _Informed:
    """The callback for informational responses."""

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce

    async def __call__(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await trio.lowlevel.checkpoint()
        # A proxy sends 100 (Continue) of its own.
        if _nonce_of(headers) != self._nonce and status != 100:
            raise Mismatch(f"{self._nonce} was informed with {status}, {headers}")


async def _trace(event: str, info: dict[str, Any]) -> None:
    await trio.lowlevel.checkpoint()


async def _close(pool: ConnectionPool, after: float) -> None:
    await trio.sleep(after)
    await pool.aclose()


def _to_content(upload: Upload | None, body: bytes) -> Any:
    match upload:
        case None:
            return None
        case Upload(kind="bytes"):
            return body
        case Upload(kind="list"):
            return pieces(body)
    return Pieces(body, upload)


def _nonce_of(headers: list[tuple[bytes, bytes]]) -> str | None:
    return next((value.decode() for name, value in headers if name.lower() == b"x-nonce"), None)


def _check_head(response: Response, plan: Plan, nonce: str, body: bytes) -> None:
    headers = response.headers
    if _nonce_of(headers) != nonce:
        raise Mismatch(f"{nonce} was answered {response.status}, {headers}")
    if response.status != plan.status:
        raise Mismatch(f"{nonce} was answered {response.status}, not {plan.status}")
    received = next((value for name, value in headers if name.lower() == b"x-upload"), None)
    if received is not None and received != fingerprint(len(body), zlib.crc32(body)).encode():
        raise Mismatch(f"{nonce} sent {len(body)} bytes, and the server got {received!r}")


async def _consume(response: Response, plan: Plan, nonce: str) -> bool:
    """Do with a response what the plan says. Whether all of it was received."""
    expected = content(nonce, plan.size) if plan.has_body else b""
    if plan.consume == "unread":
        return False
    if plan.consume == "read":
        received = await response.aread()
    else:
        received = b""
        async for chunk in response.aiter_stream():
            received += chunk
            if not expected.startswith(received):
                raise Mismatch(f"{nonce} got {received[:80]!r}")
            if plan.consume == "part":
                return False
    if received != expected:
        raise Mismatch(f"{nonce} got {len(received)} bytes, not {len(expected)}: {received[:80]!r}")
    trailers = response.extensions["trailing_headers"]
    if plan.trailers and _nonce_of(trailers) != nonce:
        raise Mismatch(f"{nonce} got the trailers {trailers}")
    return True
