"""Examples: each runs offline, as `python -m examples.NAME` from the folder above."""
