"""The way to the hub as the environment says: through a proxy, and by TLS with a certificate authority of one's own."""

from __future__ import annotations

import http.client
import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support import fake_model
from support.daemon import Daemon
from support.hub import Hub

MODEL = "org/model"
HOP = ("connection", "proxy-connection", "transfer-encoding", "keep-alive")


class Relay(http.server.BaseHTTPRequestHandler):
    """Passes each GET on to the server's `hub_port`, whatever host it is for, and remembers for whom it was."""

    protocol_version = "HTTP/1.1"
    server: RelayServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.seen.append(url.netloc)
        hub = http.client.HTTPConnection("127.0.0.1", self.server.hub_port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        hub.request("GET", url.path + (f"?{url.query}" if url.query else ""), headers=headers)
        answer = hub.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in (*HOP, "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        hub.close()

    def log_message(self, *_: object) -> None:
        pass


class RelayServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.hub_port = hub_port
        self.seen: list[str] = []


@contextmanager
def relay(hub: Hub, tls: ssl.SSLContext | None = None) -> Iterator[RelayServer]:
    server = RelayServer(hub.port)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_through_a_proxy() -> None:
    with Hub() as hub, relay(hub) as proxy:
        hub.commit(MODEL, fake_model.files(1_000_000))
        address = f"http://127.0.0.1:{proxy.server_port}"
        env = hub.env() | {"HF_ENDPOINT": "http://hub.test", "HTTP_PROXY": address, "http_proxy": address}
        env |= {"NO_PROXY": "", "no_proxy": ""}
        with Daemon(bad_child="worker", env=env) as daemon, daemon.client() as client:
            assert client.plan(MODEL).download_bytes > 1_000_000
            assert client.wait_job(client.download(MODEL)).error is None
            assert client.verify(MODEL).ok
        assert "hub.test" in proxy.seen  # a name that nobody else can resolve
        assert any(netloc.startswith("localhost:") for netloc in proxy.seen)  # and the place of the weights


def certificate(folder: Path) -> Path:
    """A certificate for localhost that is its own authority, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    file = folder / "own.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(folder / "key.pem"), "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    return file


def test_by_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    file = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file, tmp_path / "key.pem")
    with Hub() as hub, relay(hub, tls) as server:
        hub.commit(MODEL, fake_model.files(1_000_000), lfs=())  # LFS files are at an http address
        env = hub.env() | {"HF_ENDPOINT": f"https://localhost:{server.server_port}"}
        with Daemon(bad_child="worker", env=env) as daemon, daemon.client() as client:
            refused = client.wait_job(client.download(MODEL)).error
            assert refused is not None
            assert refused.kind == "download_failed"
            assert "certificate" in refused.message
        with (
            Daemon(bad_child="worker", env=env | {"SSL_CERT_FILE": str(file)}) as daemon,
            daemon.client() as client,
        ):
            assert client.wait_job(client.download(MODEL)).error is None
            assert client.verify(MODEL).ok
