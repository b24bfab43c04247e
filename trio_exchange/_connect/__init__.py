"""Establishing connections: dialling, TLS, and the streams that come of it.

Knows what a connection runs on, and nothing of what is spoken there.
Imports the modules at the top of the package, and nothing of the other folders.
"""
