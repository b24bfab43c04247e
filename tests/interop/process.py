"""Server programs on loopback, each in a folder of its own, which are ended by their process id."""

from __future__ import annotations

import contextlib
import importlib.util
import os
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

from .nginx import KIB, MIB, free_ports, write_certificates, write_random

STARTS = 5
START_SECONDS = 20.0
STOP_SECONDS = 15.0
PROGRAMS = {"nghttpd": "nghttp2-server", "nghttpx": "nghttp2-proxy"}


class ServerError(Exception):
    """A server did not start; the message holds what it said."""


@dataclass(frozen=True)
class Process:
    """A running server.

    Attributes:
        process: Its process, which is the one that signals are for.
        folder: Where it runs: certificates, output, `files`.
        port: Where it listens.
        scheme: Of its URLs.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    port: int
    scheme: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def client_ssl_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    def file(self, name: str) -> Path:
        return self.folder / "files" / name

    def error_log(self) -> str:
        """Everything that it has said."""
        return (self.folder / "output").read_text(errors="replace")

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
    command: Callable[[int], list[str]], *, scheme: str = "https", files: dict[str, str] | None = None
) -> Iterator[Process]:
    """Start a server, and end it with the block.

    Args:
        command: Makes the command line for a port. It is started in a folder with `server.pem` and `key.pem`.
        scheme: Of its URLs.
        files: Texts that its folder has besides, by name.
    """
    with tempfile.TemporaryDirectory(prefix="server-") as name:
        folder = Path(name)
        write_certificates(folder)
        # Not every server finds the key in the same file.
        pem = (folder / "server.pem").read_text()
        (folder / "key.pem").write_text(pem[: pem.index("-----BEGIN CERTIFICATE")])
        for file, text in (files or {}).items():
            (folder / file).write_text(text)
        (folder / "files").mkdir()
        write_random(folder / "files" / "1k", KIB)
        write_random(folder / "files" / "1m", MIB)
        write_random(folder / "files" / "50m", 50 * MIB)
        server = _start(command, folder, scheme)
        try:
            yield server
        finally:
            server.stop()


def _start(command: Callable[[int], list[str]], folder: Path, scheme: str) -> Process:
    for _ in range(STARTS):
        (port,) = free_ports(1)
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                command(port),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1"},
            )
        server = Process(process, folder, port, scheme)
        if _is_listening(server):
            return server
        server.stop()
        # Somebody else may have taken the port.
    raise ServerError(f"{Path(command(0)[0]).name} did not start:\n{server.error_log()}")


def _is_listening(server: Process) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return True
        time.sleep(0.02)
    return False


# -- The servers.


def running_nghttpd(*options: str, tls: bool = True) -> contextlib.AbstractContextManager[Process]:
    """It serves files, and sends an upload back; every response with a body has a trailer."""

    def command(port: int) -> list[str]:
        common = [find("nghttpd") or "nghttpd", "-a", "127.0.0.1", "-d", "files", "--echo-upload", *options]
        common += ["--trailer", "x-served-by: interop"]
        return [*common, str(port), "key.pem", "server.pem"] if tls else [*common, "--no-tls", str(port)]

    return running(command, scheme="https" if tls else "http")


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
