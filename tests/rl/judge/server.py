"""An OpenAI-compatible server on the loopback interface that behaves as badly as it is told."""

import http.server
import json
import threading
import time

GOOD = '{"type": 18, "layout": 10, "text": 16, "data": 14, "style": 12, "clarity": 10}'  # 80 points


def chat(content) -> bytes:
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": content}}]}
    ).encode()


class FakeServer:
    """Serves `/v1/chat/completions`; a context manager.

    `behaviour(number)` -> (status, headers, body bytes, seconds to wait) for the question `number`,
    counted from 0; body None hangs.
    """

    def __init__(self, behaviour=lambda number: (200, {}, chat(GOOD), 0.0)):
        self.behaviour = behaviour
        self.questions, self.headers = [], []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    number = len(fake.questions)
                    fake.questions.append((self.path, question))
                    fake.headers.append(dict(self.headers))
                    fake._now += 1
                    fake.most_at_once = max(fake.most_at_once, fake._now)
                status, headers, body, seconds = fake.behaviour(number)
                time.sleep(seconds)
                with fake._lock:
                    fake._now -= 1
                if body is None:
                    fake._end.wait(20)
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._end.set()
        self._server.shutdown()
        self._server.server_close()
