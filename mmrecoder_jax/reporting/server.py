"""The page of a run that still goes, served on loopback.

    /                            the page
    /report/now.js               its parts and its files of trajectories, as they are now
    /report/<file>/<name>.js     data, made when asked for
    /<path>.png                  a picture below the work directory

Only files of the run are read, and nothing is written. A request must name this machine in its Host
header and come from the page itself: a page of somebody else, open in the same browser, could
otherwise read the run by a name that leads here.
"""

import functools
import hashlib
import http.server
import socket
import threading
import time
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import Any

from mmrecoder_jax import places
from mmrecoder_jax.monitoring.alarms import ALARMS_FILE
from mmrecoder_jax.reporting.page import DATA, data_script, page_html, start_data
from mmrecoder_jax.reporting.report import MOST, PAGE, Report
from mmrecoder_jax.reporting.trajectories import TrajectoryView
from mmrecoder_jax.reporting.workdir import Written

SECONDS = 3.0  # between looks of the page
BUCKET_SECONDS = 15.0  # between looks into a bucket, which cost money, while a page is open
HOSTS = ("127.0.0.1", "localhost", "[::1]")
_READ = ("config.json", "metrics.jsonl", ALARMS_FILE, "evaluation.json")


class Live:
    """What the page of a work directory is given, made again only where files have changed."""

    def __init__(self, workdir: Path, most: int = MOST, seconds: float = SECONDS):
        self.workdir = workdir.resolve()
        self._shown_as, self._most, self._seconds = places.shown(str(workdir)), most, seconds
        self._looked = time.monotonic()  # into the bucket
        self._lock = threading.Lock()
        self._state: Any = None
        self._report: Report | None = None
        self._now: dict[str, Any] = {}
        self._files: dict[str, tuple[Written, int]] = {}
        self._views = functools.lru_cache(maxsize=32)(self._read_views)

    def page(self) -> str:
        """The page as it begins."""
        report, now = self._look()
        start = start_data(now["sources"], self._shown_as, self._seconds)
        return page_html(report.title, now["parts"], start)

    def data(self, name: str) -> str | None:
        """The script of a name, "now" or "<file>/<part>"; None where there is no such data."""
        report, now = self._look()
        if name == "now":
            return data_script(name, now)
        key, _, part = name.partition("/")
        if key not in self._files:
            return None
        written, count = self._files[key]
        views = self._views(key, count)
        if part == "list":
            return data_script(name, report.entries(views))
        if part.isdecimal():
            return data_script(name, report.details(written, views, int(part)))
        return None

    def picture(self, path: str) -> bytes | None:
        """A PNG file below the work directory; None where there is none."""
        place = (self.workdir / path).resolve()
        if place.suffix != ".png" or not place.is_relative_to(self.workdir):
            return None
        try:
            return Path(places.bring(place)).read_bytes()
        except OSError:
            return None

    def _look(self) -> tuple[Report, dict[str, Any]]:
        with self._lock:
            if places.in_bucket(self.workdir) and time.monotonic() > self._looked + BUCKET_SECONDS:
                self._looked = time.monotonic()
                places.refill(str(self.workdir))
            report = Report(self.workdir, self._most)
            report.shown_as = self._shown_as
            files = report.files()
            state: list[Any] = [(written.key, count) for written, count in files]
            for stage in report.stages:
                for name in _READ:
                    path = stage.path / name
                    if path.exists():
                        found = path.stat()
                        state.append((str(path), (found.st_mtime_ns, found.st_size)))
            if self._report is None or state != self._state:
                parts = report.parts()
                marks = {
                    name: hashlib.sha256(html.encode()).hexdigest()[:16]
                    for name, html in parts.items()
                }
                self._now = {"parts": parts, "marks": marks, "sources": report.sources()}
                self._files = {written.key: (written, count) for written, count in files}
                self._state, self._report = state, report
            return self._report, self._now

    def _read_views(self, key: str, count: int) -> list[TrajectoryView]:
        written, _ = self._files[key]
        assert self._report is not None
        return self._report.views(written, count)


class Server(http.server.ThreadingHTTPServer):
    """Serves one work directory on loopback.

    Args:
      port: 0 takes a free one.

    Raises:
      OSError: another process uses the port.
    """

    daemon_threads = True

    def __init__(self, live: Live, port: int):
        self.live = live
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        # Two of them on one port would answer by turns.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        super().server_bind()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "mmrecoder", ""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host", "") not in [f"{host}:{port}" for host in HOSTS]:
            return self._refuse(HTTPStatus.FORBIDDEN, "this server answers to loopback alone")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return self._refuse(HTTPStatus.FORBIDDEN, "this server answers to its own page alone")
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        live = self.server.live
        try:
            if path in ("", PAGE):
                self._send(live.page().encode(), "text/html; charset=utf-8")
            elif path.startswith(f"{DATA}/") and path.endswith(".js"):
                name = path.removeprefix(f"{DATA}/").removesuffix(".js")
                self._found(live.data(name), "text/javascript; charset=utf-8")
            else:
                self._found(live.picture(path), "image/png")
        except (OSError, ValueError) as problem:  # a file has gone, or is being written
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(problem))

    def _found(self, content: str | bytes | None, kind: str) -> None:
        if content is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        else:
            self._send(content.encode() if isinstance(content, str) else content, kind)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(f"{why}\n".encode(), "text/plain; charset=utf-8", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "max-age=3600" if kind == "image/png" else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *values: Any) -> None:
        """Says nothing: a page asks every few seconds."""
