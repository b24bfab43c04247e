"""A real nginx on loopback, in a folder of its own, for the interop tests and the benchmarks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

KIB = 1024
MIB = 1024 * KIB

SERVER_NAMES = ("127.0.0.1", "localhost", "exchange.test")
CONFIGURATION = Path(__file__).with_name("nginx.conf")
STARTS = 5
START_SECONDS = 15.0
STOP_SECONDS = 15.0


class NginxError(Exception):
    """nginx did not start; the message holds its error log."""


@dataclass(frozen=True)
class Nginx:
    process: subprocess.Popen[bytes]
    folder: Path
    http_port: int
    https_port: int
    http2_port: int

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def http2_url(self) -> str:
        """For HTTP/2 without TLS; that with TLS is at `https_url`, beside HTTP/1.1."""
        return f"http://127.0.0.1:{self.http2_port}"

    @property
    def https_url(self) -> str:
        return f"https://127.0.0.1:{self.https_port}"

    @property
    def socket_path(self) -> str:
        return str(self.folder / "http.sock")

    @property
    def ca_file(self) -> str:
        return str(self.folder / "ca.pem")

    def client_ssl_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca_file)

    def file(self, name: str) -> Path:
        """The file that is served as ``/name``."""
        return self.folder / "files" / name

    def error_log(self) -> str:
        return _read(self.folder / "error.log")

    def connections_log(self) -> list[list[str]]:
        """For each request to ``/logged/``: its `client` in the query, its number on its connection, and
        ``r`` if the TLS session was resumed, else ``.``."""
        return [line.split(" ") for line in _read(self.folder / "connections.log").splitlines()]

    def reload(self) -> None:
        """New workers take over; the old ones finish their requests and close idle connections."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find_nginx() -> str | None:
    # Debian keeps it in a folder that is on the path of administrators only.
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def nginx_version() -> str:
    said = subprocess.run([_binary(), "-v"], capture_output=True, text=True, check=True).stderr
    return said.strip().rpartition("/")[2]


def _binary() -> str:
    binary = find_nginx()
    if binary is None:
        raise NginxError("nginx is not installed")
    return binary


@contextmanager
def running_nginx() -> Iterator[Nginx]:
    # The name is short, because the path of a unix socket has to fit into 108 bytes.
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        folder = Path(name)
        _fill(folder)
        server = _start(folder)
        try:
            yield server
        finally:
            server.stop()


def _fill(folder: Path) -> None:
    (folder / "temp").mkdir()
    write_certificates(folder)
    _write_files(folder / "files")
    shutil.copy(CONFIGURATION, folder / "nginx.conf")


def write_certificates(folder: Path) -> None:
    """Write `ca.pem`, and what a server needs as `server.pem`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = authority.issue_cert(*SERVER_NAMES)
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))


def _write_files(files: Path) -> None:
    files.mkdir()
    write_random(files / "1k", KIB)
    write_random(files / "1m", MIB)
    write_random(files / "100m", 100 * MIB)
    (files / "text").write_bytes(b"a line of text that compresses well\n" * 1000)
    included = '<!--#include virtual="/1k" --><!--#include virtual="/1m" -->'
    for page in ("chunked.html", "until-close.html", "trailers.html"):
        (files / page).write_text(included)


def write_random(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for offset in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - offset)))


def _start(folder: Path) -> Nginx:
    for _ in range(STARTS):
        server = _launch(folder, *free_ports(3))
        if _is_listening(server):
            return server
        server.stop()
        if "Address already in use" not in server.error_log():
            break
    raise NginxError(f"nginx did not start:\n{server.error_log()}{_read(folder / 'output')}")


def _launch(folder: Path, http_port: int, https_port: int, http2_port: int) -> Nginx:
    # A failed attempt may have left its sockets behind, which would make every later one fail.
    for leftover in (*folder.glob("*.sock"), *folder.glob("*.log")):
        leftover.unlink()
    (folder / "listen.conf").write_text(
        f"listen 127.0.0.1:{http_port} backlog=4096;\n"
        f"listen 127.0.0.1:{https_port} ssl http2 backlog=4096;\n"
        f"listen 127.0.0.1:{http2_port} http2 backlog=4096;\n"
        "listen unix:http.sock;\n"
    )
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            _command(folder), cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    return Nginx(process, folder, http_port, https_port, http2_port)


def _command(folder: Path) -> list[str]:
    command = [
        _binary(),
        "-p",
        f"{folder}/",
        "-c",
        str(folder / "nginx.conf"),
        "-e",
        str(folder / "error.log"),
    ]
    if os.geteuid() == 0:
        # Its workers would otherwise become a user that can't read the temporary folder.
        command += ["-g", "user root;"]
    return command


def _is_listening(server: Nginx) -> bool:
    # nginx writes its pid file after it has bound every address.
    pid_file = server.folder / "nginx.pid"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        if _read(pid_file):
            return True
        time.sleep(0.01)
    return False


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    # All are held at once, so that no two are the same.
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
