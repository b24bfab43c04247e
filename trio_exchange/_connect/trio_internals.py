"""All that this package does with Trio beyond its documented interfaces.

Checked on Trio 0.35.0. Each function says what it is needed for. Where another version lacks one of
the names used here, `tests/test_private_names.py` fails and says which.
"""

from __future__ import annotations

import ssl
from typing import Any

import trio


def undecrypted_bytes(stream: trio.SSLStream[Any]) -> int:
    """How many bytes were received from below TLS and not decrypted yet.

    An idle connection on which something has arrived can't take a request, and Trio offers no way to ask.
    """
    pending: int = stream._incoming.pending
    return pending


def ssl_object_of(stream: trio.SSLStream[Any]) -> ssl.SSLObject | trio.SSLStream[Any]:
    """The object that does the encryption; the stream itself, which has its methods, where Trio hides it.

    httpcore promises an `ssl.SSLObject` as the extra information `ssl_object`.
    """
    found: ssl.SSLObject | trio.SSLStream[Any] = getattr(stream, "_ssl_object", stream)
    return found
