"""Real servers for the tests: Debian's docker-registry on a free loopback port, and nginx with TLS in front of it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REGISTRY = shutil.which("docker-registry")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
USER, PASSWORD = "robot", "s3cret:with-colon"

needs_registry = [
    pytest.mark.registry,
    pytest.mark.skipif(REGISTRY is None, reason="docker-registry is not installed (apt install docker-registry)"),
]


@dataclass(frozen=True)
class Registry:
    """A running registry; ``log`` holds a line for each request."""

    host: str
    root: Path
    log: Path

    def requests(self) -> list[str]:
        """The requests so far, as ``METHOD /path STATUS BYTES``."""
        return [line for line in self.log.read_text().splitlines() if '"' in line]

    def blob_bytes(self) -> int:
        """Bytes that went out in answers to GETs of blobs (common log format: ... "GET /path HTTP/1.1" 200 123 ...)."""
        total = 0
        for line in self.requests():
            parts = line.split('"')
            if parts[1].startswith("GET ") and "/blobs/sha256:" in parts[1]:
                total += int(parts[2].split()[1])
        return total


@contextlib.contextmanager
def docker_registry(folder: Path, *, with_login: bool = False, port: int | None = None) -> Iterator[Registry]:
    """Start docker-registry with a configuration of its own; its files lie in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    auth = ""
    if with_login:
        htpasswd = folder / "htpasswd"
        argv = ["htpasswd", "-Bbn", "-C", "4", USER, PASSWORD]
        htpasswd.write_bytes(subprocess.run(argv, check=True, capture_output=True).stdout)
        auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {htpasswd}\n"
    config = folder / "config.yml"
    config.write_text(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: false\n"
        f"storage:\n  filesystem:\n    rootdirectory: {folder / 'data'}\n  delete:\n    enabled: true\n"
        f"http:\n  addr: 127.0.0.1:{port}\n  relativeurls: true\n{auth}"
    )
    log = folder / "log"
    with log.open("ab") as stream:
        argv = [str(REGISTRY), "serve", str(config)]
        process = subprocess.Popen(argv, stdout=stream, stderr=subprocess.STDOUT)
    try:
        await_http(f"http://127.0.0.1:{port}/v2/", process)
        yield Registry(f"127.0.0.1:{port}", folder / "data", log)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def tls_proxy(folder: Path, upstream: str) -> Iterator[tuple[str, Path]]:
    """nginx with a certificate of its own CA in front of a registry; gives its host and the CA's certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    ca, key, certificate = make_certificates(folder)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 1; error_log {folder}/error.log; pid {folder}/pid;\n"
        "events { worker_connections 64; }\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n"
        f"  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        f"  server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {certificate}; ssl_certificate_key {key};\n"
        "    client_max_body_size 0;\n"
        f"    location / {{ proxy_pass http://{upstream}; proxy_set_header Host $http_host;\n"
        "      proxy_set_header X-Forwarded-Proto https; proxy_request_buffering off; proxy_buffering off; } } }\n"
    )
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        await_port(port, process)
        yield f"127.0.0.1:{port}", ca
    finally:
        process.terminate()
        process.wait()


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """A CA, and a server's key and certificate by it for 127.0.0.1."""
    ca, ca_key, key, certificate = (folder / name for name in ("ca.pem", "ca.key", "server.key", "server.pem"))
    request, extensions = folder / "server.csr", folder / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for argv in (
        ["req", "-x509", *curve, "-keyout", ca_key, "-out", ca, "-days", "3650", "-subj", "/CN=test CA"],
        ["req", *curve, "-keyout", key, "-out", request, "-subj", "/CN=127.0.0.1"],
        ["x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-out", certificate,
         "-days", "3650", "-extfile", extensions],
    ):  # fmt: skip
        subprocess.run(["openssl", *map(str, argv)], check=True, capture_output=True)
    return ca, key, certificate


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_http(url: str, process: subprocess.Popen[bytes]) -> None:
    """Ask until it answers: starting takes some tens of milliseconds."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(url, timeout=60).close()
            except urllib.error.HTTPError as error:
                error.close()
            return
        assert process.poll() is None, "the registry ended"
        time.sleep(0.02)
    raise TimeoutError(url)


def await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60):
            return
        assert process.poll() is None, "the server ended"
        time.sleep(0.02)
    raise TimeoutError(str(port))
