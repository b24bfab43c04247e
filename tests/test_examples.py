"""The examples, run as their readers run them, and what they print."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
EXAMPLES = {path.stem for path in ROOT.glob("examples/[a-z]*.py")}
STORY_END = "Then the doors closed, and nothing was left behind."


def run(
    *arguments: str, environment: dict[str, str] | None = None, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )


def output_of(*arguments: str, environment: dict[str, str] | None = None, folder: Path = ROOT) -> str:
    """What a successful run printed. Warnings and leaks would be on stderr."""
    result = run(*arguments, environment=environment, folder=folder)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


#: Regular expressions for lines that the example prints, in this order, among others.
EXPECTED = {
    "get": [
        r"200 OK",
        r"Content-Length: 24",
        r"Hello, localhost:\d+!",
        r" 40 bytes: A nursery opened its doors one morning\.",
        rf" 52 bytes: {re.escape(STORY_END)}",
    ],
    "upload": [
        r" +0 of 2097152 bytes +",
        r" +262144 of 2097152 bytes  #{5}",
        r" 2097152 of 2097152 bytes  #{40}",
        r"the server has got 2097152 bytes, SHA-256 [0-9a-f]{64}",
        r"what was sent was  2097152 bytes, SHA-256 [0-9a-f]{64}",
    ],
    "timeouts": [
        r"200",
        r"ConnectTimeout: .* 0\.1 seconds, at last in the TLS handshake with localhost",
        r"WriteTimeout: .* 0\.1 seconds",
        r"ReadTimeout: .* 0\.1 seconds",
        r"PoolTimeout: .* 0\.01 seconds; connections: 1 of at most 1 \(1 active, .+",
        r"Cancelled: it took longer than 0\.1 seconds in all",
        r"200",
    ],
    "timeline": [
        r"200, 236 bytes",
        r"  connect +\d+\.\d\d ms  .+",
        r"  TLS +\d+\.\d\d ms  .+",
        r"  send +\d+\.\d\d ms  .+",
        r"  first byte +\d+\.\d\d ms  .+",
        r"  body +\d+\.\d\d ms  .+",
        r"200, 236 bytes",
        r"  send +\d+\.\d\d ms  .+",
        r"  first byte +\d+\.\d\d ms  .+",
        r"  body +\d+\.\d\d ms  .+",
    ],
    "websocket": [
        r"sent:     Hello!",
        r"received: Hello!",
        r"received: Is anybody there\?",
        r"received: Good-bye\.",
        r"closed",
    ],
    "tunnel": [
        r"TLS with localhost behind the proxy",
        r"HTTP/1\.1 200 OK",
        r"Hello, localhost:\d+!",
    ],
    "port_forwarder": [
        r"connecting to localhost:\d+",
        r"socks5h://localhost:\d+: connect to localhost:\d+",
        r"http://localhost:\d+: CONNECT localhost:\d+",
        r"sent:     1048576 bytes, SHA-256 [0-9a-f]{64}",
        r"received: [0-9a-f]{64}",
    ],
    "proxy_server": [
        r"http://localhost:\d+: 200 Hello, localhost:\d+!",
        r"Via: 1\.1 trio-exchange",
        r"https://localhost:\d+: 200 Hello, localhost:\d+!",
        r"http://localhost:25/: 502 .+ connection not allowed by ruleset \(2\)",
        r"no tunnel to localhost:25 .+: 502 Bad Gateway",
    ],
    "websocket_proxy": [
        r"connection\.connect_tcp",
        r"proxy\.start_tls",
        r"proxy\.connect",
        r"connection\.start_tls",
        r"received: Good-bye\.",
        r"closed",
    ],
    "trio_websocket_client": [
        r"sent:     Hello!",
        r"received: Hello!",
        r"received: Good-bye\.",
        r".*code=1000.*",
    ],
    "ssl_over_tunnel": [
        r"the proxy answered 200 over HTTP/2",
        r"TLSv1\.3 with localhost",
        r"HTTP/1\.1 200 OK",
        r"Hello, localhost:\d+!",
    ],
    "multiplexing": [
        r"stream +\d+: cancelled while it waits for its answer",
        *[r"stream +\d+: 200, 236 bytes"] * 9,
        r"connections opened: 1",
        r"<HTTP2Connection .+, HTTP/2, idle, 0 streams, 10 requests>",
    ],
    "duplex": [
        r"200 on stream 1, before anything was sent",
        r"sent:     ping",
        r"received: ping",
        r"sent:     ping ping ping ping",
        r"received: ping ping ping ping",
        r"\{b'status': b'ok'\}",
    ],
    "websocket_http2": [
        r"open on stream 1",
        r"open on stream 3",
        r"received: Hello, I am Ben\.",
        r"received: Hello, I am Ann\.",
        r"connections opened: 1",
        r"closed",
        r"received: Are you still there\?",
    ],
    "unix_socket": [r"200 Hello, service!"],
    "demo": [
        r"trio_exchange \d.*",
        r"1\. One request, phase by phase",
        r" +connect +\d+\.\d\d ms +.+",
        rf" +│ {re.escape(STORY_END)}",
        r" +✓ every phase was traced",
        r" +✓ no connect, no TLS",
        r" +✓ and all that the socket ever spoke with is the proxy",
        r" +✓ 3 messages came back as they were sent",
        r" +before  <ConnectionPool open: 6 active, 0 idle, 0 connecting, 0 waiting>",
        r" +after   <ConnectionPool open: 0 active, 5 idle, 0 connecting, 0 waiting>",
        r" +✓ it was cancelled while it waited for its answer",
        r"6\. The same over HTTP/2: one connection carries them all",
        r" +│( (3|5|7|9|11|1)){25}",
        r" +✓ both sides chose HTTP/2 in the TLS handshake",
        r" +✓ requests at once: 6, connections opened: 1",
        r" +✓ one was cancelled in the midst of them",
        r"7\. Proxies: forwarding, tunnels in one connection, a chain, a refusal",
        r" +✓ the proxy has put its name to what it forwarded",
        r" +✓ tunnels: 2, as streams of one HTTP/2 connection",
        r" +✓ each has TLS of its own inside, and an answer",
        r" +│ socks\.connect",
        r" +✓ SOCKS5, then an https proxy, then the origin: TLS in TLS",
        r" +ProxyError: 403 Forbidden",
        r" +│ This proxy carries no mail\.",
        r" +✓ a refusal comes with the proxy's words",
        r" +✓ raised after \d+ ms",
        r" +✓ 8 connections were opened, 0 are left",
        r"All \d+ checks passed, in \d\.\d seconds\.",
    ],
}


def test_every_example_is_run() -> None:
    assert set(EXPECTED) == EXAMPLES


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example(name: str) -> None:
    output = output_of("-m", f"examples.{name}")
    lines = iter(output.splitlines())
    for pattern in EXPECTED[name]:
        assert any(re.fullmatch(pattern, line) for line in lines), f"{pattern!r} is missing in:\n{output}"


# -- What they need besides trio_exchange.


def packages_of(requirements: list[str]) -> set[str]:
    return {Requirement(line).name for line in requirements}


PEERS: set[str] = packages_of(
    tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["peers"]
)


def needs_of(name: str) -> set[str]:
    """The packages that an example says it needs."""
    docstring = ast.get_docstring(ast.parse((ROOT / f"examples/{name}.py").read_text(encoding="utf-8"))) or ""
    (command,) = re.findall(r"^This example needs .+: pip install (.+)$", docstring, re.MULTILINE)
    return packages_of(command.split())


def run_without(packages: set[str], name: str) -> subprocess.CompletedProcess[str]:
    """Run an example as if these packages were not installed."""
    absent = {package.replace("-", "_"): None for package in packages}
    code = f"import runpy, sys; sys.modules.update({absent})"
    return run("-c", f"{code}; runpy.run_module('examples.{name}', run_name='__main__')")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_needs_no_other_packages_than_it_says(name: str) -> None:
    assert needs_of(name) <= PEERS
    result = run_without(PEERS - needs_of(name), name)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "package"), [(name, package) for name in sorted(EXPECTED) for package in sorted(needs_of(name))]
)
def test_an_example_says_how_to_install_what_is_missing(name: str, package: str) -> None:
    result = run_without({package}, name)
    assert (result.returncode, result.stdout) == (1, "")
    (first, command) = result.stderr.strip().split("\n\n")
    assert f"needs the package {package}," in first
    assert packages_of(command.removeprefix("    pip install ").split()) == PEERS


def test_the_hint_for_all_examples_is_about_the_packages_of_the_group() -> None:
    (command,) = re.findall(r"pip install (.+)", (ROOT / "examples/__init__.py").read_text(encoding="utf-8"))
    assert packages_of(command.split()) == PEERS


# -- One by one.


def test_reused_connection_is_not_made_again() -> None:
    output = output_of("-m", "examples.timeline")
    assert (output.count("connect "), output.count("TLS "), output.count("body ")) == (1, 1, 2)


def test_every_request_has_a_stream_of_its_own() -> None:
    numbers = re.findall(r"stream +(\d+): ", output_of("-m", "examples.multiplexing"))
    assert sorted(map(int, numbers)) == list(range(1, 20, 2))


def test_upload_arrives_as_it_was_sent() -> None:
    digests = re.findall(r"SHA-256 (\w+)", output_of("-m", "examples.upload"))
    assert len(digests) == 2
    assert digests[0] == digests[1]


def test_what_went_through_the_port_arrived_as_it_was_sent() -> None:
    digests = re.findall(r"\b[0-9a-f]{64}\b", output_of("-m", "examples.port_forwarder"))
    assert len(digests) == 2
    assert digests[0] == digests[1]


def test_example_as_script(tmp_path: Path) -> None:
    assert STORY_END in output_of(str(ROOT / "examples" / "get.py"), folder=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_demo_fits_a_plain_terminal(encoding: str) -> None:
    output = output_of("-m", "examples.demo", environment={"PYTHONUTF8": "0", "PYTHONIOENCODING": encoding})
    assert output.isascii() == (encoding == "ascii")
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_demo_has_colours_on_a_terminal_only(no_color: str) -> None:
    show_on_terminal = (
        "import os, pty, sys;"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, '-m', 'examples.demo'])))"
    )
    output = output_of("-c", show_on_terminal, environment={"NO_COLOR": no_color})
    assert "checks passed" in output
    assert ("\x1b[" in output) is (not no_color)


@pytest.mark.parametrize(
    ("sabotage", "complaint"),
    [
        pytest.param(
            "import functools, trio_exchange as t;"
            "t.ConnectionPool = functools.partial(t.ConnectionPool, max_keepalive_connections=0)",
            "NOT TRUE: no connect, no TLS",
            id="no reuse",
        ),
        pytest.param(
            "from examples.websocket import WebSocket as W; send = W.send;"
            "W.send = lambda self, text: send(self, text.upper())",
            "NOT TRUE: 3 messages came back as they were sent",
            id="wrong echo",
        ),
        pytest.param(
            "from trio_exchange._http.http2 import connection; connection._MOST_STREAMS = 1",
            "NOT TRUE: requests at once: 6, connections opened: 6",
            id="no multiplexing",
        ),
        pytest.param(
            "import functools, trio_exchange as t;t.Proxy = lambda url, http2=False, make=t.Proxy: make(url)",
            "NOT TRUE: tunnels: 2, as streams of one HTTP/2 connection",
            id="no HTTP/2 to the proxy",
        ),
    ],
)
def test_demo_fails_if_something_is_not_as_it_should_be(sabotage: str, complaint: str) -> None:
    demo = "import runpy; runpy.run_module('examples.demo', run_name='__main__')"
    result = run("-c", f"{sabotage}\n{demo}")
    assert (result.returncode, result.stderr) == (1, "")
    assert complaint in result.stdout
    assert "checks failed" in result.stdout
