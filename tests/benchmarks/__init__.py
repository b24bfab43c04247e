"""CPU time per request of this client and of others: `python -m tests.benchmarks`."""
