from __future__ import annotations

import ssl

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
