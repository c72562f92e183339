"""Run a proxy before a real S3 endpoint that is slow, fails, hangs or breaks off on request."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyStore:
    """The proxy that forwards every request to (host, port).

    While `fault` is set, requests of a key that contains `of` fail in that way.
    """

    def __init__(self, host: str, port: int):
        self.fault: str | None = None
        self.of, self.times, self.asked = "", 10**9, 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(host, port, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                fault = store.meet(self.path) if self.command == "GET" else None
                if fault == "fails":
                    self.answer(503, [], b"")
                    return
                if fault == "hangs":
                    time.sleep(600)
                headers = [
                    (name, value)
                    for name, value in response.getheaders()
                    if name.lower() not in ("transfer-encoding", "connection")
                ]
                self.answer(response.status, headers, content, fault)

            def answer(self, status, headers, content, fault=None):
                self.send_response(status)
                for name, value in headers:
                    if name.lower() != "content-length" or self.command == "HEAD":
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault == "breaks off":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return
                for start in range(0, len(content), 4096):
                    self.wfile.write(content[start : start + 4096])
                    if fault == "slow":
                        time.sleep(0.2)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def meet(self, path: str) -> str | None:
        """Return the fault of this request, if any."""
        if self.fault is None or self.of not in path:
            return None
        self.asked += 1
        return self.fault if self.asked <= self.times else None

    def set(self, fault: str | None, of: str = "", times: int = 10**9) -> None:
        """Set `fault` for the first `times` requests of keys that contain `of`, from now on.

        Args:
            fault: "slow", "fails", "hangs" or "breaks off"; None for no fault.
        """
        self.fault, self.of, self.times, self.asked = fault, of, times, 0

    def close(self) -> None:
        self._server.shutdown()
