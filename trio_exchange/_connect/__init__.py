"""Establishing connections: dialling, TLS, and the byte streams that a connection reads and writes.

Contains nothing about the protocol that is spoken on a connection.
Imports the modules at the top of the package, and nothing of the other folders.
"""
