"""A request that is restored from host memory, in the trace that SGLang sends to an OpenTelemetry collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.server.conftest import ARGUMENTS, CACHED, Fleet, check_at_rest, running
from tests.server.traffic import PAGE_SIZE, prompt, push_out, reusable
from tests.support.server import ANSWER_TIMEOUT_S, Setup, wait_for

pytestmark = pytest.mark.server

SLOT_NBYTES = 32 << 10
"""Of the tiny model."""


class Collector(ThreadingHTTPServer):
    """Receives spans by OTLP over HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"
        self._spans: list[Span] = []

    def add(self, message: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(message)
        self._spans += [span for one in request.resource_spans for two in one.scope_spans for span in two.spans]

    def trace(self, rid: str) -> dict[str, Span] | None:
        """All spans of a request's trace by their names, once its root has come."""
        spans = tuple(self._spans)
        roots = [span.trace_id for span in spans if attributes(span).get("rid") == rid]
        return {span.name: span for span in spans if span.trace_id == roots[0]} if roots else None


class Receiver(BaseHTTPRequestHandler):
    """One export."""

    server: Collector

    def do_POST(self) -> None:
        self.server.add(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def attributes(span: Span) -> dict[str, int | str]:
    return {
        one.key: one.value.string_value if one.value.HasField("string_value") else one.value.int_value
        for one in span.attributes
    }


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_a_restored_request_in_sglangs_trace(fleet: Fleet, tmp_path: Path) -> None:
    with collecting() as collector:
        setup = Setup(
            "traced",
            (*ARGUMENTS, "--enable-trace", "--otlp-traces-endpoint", collector.url),
            config=CACHED.config,
            environment={
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                "SGLANG_OTLP_EXPORTER_SCHEDULE_DELAY_MILLIS": "100",
                "NO_PROXY": "127.0.0.1",
            },
        )
        with running(fleet, setup, tmp_path) as server:
            tokens = prompt("traced", 1000)
            server.generate(tokens, 2, rid="cold", cache_salt="secret")
            push_out(server, "others")
            answer = server.generate(tokens, 2, rid="restored", cache_salt="secret")
            assert answer.host_tokens == reusable(tokens)

            def restored() -> dict[str, Span] | None:
                trace = collector.trace("restored")
                names = {"sgl_lmcache.lookup", "sgl_lmcache.restore", "prefill_forward"}  # each is sent when it ends
                return trace if trace is not None and names <= trace.keys() else None

            trace = wait_for("the trace has come", restored, ANSWER_TIMEOUT_S)
            cold = wait_for("the first one's trace has come", lambda: collector.trace("cold"), ANSWER_TIMEOUT_S)
            check_at_rest(server)

    lookup, restore = trace["sgl_lmcache.lookup"], trace["sgl_lmcache.restore"]
    assert attributes(lookup) == {
        "sgl_lmcache.tokens.asked": len(tokens),
        "sgl_lmcache.tokens.hbm": 0,
        "sgl_lmcache.tokens.host": answer.host_tokens,
    }
    assert attributes(restore) == {
        "sgl_lmcache.tokens": answer.host_tokens,
        "sgl_lmcache.tokens.host": answer.host_tokens,
        "sgl_lmcache.bytes": answer.host_tokens // PAGE_SIZE * SLOT_NBYTES,
    }
    prefill = trace["prefill_forward"]
    assert restore.parent_span_id == prefill.span_id
    assert lookup.parent_span_id == prefill.parent_span_id, "the span of the scheduler process"
    assert prefill.start_time_unix_nano <= restore.start_time_unix_nano <= restore.end_time_unix_nano
    assert restore.end_time_unix_nano <= prefill.end_time_unix_nano
    assert "sgl_lmcache.restore" not in cold
