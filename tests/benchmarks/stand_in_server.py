"""A server for tests of the benchmarks, with the manners of real ones: `python stand_in_server.py PORT MANNER`.

Streams as many numbered tokens as are asked for. Manners: `good`; `late` (503 at first); `refusing` (exits at start);
`mortal` (dies at its third chat); `deaf` (ignores SIGTERM, and so does its child); `full` (503 with Retry-After to all).
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN_SECONDS = 0.002
MANNER = sys.argv[2] if len(sys.argv) > 2 else ""
chats: list[dict[str, Any]] = []
asked_for_health: list[str] = []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        asked_for_health.append(self.path)
        is_ready = MANNER != "late" or len(asked_for_health) > 3
        self._say(200 if is_ready else 503, {"environment": {k: v for k, v in os.environ.items() if "SERVE" in k}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chats.append(body)
        if MANNER == "mortal" and len(chats) == 3:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if MANNER == "full":
            self._say(503, {"error": {"message": "full"}}, {"Retry-After": "4"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(body["max_tokens"]):
            self._event({"choices": [{"delta": {"content": f"{number} "}, "finish_reason": None}]})
            time.sleep(TOKEN_SECONDS)
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.wfile.flush()

    def _say(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    if MANNER == "refusing":
        print("no such option", file=sys.stderr)
        sys.exit(2)
    if MANNER == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print(f"child {child.pid}", file=sys.stderr, flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
