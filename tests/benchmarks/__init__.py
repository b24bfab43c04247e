"""CPU time per request of this client and of others, against nginx on loopback: ``python -m tests.benchmarks``."""
