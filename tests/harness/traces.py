"""The recorder of trace events."""

from __future__ import annotations

from typing import Any


class Events:
    """A trace handler that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, event: str, info: dict[str, Any]) -> None:
        self.seen.append((event, info))

    @property
    def names(self) -> list[str]:
        return [event for event, _ in self.seen]

    def infos(self, event: str) -> list[dict[str, Any]]:
        """What was told of an event, each time."""
        return [info for name, info in self.seen if name == event]

    def info(self, event: str) -> dict[str, Any]:
        """What was told of an event that came once."""
        [info] = self.infos(event)
        return info


def both_ends(*names: str) -> list[str]:
    return [f"{name}.{end}" for name in names for end in ("started", "complete")]
