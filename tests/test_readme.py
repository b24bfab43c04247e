"""The README's code blocks, run unchanged as their readers would run them.

While a block runs, the hosts that it names are servers on loopback. What it prints is compared with the
comments behind its calls of `print`, and with a block of text that follows, in which `...` stands for
anything.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from examples import _peers
from trio_exchange import Connector

# Another file can be tested in its place before it is moved there.
README = Path(os.environ.get("TRIO_EXCHANGE_README") or Path(__file__).parent.parent / "README.md")

HTTPS_SITE = functools.partial(_peers.https_site, "www.example.com")
INTERNET: dict[tuple[str, int], Callable[..., Awaitable[None]]] = {
    ("www.example.com", 80): _peers.site,
    ("www.example.com", 443): HTTPS_SITE,
    ("192.0.2.7", 443): HTTPS_SITE,
    ("proxy.example.com", 8080): _peers.proxy,
    ("backend.example.com", 8080): _peers.site,
    ("chat.example.com", 80): _peers.websocket_echo,
    ("chat.example.com", 443): functools.partial(_peers.secure_websocket_echo, "chat.example.com"),
}

EXTENSIONS = [
    "timeout",
    "trace",
    "sni_hostname",
    "target",
    "informational",
    "protocol",
    "http_version",
    "reason_phrase",
    "stream_id",
    "trailing_headers",
    "network_stream",
]


class Block(NamedTuple):
    """A block of Python, the number of lines before it, and the text that it is said to print."""

    code: str
    offset: int
    output: str | None

    def promise(self) -> str:
        """What is printed: the text that follows, else the comments behind the calls of `print`."""
        if self.output is not None:
            return self.output
        comments = re.findall(r"^ *print\(.*\)  # (.+\n)", self.code, re.MULTILINE)
        return "".join(comments)


def blocks() -> list[Block]:
    text = README.read_text(encoding="utf-8")
    pattern = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
    return [Block(match[1], text[: match.start(1)].count("\n"), match[2]) for match in pattern.finditer(text)]


BLOCKS = blocks()


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let `trio.run` bring up the servers first, and every connection go to one of them."""
    real_run, real_open_tcp_stream = trio.run, trio.open_tcp_stream
    ports: dict[tuple[str, int], int] = {}

    def run(main: Callable[[], Awaitable[None]]) -> None:
        async def with_internet() -> None:
            async with trio.open_nursery() as nursery:
                for address, peer in INTERNET.items():
                    url = await nursery.start(peer)
                    ports[address] = int(url.rpartition(":")[2])
                await main()
                nursery.cancel_scope.cancel()

        real_run(with_internet)

    async def open_tcp_stream(host: str, port: int, **options: Any) -> trio.SocketStream:
        return await real_open_tcp_stream("127.0.0.1", ports[host, port], **options)

    async def connect_tcp(_: Connector, host: str, port: int, **options: Any) -> trio.abc.Stream:
        return await open_tcp_stream(host, port, **options)

    monkeypatch.setattr(trio, "run", run)
    monkeypatch.setattr(trio, "open_tcp_stream", open_tcp_stream)
    monkeypatch.setattr(Connector, "connect_tcp", connect_tcp)
    authority = tmp_path / "authority.pem"
    _peers.authority().cert_pem.write_to_path(str(authority))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))


@pytest.mark.usefixtures("internet")
@pytest.mark.parametrize("block", [pytest.param(block, id=f"line {block.offset}") for block in BLOCKS])
def test_block_does_what_it_says(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    # The blank lines give a traceback the README's own line numbers.
    code = compile("\n" * block.offset + block.code, str(README), "exec")
    exec(code, {"__name__": "__main__"})
    output, errors = capsys.readouterr()
    assert errors == ""
    promise = block.promise()
    assert promise, "the block does not say what it prints"
    pattern = re.escape(promise).replace(r"\.\.\.", ".*")
    assert re.fullmatch(pattern, output, re.DOTALL), f"it printed:\n{output}and not:\n{promise}"


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_extension_has_a_block(name: str) -> None:
    assert any(f'"{name}"' in block.code for block in BLOCKS)


def test_every_block_is_found() -> None:
    assert len(BLOCKS) == README.read_text(encoding="utf-8").count("```python")
