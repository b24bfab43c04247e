"""Examples: each runs offline, as `python -m examples.NAME` from the folder above.

Besides trio_exchange they need the packages that their docstrings name; for all of them:

    pip install socksio trio-websocket trustme wsproto
"""
