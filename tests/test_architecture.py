"""What holds the package together: who imports whom, and what is public and documented."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import traceback
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import trio_exchange
from trio_exchange import testing

from .architecture_picture import PACKAGE, PAGE, arrows, folder_of, imports_of, page, path_of

PROJECT = PACKAGE.parent

# Each folder imports only from those above it, "" being the modules at the top that all may import.
FOLDERS = {
    "": [
        "_exceptions",
        "_conflicts",
        "_public_calls",
        "_fields",
        "_urls",
        "_content",
        "_models",
        "_timeouts",
        "_trace",
    ],
    "_connect": [
        "trio_internals",
        "transport",
        "tls_sessions",
        "tls_stream",
        "handshake",
        "network_stream",
        "attempt",
        "connector",
        "dialers",
        "tls",
        "factory",
    ],
    "_http": [
        "request",
        "message_stream",
        "retry",
        "upload",
        "connection",
        "exchange",
        "http11_explanations",
        "http11_heads",
        "http11_fallback",
        "http11_bodies",
        "http11_sending",
        "http11",
    ],
    "_http.http2": [
        "wakeup",
        "receive_windows",
        "h2_internals",
        "header_compression",
        "frames",
        "framer",
        "reset_ledger",
        "outbound",
        "headers",
        "tunnel",
        "stream",
        "connection",
    ],
    "_connections": ["nursery", "scheduler", "protocols", "manager"],
    "_proxies": ["environment", "http", "socks", "chain"],
}
# What a program sees. It may import from all folders.
SURFACE = [
    "_options",
    "_stream_context",
    "_pool",
    "_api",
    "testing._tls",
    "testing._http11",
    "testing._http2",
    "testing._connector",
    "testing.__init__",
    "__init__",
]

# Each module imports only from those above it.
ORDER = [
    *(
        f"{folder}.{module}" if folder else module
        for folder, modules in FOLDERS.items()
        for module in modules
    ),
    *SURFACE,
]
PACKAGES = [f"{folder}.__init__" for folder in FOLDERS if folder]

PUBLIC = [
    "URL",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionNotAvailable",
    "ConnectionPool",
    "Connector",
    "ExchangeError",
    "Headers",
    "InvalidURL",
    "LocalProtocolError",
    "NetworkError",
    "NetworkStream",
    "Origin",
    "PoolStatistics",
    "PoolTimeout",
    "PooledConnection",
    "ProtocolError",
    "Proxy",
    "ProxyError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "Request",
    "Response",
    "TimeoutException",
    "UnsupportedProtocol",
    "WriteError",
    "WriteTimeout",
    "default_ssl_context",
    "proxy_from_environment",
    "request",
    "stream",
]


# -- Imports.


def test_the_order_has_every_module() -> None:
    found = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    assert sorted([*ORDER, *PACKAGES]) == sorted(".".join(path.parts) for path in found)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    ours = imports_of(module) & {*ORDER, "trio_exchange"}
    assert ours <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_says_in_three_lines_what_it_is_and_may_import(package: str) -> None:
    assert imports_of(package) == set()
    text = ast.get_docstring(ast.parse(path_of(package).read_text())) or ""
    summary, rest = text.split("\n\n")
    assert len([summary, *rest.splitlines()]) == 3
    assert rest.splitlines()[-1].startswith("Imports ")


@pytest.mark.parametrize("module", ORDER)
def test_only_the_pool_and_its_manager_import_the_scheduler(module: str) -> None:
    importers = ("_pool", "_connections.manager")
    assert ("_connections.scheduler" in imports_of(module)) == (module in importers)


@pytest.mark.parametrize("module", [name for name in ORDER if name.startswith("_http.")])
def test_http_knows_neither_pool_nor_scheduler(module: str) -> None:
    assert not {folder_of(name) for name in imports_of(module)} & {"_connections", "_proxies"}
    assert "_pool" not in imports_of(module)


@pytest.mark.parametrize("module", [name for name in ORDER if name.startswith("_connect.")])
def test_connecting_knows_nothing_of_http(module: str) -> None:
    folders = {folder_of(name) for name in imports_of(module) & set(ORDER)}
    assert folders <= {"", "_connect"}


def test_no_protocol_knows_another() -> None:
    assert "_http.http2" not in {folder_of(name) for name in imports_of("_http.http11")}
    assert not {name for name in ORDER if "_http.http11" in imports_of(name)} & {
        f"_http.http2.{module}" for module in FOLDERS["_http.http2"]
    }


def test_the_scheduler_is_pure() -> None:
    assert "trio" not in imports_of("_connections.scheduler")
    tree = ast.parse(path_of("_connections.scheduler").read_text())
    asynchronous = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
    assert not [node for node in ast.walk(tree) if isinstance(node, asynchronous)]


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("h11", {"_http.http11_fallback", "testing._http11"}),
        (
            "h2",
            {
                "_http.http2.connection",
                "_http.http2.stream",
                "_http.http2.framer",
                "_http.http2.frames",
                "_http.http2.h2_internals",
                "testing._http2",
            },
        ),
        (
            "hpack",
            {
                "_http.http2.connection",
                "_http.http2.h2_internals",
                "_http.http2.header_compression",
                "_http.http2.headers",
            },
        ),
        ("idna", {"_urls"}),
        ("socksio", {"_proxies.socks"}),
    ],
)
def test_who_imports_a_protocol(package: str, modules: set[str]) -> None:
    importers = (
        module for module in ORDER if package in {name.partition(".")[0] for name in imports_of(module)}
    )
    assert set(importers) == modules


def test_nobody_catches_too_slow_error() -> None:
    """It might be the user's."""
    names = (
        node
        for module in ORDER
        for node in ast.walk(ast.parse(path_of(module).read_text()))
        if isinstance(node, (ast.Attribute, ast.Name))
    )
    assert "TooSlowError" not in {node.attr if isinstance(node, ast.Attribute) else node.id for node in names}


