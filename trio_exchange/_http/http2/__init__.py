"""HTTP/2: the connection, its streams and tunnels, and the frames and headers on the wire.

Does not depend on HTTP/1.1, which is in `_http/http11.py`.
Imports the packages that `_http` imports, and the modules of `_http` that both protocols share.
"""
