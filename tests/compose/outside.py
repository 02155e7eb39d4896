"""The world outside, in one small server: takes alerts in, which it prints, and knows every user's profile."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Outside(BaseHTTPRequestHandler):
    """POST /page and /ticket print a line; GET /profiles/… answers as the user directory does."""

    def do_POST(self) -> None:
        """Print where the message came in and what it says."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # In one piece with its end: two messages may come at once. The test reads the log.
        print(json.dumps({"path": self.path, "body": body}) + "\n", end="", flush=True)  # noqa: T201
        self._answer({})

    def do_GET(self) -> None:
        """Say that everybody is active, under a new name."""
        self._answer({"full_name": "Known To The Directory", "is_active": True})

    def log_message(self, *_: object) -> None:
        """Keep the log for the messages."""

    def _answer(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    ThreadingHTTPServer(("", 8080), Outside).serve_forever()
