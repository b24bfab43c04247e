"""Which request gets which connection, and whose tasks the connections are.

Knows connections by what they can carry, and makes those of either protocol.
Imports the modules at the top of the package, `_connect` and `_http`.
"""
