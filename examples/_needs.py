"""A hint for who runs an example without the packages that it needs besides trio_exchange."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed() -> Iterator[None]:
    """Around imports: where a package is missing, exit and say how to install what the examples need."""
    try:
        yield
    except ModuleNotFoundError as exc:
        package = str(exc.name).partition(".")[0].replace("_", "-")
        sys.exit(
            f"This example needs the package {package}, which is not installed. For all examples:\n\n"
            "    pip install socksio trio-websocket trustme wsproto\n"
        )
