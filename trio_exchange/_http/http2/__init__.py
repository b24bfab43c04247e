"""HTTP/2: the connection, its streams and tunnels, and the frames and headers on the wire.

Knows nothing of HTTP/1.1, which is in `http11` beside this folder.
Imports what the rest of `_http` imports, and the parts of that which both protocols share.
"""
