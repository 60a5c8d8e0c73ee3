"""A stand-in for Cloud Storage on this machine: the part of its JSON API that gcsfs, tensorstore
and google.cloud.storage use, in memory.

    with serving("bucket") as cloud:
        run(env=os.environ | cloud.variables)
        cloud.objects["bucket"]["stage2/metrics.jsonl"]

Objects are listed in the order of their names, between `startOffset` and `endOffset`, in pages;
writes and deletes keep to `ifGenerationMatch`. `cloud.fault` answers requests with a status.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass(frozen=True)
class Stored:
    data: bytes
    generation: int
    time: str


class Cloud:
    """The server's state.

    Attributes:
      objects: by bucket and name.
      fault: a status for a request (method, path, query), or None where it is answered.
      requests: (method, path) of all that came.
    """

    def __init__(self, *buckets: str):
        self.objects: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
        self.fault: Callable[[str, str, dict], int | None] = lambda method, path, query: None
        self.requests: list[tuple[str, str]] = []
        self.url = ""
        self.lock = threading.RLock()
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self._generations = itertools.count(1)

    @property
    def variables(self) -> dict[str, str]:
        """What a process's environment needs, to take this server for the cloud."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }

    def store(self, bucket: str, name: str, data: bytes) -> Stored:
        with self.lock:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            stored = Stored(bytes(data), next(self._generations), now.replace("+00:00", "Z"))
            self.objects[bucket][name] = stored
            return stored

    def below(self, prefix: str, bucket: str = "bucket") -> dict[str, bytes]:
        """Contents by name, of the objects below a prefix."""
        with self.lock:
            found = sorted(self.objects[bucket].items())
        return {name[len(prefix) :]: o.data for name, o in found if name.startswith(prefix)}


def described(bucket: str, name: str, stored: Stored) -> dict:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "updated": stored.time,
        "timeCreated": stored.time,
        "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
        "storageClass": "STANDARD",
    }


class Answer(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int):
        self.status = status


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cloud: Cloud

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.cloud.requests.append((self.command, urllib.parse.unquote(path)))
        try:
            if status := self.cloud.fault(self.command, urllib.parse.unquote(path), self.query):
                raise Answer(status)
            self.route(path)
        except Answer as answer:
            error = {"error": {"code": answer.status, "message": f"status {answer.status}"}}
            # 304 has no body: what follows would be taken for the next answer.
            self.reply(answer.status, b"" if answer.status == 304 else json.dumps(error).encode())

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any

    def reply(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever asked has gone
            if self.command != "HEAD":
                self.wfile.write(data)

    def say(self, value: dict) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def route(self, path: str) -> None:
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        if not found:
            raise Answer(400)
        bucket = urllib.parse.unquote(found[2])
        if bucket not in self.cloud.objects:
            raise Answer(404)
        if found[1] == "/upload":
            self.upload(bucket)
        elif found[3]:
            self.one(bucket, found[3])
        elif path.endswith("/o"):
            self.listed(bucket)
        else:
            self.say({"kind": "storage#bucket", "name": bucket, "location": "US"})

    def one(self, bucket: str, rest: str) -> None:
        parts = re.fullmatch(r"([^/]+)(?:/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+))?", rest)
        if not parts:
            raise Answer(400)
        name = urllib.parse.unquote(parts[1])
        with self.cloud.lock:
            stored = self.cloud.objects[bucket].get(name)
            if stored is None:
                raise Answer(404)
            self.check(stored.generation)
            if self.command == "DELETE":
                del self.cloud.objects[bucket][name]
        if self.command == "DELETE":
            self.reply(204)
        elif parts[2]:
            target = urllib.parse.unquote(parts[2]), urllib.parse.unquote(parts[3])
            resource = described(*target, self.cloud.store(*target, stored.data))
            self.say({"done": True, "resource": resource})
        elif self.query.get("alt") == "media":
            self.content(stored)
        else:
            self.say(described(bucket, name, stored))

    def content(self, stored: Stored) -> None:
        headers = {"x_goog_generation": str(stored.generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self.reply(200, stored.data, **headers)
            return
        size = len(stored.data)
        start = int(wanted[1]) if wanted[1] else size - int(wanted[2])
        end = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else size, size)
        if start >= size:
            raise Answer(416)
        headers["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
        self.reply(206, stored.data[start:end], **headers)

    def check(self, generation: int) -> None:
        """The conditions of a request about an object; 0: there is none."""
        query = self.query
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise Answer(412)
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Answer(304)

    def listed(self, bucket: str) -> None:
        query = self.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        last, most = query.get("endOffset", ""), int(query.get("maxResults", 1000))
        with self.cloud.lock:
            names = sorted(self.cloud.objects[bucket])
            items: list[dict] = []
            folders: list[str] = []
            following = None
            for name in names:
                if not name.startswith(prefix) or name < first or (last and name >= last):
                    continue
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                folder = name[: cut + len(delimiter)] if cut >= 0 else ""
                if folder and folder in folders:
                    continue
                if len(items) + len(folders) == most:
                    following = name
                    break
                if folder:
                    folders.append(folder)
                else:
                    items.append(described(bucket, name, self.cloud.objects[bucket][name]))
        page = {"kind": "storage#objects", "items": items, "prefixes": folders}
        self.say(page | ({"nextPageToken": following} if following else {}))

    def upload(self, bucket: str) -> None:
        kind, name, data = self.query.get("uploadType"), self.query.get("name", ""), self.body
        if "upload_id" in self.query:
            self.resumed(self.query["upload_id"])
            return
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            about, content = self.body.split(b"--" + boundary[1].encode())[1:3]
            name = json.loads(about.split(b"\n\n" if b"\r\n\r\n" not in about else b"\r\n\r\n")[1])[
                "name"
            ]
            # binary data may hold the boundary of neither
            start = self.body.index(content)
            end = self.body.rindex(b"--" + boundary[1].encode() + b"--")
            _, _, data = self.body[start:end].partition(
                b"\r\n\r\n" if content.startswith(b"\r\n") else b"\n\n"
            )
            data = data.removesuffix(b"\r\n") if content.startswith(b"\r\n") else data[:-1]
        elif kind == "resumable":
            name = name or json.loads(self.body)["name"]
            number = str(len(self.cloud.uploads))
            self.cloud.uploads[number] = bucket, name, bytearray()
            path = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            self.reply(200, Location=self.cloud.url + path)
            return
        with self.cloud.lock:
            stored = self.cloud.objects[bucket].get(name)
            self.check(stored.generation if stored else 0)
            stored = self.cloud.store(bucket, name, data)
        self.say(described(bucket, name, stored))

    def resumed(self, number: str) -> None:
        bucket, name, data = self.cloud.uploads[number]
        data += self.body
        asked = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        assert asked
        if asked[1] == "*" or len(data) < int(asked[1]):
            self.reply(308, Range=f"bytes=0-{len(data) - 1}")
            return
        self.say(described(bucket, name, self.cloud.store(bucket, name, bytes(data))))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # clients open a hundred connections at once

    def handle_error(self, *args: object) -> None:
        """Killed processes leave connections behind."""


@contextlib.contextmanager
def serving(*buckets: str):
    """A `Cloud` with these buckets, on a free port."""
    cloud = Cloud(*buckets)
    handler = type("Bound", (Handler,), {"cloud": cloud})
    server = Server(("127.0.0.1", 0), handler)
    cloud.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()
