"""Dialling through proxies: CONNECT tunnels, SOCKS and chains of both, and requests that a proxy forwards.

Each proxy is a `Dialer`, made with the dialer that connects to the proxy. `Proxy` itself is in `_models`.
Imports the modules at the top of the package, `_connect`, `_http` and `_connections`.
"""
