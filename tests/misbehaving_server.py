"""A local HTTP server that misbehaves in the ways that servers do."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What it serves at any path, how the next requests are answered, and what was asked."""

    content: bytes
    url: str = ""
    ranges: bool = True
    """Whether it can begin anywhere but at the start."""
    says_length: bool = True
    statuses: list[int] = field(default_factory=list)
    """Answers to the next requests; 200 when used up."""
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next good answers break off."""
    asked: list[str | None] = field(default_factory=list)
    """The Range of each request."""


@contextmanager
def serve(content: bytes) -> Iterator[Server]:
    """Serves on a free port of this machine."""
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.asked.append(wanted)
            if server.statuses and (status := server.statuses.pop(0)) != 200:
                self.send_error(status)
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1)) if wanted and server.ranges else 0  # pyright: ignore
            total = len(server.content)
            if start >= total > 0 and start:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            if server.says_length:
                self.send_header("Content-Length", str(total - start))
            self.end_headers()
            body = server.content[start:]
            self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_port}/data.zip"
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()
