"""Dialling through proxies: tunnels by CONNECT, SOCKS, chains of them, and requests that a proxy forwards.

Knows proxies as dialers, each built on the dialer that leads to it.
Imports the modules at the top of the package, `_connect`, `_http` and `_connections`.
"""
