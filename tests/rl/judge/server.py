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


def events(*deltas, end="stop", done=True) -> list[bytes]:
    """A streamed answer, an event per text."""
    choices = [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    choices += [{"delta": {"content": text}, "finish_reason": None} for text in deltas]
    choices += [{"delta": {}, "finish_reason": end}] if end else []
    parts = [b"data: %s\n\n" % json.dumps({"choices": [one]}).encode() for one in choices]
    return parts + [b"data: [DONE]\n\n"] * done


class FakeServer:
    """Serves `/v1/chat/completions`; a context manager.

    `behaviour(number)` -> (status, headers, body bytes, seconds to wait) for the question `number`,
    counted from 0; body None hangs, and a list is sent part by part, until the connection ends.
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
                parts = body if isinstance(body, list) else [body]
                if isinstance(body, list):
                    length = {"Connection": "close"}
                    self.close_connection = True
                else:
                    length = {"Content-Length": str(len(body))}
                for name, value in {**length, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(0.01 * (len(parts) > 1))

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
