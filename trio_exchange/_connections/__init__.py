"""Which request uses which connection, and the tasks in which connections run.

Treats connections of every protocol alike, by their capacity; creates those of both protocols.
Imports the modules at the top of the package, `_connect` and `_http`.
"""
