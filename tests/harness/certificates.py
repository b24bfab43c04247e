"""Certificates and TLS contexts of the tests' servers and clients."""

from __future__ import annotations

import functools
import ssl
from dataclasses import dataclass

import trio
import trustme


@dataclass(frozen=True)
class TLS:
    """A certificate authority, a server that it has certified, and a client that trusts it."""

    ca: trustme.CA
    server: ssl.SSLContext
    client: ssl.SSLContext


@functools.cache
def make_tls() -> TLS:
    """Certificates of origins for all tests of a run."""
    return new_tls("127.0.0.1", "localhost", "example.com")


def new_tls(*names: str) -> TLS:
    """A certificate for a server of these names."""
    ca = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(server)
    return TLS(ca, server, client_context(ca))


def client_context(ca: trustme.CA) -> ssl.SSLContext:
    """A fresh context that trusts `ca` alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(context)
    return context


async def fail_handshake(stream: trio.abc.Stream, context: ssl.SSLContext) -> None:
    """Play the server of a TLS handshake that fails, and send the alert, which Trio's stream does not."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    failed = False
    while not failed:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await stream.send_all(outgoing.read())
            incoming.write(await stream.receive_some())
        except ssl.SSLError:
            failed = True
        else:
            raise AssertionError("the handshake has not failed")
    await stream.send_all(outgoing.read())


def demanding_context(ca: trustme.CA, *names: str) -> ssl.SSLContext:
    """A server's context that demands a certificate from its clients."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names).configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@functools.cache
def alpn_server(*protocols: str) -> ssl.SSLContext:
    """A server of any name that a test uses, which chooses the first of `protocols` that the client offers.

    Its certificate is by the authority of `make_tls`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = ("127.0.0.1", "localhost", "example.com", "proxy.example", "second.example")
    make_tls().ca.issue_cert(*names, "refused.example", "*.origin.example").configure_cert(context)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context
