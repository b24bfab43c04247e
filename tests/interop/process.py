"""Server programs on loopback, each in a folder of its own, which are ended by their process id."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from .nginx import KIB, MIB, free_ports, write_certificates, write_random

STARTS = 5
START_SECONDS = 20.0
STOP_SECONDS = 15.0
PROGRAMS = {
    "danted": "dante-server",
    "haproxy": "haproxy",
    "microsocks": "microsocks",
    "nghttpd": "nghttp2-server",
    "nghttpx": "nghttp2-proxy",
    "squid": "squid-openssl",
    "tinyproxy": "tinyproxy",
    "v2ray": "v2ray",
}


class ServerError(Exception):
    """A server did not start; the message holds what it said."""


@dataclass(frozen=True)
class Process:
    """A running server.

    Attributes:
        process: Its process, which is the one that signals are for.
        folder: Where it runs: certificates, output, and what else it needs.
        ports: Where it listens.
        scheme: Of its URLs.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    ports: tuple[int, ...]
    scheme: str

    @property
    def port(self) -> int:
        """The first one."""
        return self.ports[0]

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def client_ssl_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    def file(self, name: str) -> Path:
        return self.folder / "files" / name

    def error_log(self) -> str:
        """Everything that it has said."""
        files = (self.folder / "output", *sorted(self.folder.glob("*.log")))
        return "".join(file.read_text(errors="replace") for file in files)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find(program: str) -> str | None:
    # Debian keeps servers in a folder that is on the path of administrators only.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")


def missing(program: str) -> str | None:
    """What is missing that `program` could run, and where it comes from."""
    if program == "hypercorn":
        if importlib.util.find_spec("hypercorn") is not None:
            return None
        return "hypercorn is not installed (PyPI: hypercorn)"
    if find(program) is not None:
        return None
    return f"{program} is not installed (Debian: apt-get install {PROGRAMS[program]})"


@contextlib.contextmanager
def running(
    command: Callable[..., list[str]],
    *,
    scheme: str = "https",
    files: dict[str, str] | None = None,
    fill: Callable[[Path], object] | None = None,
    ports: int = 1,
    as_nobody: bool = False,
) -> Iterator[Process]:
    """Start a server, and end it with the block.

    Args:
        command: Makes the command line for its ports. It is started in a folder with `server.pem` and
            `key.pem`.
        scheme: Of its URLs.
        files: Texts that its folder has besides, by name.
        fill: Writes what else the folder is to have.
        ports: How many it listens on. In the files, `$port1`, `$port2` and so on stand for them.
        as_nobody: Whether it is started as the user nobody if the tests run as root.
    """
    with tempfile.TemporaryDirectory(prefix="server-") as name:
        folder = Path(name)
        write_certificates(folder)
        # Not every server finds the key in the same file.
        pem = (folder / "server.pem").read_text()
        (folder / "key.pem").write_text(pem[: pem.index("-----BEGIN CERTIFICATE")])
        if fill is not None:
            fill(folder)
        server = _start(command, folder, scheme, files or {}, ports, as_nobody)
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def running_again(server: Process) -> Iterator[Process]:
    """Start a server that was stopped once more, on the same ports."""
    another = dataclasses.replace(server, process=_launch(server.process.args, server.folder))
    try:
        if not _is_listening(another):
            raise ServerError(f"a server did not start again:\n{another.error_log()}")
        yield another
    finally:
        another.stop()


def _start(
    command: Callable[..., list[str]],
    folder: Path,
    scheme: str,
    files: dict[str, str],
    ports: int,
    as_nobody: bool,
) -> Process:
    for _ in range(STARTS):
        (folder / "output").unlink(missing_ok=True)
        chosen = tuple(free_ports(ports))
        names = {f"port{number}": port for number, port in enumerate(chosen, 1)}
        for file, text in files.items():
            (folder / file).write_text(Template(text).safe_substitute(names))
        if as_nobody and os.geteuid() == 0:
            _give_to_nobody(folder)
        server = Process(_launch(command(*chosen), folder), folder, chosen, scheme)
        if _is_listening(server):
            return server
        server.stop()
        # Somebody else may have taken a port.
    raise ServerError(f"{Path(command(*chosen)[0]).name} did not start:\n{server.error_log()}")


def _give_to_nobody(folder: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)


def _launch(command: Any, folder: Path) -> subprocess.Popen[bytes]:
    """Start a server as the user who owns its folder."""
    owner = folder.stat()
    privileges: dict[str, Any] = {}
    if owner.st_uid != os.geteuid():
        privileges = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)},
            **privileges,
        )


def _is_listening(server: Process) -> bool:
    deadline = time.monotonic() + START_SECONDS
    waiting = list(server.ports)
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", waiting[-1]), 1):
            waiting.pop()
            if not waiting:
                return True
            continue
        time.sleep(0.02)
    return False


# -- The servers.


def running_nghttpd(*options: str, tls: bool = True) -> contextlib.AbstractContextManager[Process]:
    """It serves files, and sends an upload back; every response with a body has a trailer."""

    def command(port: int) -> list[str]:
        common = [find("nghttpd") or "nghttpd", "-a", "127.0.0.1", "-d", "files", "--echo-upload", *options]
        common += ["--trailer", "x-served-by: interop"]
        return [*common, str(port), "key.pem", "server.pem"] if tls else [*common, "--no-tls", str(port)]

    return running(command, scheme="https" if tls else "http", fill=_write_served)


def _write_served(folder: Path) -> None:
    (folder / "files").mkdir()
    write_random(folder / "files" / "1k", KIB)
    write_random(folder / "files" / "1m", MIB)
    write_random(folder / "files" / "50m", 50 * MIB)


def running_nghttpx(backend: int, protocol: str, *options: str) -> contextlib.AbstractContextManager[Process]:
    """It passes everything on to a server on loopback that speaks `h2` or `http/1.1`."""

    def command(port: int) -> list[str]:
        program = find("nghttpx") or "nghttpx"
        frontend = [program, "--conf", "nghttpx.conf", "-f", f"127.0.0.1,{port}", *options]
        return [*frontend, "-b", f"127.0.0.1,{backend};;proto={protocol}", "key.pem", "server.pem"]

    return running(command, files={"nghttpx.conf": "workers=1\nno-ocsp=yes\n"})


def running_hypercorn(*options: str) -> contextlib.AbstractContextManager[Process]:
    """It runs the application in `asgi_app.py`."""
    application = Path(__file__).with_name("asgi_app.py").read_text()

    def command(port: int) -> list[str]:
        files = ["--certfile", "server.pem", "--keyfile", "key.pem"]
        serve = [sys.executable, "-m", "hypercorn", "--bind", f"127.0.0.1:{port}"]
        return [*serve, *files, *options, "asgi_app:application"]

    return running(command, files={"asgi_app.py": application})
