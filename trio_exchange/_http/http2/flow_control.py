"""The windows of HTTP/2 (RFC 9113, 5.2): how much a server may send before it is read."""

from __future__ import annotations

# A stream's window at first, and at most; and the connection's, which has to be well above.
INITIAL_WINDOW = 256 * 1024
LARGEST_WINDOW = 8 * 1024 * 1024
CONNECTION_WINDOW = 2 * LARGEST_WINDOW
