"""Servers for the interop tests, which are skipped where one is missing, unless that is forbidden."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator

import pytest

from .nginx import Nginx, find_nginx, running_nginx
from .process import Process, missing

REQUIRE_SERVERS = "TRIO_EXCHANGE_REQUIRE_SERVERS"
NGINX_LOG = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interop: talks to a real server")


@pytest.fixture(scope="session")
def shared_nginx() -> Iterator[Nginx]:
    _require_nginx()
    with running_nginx() as server:
        yield server


@pytest.fixture
def nginx(shared_nginx: Nginx, request: pytest.FixtureRequest) -> Nginx:
    # Only what this test adds to the log is of interest when it fails.
    request.node.stash[NGINX_LOG] = len(shared_nginx.error_log())
    return shared_nginx


@pytest.fixture
def own_nginx() -> Iterator[Nginx]:
    """For tests that disturb the server."""
    _require_nginx()
    with running_nginx() as server:
        yield server


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """Skips, or fails, where a server program is missing."""

    def check(program: str) -> None:
        _require(missing(program))

    return check


def _require_nginx() -> None:
    if find_nginx() is None:
        _require("nginx is not installed (Debian: apt-get install nginx-light)")


def _require(message: str | None) -> None:
    if message is None:
        return
    if os.environ.get(REQUIRE_SERVERS) == "1":
        pytest.fail(f"{message}, and {REQUIRE_SERVERS}=1 demands it")
    pytest.skip(message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for name, server in getattr(item, "funcargs", {}).items():
            if isinstance(server, Nginx) and name != "shared_nginx":
                log = server.error_log()[item.stash.get(NGINX_LOG, 0) :]
                report.sections.append(("nginx error log", log))
            elif isinstance(server, Process):
                report.sections.append((f"the end of what {name} said", server.error_log()[-5000:]))
    return report
