"""HTTP: a request's exchange with its response, and the connections that carry exchanges.

Knows neither the pool nor who gets which connection: a connection tells its owner what happens to it.
Imports the modules at the top of the package, and `_connect`.
"""