# -- Public names.


def test_the_public_names() -> None:
    assert sorted(trio_exchange.__all__) == sorted(PUBLIC)


def test_nothing_else_looks_public() -> None:
    visible = {name for name in vars(trio_exchange) if not name.startswith("_")}
    modules = {name for name in visible if isinstance(getattr(trio_exchange, name), types.ModuleType)}
    assert visible - modules == set(trio_exchange.__all__)
    assert modules <= {"testing"}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_shown_without_a_private_module(name: str) -> None:
    thing = getattr(trio_exchange, name)
    assert thing.__module__ == "trio_exchange"
    assert pickle.loads(pickle.dumps(thing)) is thing
    if inspect.isclass(thing):
        typing.get_type_hints(thing)


@pytest.mark.parametrize("name", testing.__all__)
def test_what_is_for_tests_is_shown_in_its_module(name: str) -> None:
    assert getattr(testing, name).__module__ == "trio_exchange.testing"


def test_an_error_is_shown_by_its_public_name() -> None:
    error = trio_exchange.ConnectError("it is down")
    assert traceback.format_exception_only(error) == ["trio_exchange.ConnectError: it is down\n"]
    again = pickle.loads(pickle.dumps(trio_exchange.InvalidURL("no host")))
    assert (type(again), str(again)) == (trio_exchange.InvalidURL, "no host")


def test_the_source_of_functions_and_methods_is_found() -> None:
    assert inspect.getsource(trio_exchange.stream).startswith("def stream(")
    assert "async def request(" in inspect.getsource(trio_exchange.ConnectionPool.request)


def test_completion_offers_public_names_only() -> None:
    offered = {name for name in dir(trio_exchange) if not name.startswith("__")}
    assert offered == {*trio_exchange.__all__, "testing"}
    assert {name for name in dir(testing) if not name.startswith("__")} == set(testing.__all__)


