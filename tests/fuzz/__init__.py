"""Fuzzing of what servers send: a client meets arbitrary bytes, and must neither break nor hang."""
