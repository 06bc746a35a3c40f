"""Our metrics on a port of their own, for those whose Prometheus may not see SGLang's, or who run without its metrics.

The process that starts SGLang's schedulers opens the port before it does, so it answers from the first moment on, and
sums what all ranks of this node say. It reads the folder of metric files in which SGLang's own endpoint finds them;
without `--enable-metrics` there is none, and it makes one that the schedulers inherit.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from sgl_lmcache.errors import StartError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Prometheus's own, by which the processes of one server find each other's files."""

MAX_CLIENTS: Final = 16
"""At a time; more are turned away."""

CLIENT_TIMEOUT_S: Final = 10.0
"""For a client to go on with what it says."""

_open: dict[str, WSGIServer] = {}
"""By address."""

_made: list[tempfile.TemporaryDirectory[str]] = []
"""The folder that was made, if any; it goes with the process."""


def open_port(listen: str) -> None:
    """Answer at `listen`, host:port, until the process ends; a second call for it does nothing.

    A daemon thread does, and one for each client. Raises `StartError` if the address cannot be had.
    """
    if listen in _open:
        return
    if FOLDER_VARIABLE not in os.environ:
        _made.append(tempfile.TemporaryDirectory(prefix="sgl-lmcache-metrics-", ignore_cleanup_errors=True))
        os.environ[FOLDER_VARIABLE] = _made[-1].name
    folder = os.environ[FOLDER_VARIABLE]
    if not os.path.isdir(folder):
        raise StartError(
            f"sgl_lmcache: metrics.listen: {FOLDER_VARIABLE} is {folder}, where no folder is; make it, or unset the "
            "variable."
        )
    # Only now: it looks at the variable when it is imported.
    from prometheus_client import CollectorRegistry, make_wsgi_app

    registry = CollectorRegistry()
    registry.register(_Ours(folder))
    host, _, port = listen.rpartition(":")
    try:
        server = _Server(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        raise StartError(
            f"sgl_lmcache: metrics.listen: {listen} cannot be had ({getattr(error, 'strerror', None) or error}); name "
            "another port, or end what uses it."
        ) from error
    server.set_app(make_wsgi_app(registry))
    threading.Thread(target=server.serve_forever, name="sgl-lmcache-metrics", daemon=True).start()
    _open[listen] = server


def forget_the_dead() -> None:
    """Gauges of processes that have ended count no more, as those of an engine before this one."""
    folder = os.environ.get(FOLDER_VARIABLE)
    for file in Path(folder).glob("gauge_live*_*.db") if folder else ():
        number = file.stem.rpartition("_")[2]
        if number.isdecimal() and not Path("/proc", number).exists():
            file.unlink(missing_ok=True)


class _Server(ThreadingMixIn, WSGIServer):
    """Of slow or silent clients it has a few at a time, and each for a few seconds."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was too slow."""


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: scrapes come all the time."""


class _Ours:
    """Of all metrics in a folder, those of this project."""

    def __init__(self, folder: str) -> None:
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        self._all = MultiProcessCollector(CollectorRegistry(), path=folder)

    def collect(self) -> Iterator[Metric]:
        forget_the_dead()
        yield from (metric for metric in self._all.collect() if metric.name.startswith("sgl_lmcache_"))
