"""The trace extension: what a request spends its time on.

This example needs trustme and wsproto: pip install trustme wsproto
"""

from __future__ import annotations

from typing import Any, NamedTuple

import trio

from examples import _peers
from trio_exchange import ConnectionPool

#: What to call a phase, and the trace points that it begins and ends with.
PHASES = [
    ("connect", "connection.connect_tcp", "connection.connect_tcp"),
    ("TLS", "connection.start_tls", "connection.start_tls"),
    ("send", "http11.send_request_headers", "http11.send_request_body"),
    ("first byte", "http11.receive_response_headers", "http11.receive_response_headers"),
    ("body", "http11.receive_response_body", "http11.receive_response_body"),
]


class Phase(NamedTuple):
    """Seconds, counted from the request's first event."""

    name: str
    begin: float
    end: float


class Timeline:
    """A trace handler that notes when each event came."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}

    async def __call__(self, event: str, info: dict[str, Any]) -> None:
        self._times[event] = trio.current_time()

    def phases(self) -> list[Phase]:
        """Those that the request went through."""
        times = self._times
        zero = min(times.values())
        return [
            Phase(name, times[f"{first}.started"] - zero, times[f"{last}.complete"] - zero)
            for name, first, last in PHASES
            if f"{first}.started" in times
        ]

    def draw(self, width: int, bar: str = "#", hairline: str = "|") -> list[str]:
        """One line for each phase: its name, its milliseconds, and a bar where it lies in time."""
        phases = self.phases()
        scale = width / max(phase.end for phase in phases)
        lines = []
        for name, begin, end in phases:
            column = min(int(begin * scale), width - 1)
            mark = bar * round((end - begin) * scale) or hairline
            lines.append(f"{name:10} {(end - begin) * 1000:8.2f} ms  {' ' * column}{mark[: width - column]}")
        return lines


async def main(url: str) -> None:
    async with ConnectionPool() as pool:
        for _ in range(2):
            timeline = Timeline()
            response = await pool.request("GET", f"{url}/story", extensions={"trace": timeline})
            print(f"{response.status}, {len(response.content)} bytes")
            for line in timeline.draw(width=50):
                print(f"  {line}")


if __name__ == "__main__":
    _peers.run(main, _peers.https_site)
