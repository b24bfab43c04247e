"""Everything that this package uses of Trio and that Trio does not document.

Checked on Trio 0.31 and 0.35. `tests/connect/test_trio_internals.py` fails when a release of Trio changes
one of these.
"""

from __future__ import annotations

import re
from typing import Any

import trio

#: The `strerror` that `trio.open_tcp_stream` gives to a failed attempt: the address as a tuple, the reason.
FAILED_ATTEMPT = re.compile(r"Error connecting to \('([^']*)', ([0-9]+)[^)]*\): .*")


def ssl_object(stream: trio.SSLStream[Any]) -> Any:
    """Return the `ssl.SSLObject` of a TLS stream, or the stream, which forwards the object's methods.

    `trio.SSLStream` offers no public name for the object itself, which is what `get_extra_info("ssl_object")`
    returns in httpcore.
    """
    return getattr(stream, "_ssl_object", stream)


def has_undecrypted(stream: trio.SSLStream[Any]) -> bool:
    """Return whether a TLS stream has received bytes that it has not decrypted yet.

    Without this, an idle connection that has received a whole record, such as one with a close_notify,
    would look quiet: the bytes are in the `ssl.MemoryBIO` and no longer in the socket.
    """
    return bool(stream._incoming.pending)