@pytest.mark.parametrize(
    ("thing", "names"),
    [
        (
            trio_exchange.ConnectionPool(),
            "aclose connections handle_async_request open open_tcp_stream request serve statistics stream",
        ),
        (trio_exchange.Request("GET", "http://h"), "extensions headers method stream url"),
        (
            trio_exchange.Response(200),
            "aclose aiter_stream aread content extensions headers status stream",
        ),
        (trio_exchange.URL("http://h"), "host origin port scheme target"),
        (trio_exchange.Proxy("http://h"), "auth headers http2 ssl_context url"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_completion_offers_is_documented(thing: object, names: str) -> None:
    assert [name for name in dir(thing) if not name.startswith("_")] == names.split()


def test_help_begins_with_what_to_do() -> None:
    text = inspect.getdoc(trio_exchange)
    assert text is not None
    for needed in ("trio_exchange.request(", "ConnectionPool(", ".stream(", "`extensions`", "README"):
        assert needed in text
    named = set(re.findall(r"`(\w+)`", text)) - {"extensions"}
    assert {"Request", "Response", "Headers", "URL", "Proxy", "ExchangeError"} <= named
    assert named <= set(trio_exchange.__all__)


def test_a_connection_shows_what_its_public_type_has() -> None:
    shown = {name for name in vars(trio_exchange.PooledConnection) if not name.startswith("_")}
    assert shown == {"origin", "http_version", "state", "requests"}
    connections: Any = vars(trio_exchange.ConnectionPool)["connections"]
    hints = typing.get_type_hints(connections.fget)
    assert hints == {"return": list[trio_exchange.PooledConnection]}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_readme_shows_every_public_name(name: str) -> None:
    code = " ".join(re.findall(r"`+([^`]+)`+", (PROJECT / "README.md").read_text()))
    assert re.search(rf"\b{name}\b", code)


# -- Documentation.


def public_objects() -> Iterator[tuple[str, Any]]:
    """Every public class, function, method and property, and the class that a method belongs to."""
    for module in (trio_exchange, testing):
        for name in module.__all__:
            thing = getattr(module, name)
            yield name, thing
            if inspect.isclass(thing):
                for attribute, value in vars(thing).items():
                    if not attribute.startswith("_") and _is_documentable(value):
                        yield f"{name}.{attribute}", value


def _is_documentable(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))


DOCUMENTED = dict(public_objects())


def test_methods_are_found() -> None:
    assert {"ConnectionPool.request", "NetworkStream.read", "URL.origin", "MemoryConnector"} <= set(
        DOCUMENTED
    )


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_public_has_a_docstring(name: str) -> None:
    # Not inherited: a subclass says what it adds.
    assert (DOCUMENTED[name].__doc__ or "").strip()


# A peer's methods are the tests' side; and a property of a Trio stream is what Trio says.
ASYNC = [
    name
    for name, thing in DOCUMENTED.items()
    if inspect.iscoroutinefunction(thing) and name.partition(".")[0] in PUBLIC
]


def test_asynchronous_functions_are_found() -> None:
    assert {"request", "ConnectionPool.aclose", "Response.aread", "Connector.connect_tcp"} <= set(ASYNC)


@pytest.mark.parametrize("name", ASYNC)
def test_what_is_asynchronous_says_what_cancellation_does(name: str) -> None:
    """Itself, or its class for all its methods, or by reference to Trio's interface."""
    owner = name.partition(".")[0]
    text = f"{DOCUMENTED[name].__doc__} {DOCUMENTED[owner].__doc__}"
    assert re.search(r"cancel|`trio\.abc\.\w+` says", text, re.IGNORECASE)


@pytest.mark.parametrize("module", ORDER)
def test_every_module_opens_with_what_it_is_about(module: str) -> None:
    assert ast.get_docstring(ast.parse(path_of(module).read_text()))


def test_the_architecture_page_is_up_to_date() -> None:
    """If it is not, `python -m tests.architecture_picture` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_picture_has_arrows_down_and_none_up() -> None:
    assert ("_proxies", "_connections") in arrows()
    assert ("_connections", "_http.http2") in arrows()
    assert not {(target, source) for source, target in arrows()} & arrows()
