from __future__ import annotations

import signal
import ssl
from collections.abc import Iterator

import pytest
import trustme

from .peers import make_tls


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
    """SIGINT interrupts, also in a program that was started with it ignored, as shells do in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
