from __future__ import annotations

import signal
import ssl
from collections.abc import Iterator

import hypothesis
import pytest
import trio
import trustme

from tests.harness.certificates import make_tls
from tests.harness.exchanges import Client
from tests.harness.networks import Network, Sockets

# A busy machine would break deadlines. Each test has the overall time limit.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return make_tls().ca


@pytest.fixture(scope="session")
def server_context() -> ssl.SSLContext:
    return make_tls().server


@pytest.fixture(scope="session")
def client_context() -> ssl.SSLContext:
    return make_tls().client


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, also where a shell has started the tests in the background, and so ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["http11", "http11-tls", "http2", "http2-tls"])
def client(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Client:
    """For what holds in both versions of HTTP, without and with TLS."""
    version, _, tls = request.param.partition("-")
    return Client(nursery, http2=version == "http2", tls=bool(tls))


@pytest.fixture
def network(nursery: trio.Nursery) -> Network:
    """For pools whose connections are streams in memory."""
    return Network(nursery)


@pytest.fixture
def tcp(nursery: trio.Nursery) -> Sockets:
    """For pools whose connections are sockets."""
    return Sockets(nursery)


@pytest.fixture
def tls(nursery: trio.Nursery) -> Sockets:
    """For pools whose connections are sockets with TLS."""
    return Sockets(nursery, make_tls().server)


@pytest.fixture(params=["tcp", "tls"])
def sockets(request: pytest.FixtureRequest) -> Sockets:
    """For what holds on sockets without and with TLS."""
    found: Sockets = request.getfixturevalue(request.param)
    return found
