from __future__ import annotations

import signal
import ssl
from collections.abc import Iterator

import pytest
import trustme

from tests.harness.certificates import make_tls


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
