"""HTTP: the exchange of a request and its response, and the connections that carry exchanges.

Does not depend on the pool or its scheduling: a connection reports its events to its `Owner`.
Imports the modules at the top of the package, and `_connect`.
"""
