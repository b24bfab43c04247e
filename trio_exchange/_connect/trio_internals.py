"""Everything that this package uses of Trio and that Trio does not document.

Checked on Trio 0.31 and 0.35. `tests/test_trio_internals.py` fails when a release of Trio changes one of
these.
"""

from __future__ import annotations

import re
import ssl
from typing import Any

import trio

#: The `strerror` that `trio.open_tcp_stream` gives to a failed attempt: the address as a tuple, the reason.
FAILED_ATTEMPT = re.compile(r"Error connecting to \('([^']*)', ([0-9]+)[^)]*\): .*")


def ssl_object(stream: trio.SSLStream[Any]) -> ssl.SSLObject:
    """Return the `ssl.SSLObject` of a TLS stream.

    `trio.SSLStream` forwards the object's methods, but offers no public name for the object itself, which
    is what `get_extra_info("ssl_object")` returns in httpcore.
    """
    inner: ssl.SSLObject = stream._ssl_object
    return inner


def has_undecrypted(stream: trio.SSLStream[Any]) -> bool:
    """Return whether a TLS stream has received bytes that it has not decrypted yet.

    Without this, an idle connection that has received a whole record, such as one with a close_notify,
    would look quiet: the bytes are in the `ssl.MemoryBIO` and no longer in the socket.
    """
    return bool(stream._incoming.pending)
