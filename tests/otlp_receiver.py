"""An OTLP receiver, a process of its own: `python -m tests.otlp_receiver` prints its port and takes what is exported.

POST /v1/traces and /v1/metrics take protobuf, as a collector does, and refuse what is none. GET of the same path
returns all that has come, as one message: serialized messages of one kind are one message when they are joined.
"""

import gzip
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # Its stubs would be one more package.
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

MESSAGES: dict[str, Any] = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}

_received = defaultdict[str, bytes](bytes)


class Receiver(BaseHTTPRequestHandler):
    """Takes exports, and shows them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take what is exported."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.headers["Content-Type"] != "application/x-protobuf":
            self._answer(415)
            return
        try:
            MESSAGES[self.path].FromString(body)
        except (DecodeError, KeyError):
            self._answer(400)
            return
        _received[self.path] += body
        self._answer(200)

    def do_GET(self) -> None:
        """Show what has come."""
        self._answer(200, _received[self.path])

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    print(server.server_address[1], flush=True)  # noqa: T201  # Whoever has started it reads it.
    server.serve_forever()
