"""Our stages in SGLang's trace of a request: SGLang's own contexts, OpenTelemetry's SDK, and an exporter that keeps."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sglang.srt.managers import schedule_batch
from sglang.srt.observability import trace as sgl_trace
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

from sgl_lmcache.traces import RequestTrace, trace_of
from tests.hicache.rig import TIMEOUT_S, Rig
from tests.support.clock import Clock
from tests.support.keys import path_keys
from tests.support.real_cache import RealCache
from tests.support.scheduler import Prompt, Scheduler
from tests.support.stepped_copies import SteppedCopies

for _name, _module in tuple(sys.modules.items()):
    # sentencepiece, which SGLang imports, frees a capsule of SWIG's when Python ends. In a process that has made a span
    # that comes too late, and ends it with a fault. So it is never freed.
    if _name.startswith("swig_runtime_data"):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_module.type_pointer_capsule))

PAGE = 16
SLOT_NBYTES = 4096
WORDS = {
    *("pages", "prefill"),
    *("load", "load_part", "recompute", "absent", "undecided", "coming"),
    *("there", "part", "in_vain", "nothing", "dropped"),
}


class Spans:
    """What SGLang's tracer has exported, and contexts of requests that it traces."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._contexts: list[Any] = []
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def context(self, rid: str = "r", *, level: int = 3) -> Any:
        """As in the scheduler's process: of a request that has begun elsewhere, with a span for this thread."""
        context = sgl_trace.TraceReqContext(rid, trace_level=level)
        context.trace_req_start()
        self._contexts.append(context)
        return context

    def close(self) -> None:
        """SGLang's contexts end what is open when they are deleted, which must not be while Python ends."""
        for context in self._contexts:
            context.abort()
        self.provider.shutdown()

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def ours(self) -> list[tuple[str, dict[str, int | str]]]:
        """Our stages in the order in which they ended: (name, attributes), both without our prefix."""
        return [(_bare(span.name), _attributes(span)) for span in self.all() if span.name.startswith("sgl_lmcache.")]


def _bare(name: str) -> str:
    assert name.startswith("sgl_lmcache.")
    return name.removeprefix("sgl_lmcache.")


def _attributes(span: ReadableSpan) -> dict[str, int | str]:
    """None of them can be a token, a text or a salt: they are numbers and words of ours."""
    attributes: dict[str, int | str] = {}
    for name, value in (span.attributes or {}).items():
        assert isinstance(value, int) or value in WORDS, (name, value)
        attributes[_bare(name)] = value
    return attributes


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    spans = Spans()
    monkeypatch.setattr(sgl_trace, "opentelemetry_initialized", True)
    monkeypatch.setattr(sgl_trace, "tracer", spans.provider.get_tracer("tests"))
    yield spans
    spans.close()


class Traced:
    """A request of an engine, with its trace."""

    def __init__(self, rig: Rig, spans: Spans, path: str, *, salt: str = "", level: int = 3) -> None:
        self.rig = rig
        self.context = spans.context(level=level)
        self.req: Any = SimpleNamespace(
            full_untruncated_fill_ids=range(len(path) * PAGE + 1),
            host_hit_length=rig.holds(path_keys(path)) * PAGE,
            host_loaded_length=0,
            cached_tokens_device=0,
            cached_tokens_host=0,
            cached_tokens_storage=0,
            retracted_stain=False,
            time_stats=SimpleNamespace(trace_ctx=self.context),
        )
        self.trace = trace(rig, self.req)
        self.ticket = rig.engine.open_ticket(path_keys(path), None, tenant=salt)
        tail: Any = SimpleNamespace(req=self.req, device_hit_len=0)
        self.trace.looked_up(tail, self.ticket)

    def ask(self) -> bool:
        admitted = self.rig.engine.admit(self.ticket)
        self.trace.asked(self.ticket, admitted=admitted)
        return admitted


def trace(rig: Rig, req: Any) -> RequestTrace:
    traced = trace_of(req, rig.engine.index, PAGE)
    assert traced is not None
    return traced


def test_a_request_that_is_not_traced_has_no_trace() -> None:
    req: Any = SimpleNamespace(time_stats=SchedulerReqTimeStats())
    assert trace_of(req, Rig().engine.index, PAGE) is None


def test_what_is_found_at_arrival_is_told_below_the_span_of_the_process(spans: Spans) -> None:
    rig = Rig()
    rig.write_back(path_keys("ab"))
    request = Traced(rig, spans, "abcd", salt="secret")
    assert spans.ours()[0] == ("lookup", {"tokens.asked": 65, "tokens.hbm": 0, "tokens.host": 32})
    (span,) = spans.all()
    assert span.parent is not None
    assert span.parent.span_id == request.context.thread_context.thread_span.get_span_context().span_id
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= span.end_time


def test_a_wait_tells_what_was_promised_and_which_tiers_have_brought_it(spans: Spans) -> None:
    rig = Rig(writes=("through", "back"))
    rig.put(0, path_keys("ab"))
    rig.put(1, path_keys("abcd"))
    request = Traced(rig, spans, "abcde")
    assert not request.ask()
    assert [name for name, _ in spans.ours()] == ["lookup"]
    rig.settle()
    assert request.ask()
    assert request.ask()
    assert spans.ours()[1:] == [
        (
            "wait",
            {
                "waiting_for": "pages",
                "decision": "load",
                "tokens.promised": 64,
                "tokens.there": 64,
                "tokens.faulty memory": 64,
                "ended": "there",
            },
        )
    ]
    lookup, wait = spans.all()
    assert wait.start_time == lookup.end_time, "it waits from its arrival on"


@pytest.mark.parametrize(
    ("load_s", "decision", "ended"),
    [(0.5, "load", "there"), (1.1, "recompute", "nothing"), (None, "absent", "nothing")],
)
def test_why_a_wait_has_ended(spans: Spans, load_s: float | None, decision: str, ended: str) -> None:
    rig = Rig(fetch_only_if_faster=True)
    rig.engine.prefill_speed.observe([(0, 4)], 4.0)
    if load_s is not None:
        rig.put(0, path_keys("abcd"))
        rig.memory.load_s_per_page = load_s
    request = Traced(rig, spans, "abcd")
    rig.settle()
    assert request.ask()
    _, (_, wait) = spans.ours()
    assert (wait["decision"], wait["ended"]) == (decision, ended)


def test_only_the_part_that_is_worth_it_is_promised(spans: Spans) -> None:
    rig = Rig(writes=("through", "through"), fetch_only_if_faster=True)
    rig.put(0, path_keys("ab"))
    rig.put(1, path_keys("abcd"))
    rig.memories[1].load_s_per_page = 10.0
    rig.engine.prefill_speed.observe([(0, 4)], 0.4)
    request = Traced(rig, spans, "abcd")
    rig.settle()
    assert request.ask()
    _, (_, wait) = spans.ours()
    assert (wait["decision"], wait["tokens.promised"], wait["ended"]) == ("load_part", 32, "there")


@pytest.mark.parametrize(("n_answers", "decision"), [(0, "undecided"), (1, "load")])
def test_a_wait_whose_time_is_up_was_in_vain(spans: Spans, n_answers: int, decision: str) -> None:
    """The tier does not say what it has, or says it and does not bring it."""
    rig = Rig()
    rig.put(0, path_keys("abcd"))
    rig.tier.hold()
    request = Traced(rig, spans, "abcd")
    rig.tier.release(n_answers)
    rig.agree()
    assert not request.ask()
    rig.clock.now_s += TIMEOUT_S
    rig.agree()
    assert request.ask()
    _, (_, wait) = spans.ours()
    assert (wait["decision"], wait["tokens.there"], wait["ended"]) == (decision, 0, "in_vain")
    rig.tier.release()
    rig.settle()


def test_pages_that_were_promised_and_are_damaged_are_missing_at_the_end(spans: Spans) -> None:
    rig = Rig(batch_pages=2)
    rig.put(0, path_keys("abcd"))
    rig.tier.hold()
    request = Traced(rig, spans, "abcd")
    rig.tier.release(1)
    rig.agree()
    rig.tier.release(1)
    rig.tier.fail_next(1)
    rig.tier.release()
    rig.settle()
    assert request.ask()
    _, (_, wait) = spans.ours()
    assert (wait["tokens.promised"], wait["tokens.there"], wait["ended"]) == (64, 32, "part")


def test_pages_that_another_copies_into_host_memory_are_waited_for(spans: Spans) -> None:
    rig = Rig(writes=())
    offload = rig.engine.begin_offload(path_keys("ab"))
    assert offload is not None
    rig.engine.hbm_evicted(path_keys("ab"))
    request = Traced(rig, spans, "ab")
    assert not request.ask()
    rig.engine.finish_offload(offload, landed=True)
    rig.agree()
    assert request.ask()
    _, (_, wait) = spans.ours()
    assert (wait["decision"], wait["tokens.promised"], wait["ended"]) == ("coming", 32, "there")


@pytest.mark.parametrize(("n_computed", "ended"), [(20, "there"), (5, "part"), (0, "in_vain")])
def test_a_wait_for_the_prefill_of_another(spans: Spans, n_computed: int, ended: str) -> None:
    """It ends when the leader has computed what both lack, or has ended before that."""
    rig = Rig(writes=())
    path = "".join(chr(ord("a") + n) for n in range(20))
    leader, follower = Traced(rig, spans, path), Traced(rig, spans, path)
    assert leader.ask()
    prefill = rig.engine.launch(leader.ticket)
    assert not follower.ask()
    if n_computed:
        rig.engine.skip_offload(path_keys(path[:n_computed]))
    rig.engine.end_prefill(prefill)
    rig.agree()
    assert follower.ask()
    ours = spans.ours()
    assert [name for name, _ in ours] == ["lookup", "lookup", "wait"]
    assert ours[-1][1] == {
        "waiting_for": "prefill",
        "tokens.promised": 320,
        "tokens.there": n_computed * PAGE,
        "ended": ended,
    }


def test_a_request_that_goes_while_it_waits_is_told_so_once(spans: Spans) -> None:
    rig = Rig()
    rig.put(0, path_keys("abcd"))
    rig.tier.hold()
    request = Traced(rig, spans, "abcd")
    assert not request.ask()
    request.trace.dropped(request.ticket)
    request.trace.dropped(request.ticket)
    assert [(name, attributes.get("ended")) for name, attributes in spans.ours()] == [
        ("lookup", None),
        ("wait", "dropped"),
    ]
    rig.tier.release()
    rig.settle()


def launch(request: Traced, *, since_ns: int = 1) -> None:
    request.trace.launched(request.req, request.ticket, since_ns=since_ns, slot_nbytes=SLOT_NBYTES)


def test_a_restore_tells_tokens_by_tier_and_bytes_and_lies_within_the_prefill(spans: Spans) -> None:
    rig = Rig(writes=("through", "back"))
    rig.write_back(path_keys("a"))
    rig.put(0, path_keys("abcd"))
    request = Traced(rig, spans, "abcd")
    rig.settle()
    assert request.ask()
    request.req.host_loaded_length, request.req.cached_tokens_host, request.req.cached_tokens_storage = 64, 16, 48
    request.context.trace_slice_start("prefill_forward", 1)
    prefill_id = request.context.thread_context.cur_slice_stack[-1].span.get_span_context().span_id
    launch(request)
    assert spans.ours()[-1] == (
        "restore",
        {"tokens": 64, "bytes": 4 * SLOT_NBYTES, "tokens.host": 16, "tokens.faulty memory": 48},
    )
    restore = spans.all()[-1]
    assert restore.start_time == 1
    assert restore.parent is not None
    assert restore.parent.span_id == prefill_id


def test_a_retracted_request_tells_what_is_restored_now_and_no_tiers(spans: Spans) -> None:
    request = Traced(Rig(), spans, "abcd")
    request.req.host_loaded_length, request.req.cached_tokens_host, request.req.retracted_stain = 32, 16, True
    launch(request)
    assert spans.ours()[-1] == ("restore", {"tokens": 32, "bytes": 2 * SLOT_NBYTES})


def test_without_a_restore_nothing_is_told_of_one(spans: Spans) -> None:
    request = Traced(Rig(), spans, "abcd")
    launch(request)
    assert [name for name, _ in spans.ours()] == ["lookup"]


def test_a_trace_level_below_ours_leaves_them_out(spans: Spans) -> None:
    Traced(Rig(), spans, "abcd", level=1)
    assert spans.ours() == []


def test_after_sglang_has_closed_its_trace_nothing_is_said(spans: Spans) -> None:
    """A request is aborted while it waits."""
    rig = Rig()
    rig.tier.hold()
    request = Traced(rig, spans, "abcd")
    request.context.abort(abort_info={"reason": "gone"})
    request.trace.dropped(request.ticket)
    assert [name for name, _ in spans.ours()] == ["lookup"]
    rig.tier.release()
    rig.settle()


@pytest.fixture
def scheduler(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    """Whose requests are traced."""

    def time_stats(*, disagg_mode: object) -> SchedulerReqTimeStats:
        return SchedulerReqTimeStats(disagg_mode=disagg_mode, trace_ctx=spans.context())

    monkeypatch.setattr(schedule_batch, "SchedulerReqTimeStats", time_stats)
    real = RealCache(24, 64, page_size=4, clock=Clock(), make_copies=SteppedCopies)
    assert isinstance(real.copies, SteppedCopies)
    yield Scheduler(real, real.copies)
    real.close()


def serve(scheduler: Scheduler, rid: str, first_token: int) -> None:
    scheduler.arrive(rid, prompt(first_token))
    scheduler.prefill(100, 8)
    scheduler.copies.quiesce()
    scheduler.decode()


def prompt(first_token: int) -> Prompt:
    return Prompt(tuple(range(first_token, first_token + 81)))


def test_the_cache_traces_the_requests_of_sglangs_scheduler(spans: Spans, scheduler: Scheduler) -> None:
    serve(scheduler, "cold", 100)
    assert spans.ours() == [("lookup", {"tokens.asked": 81, "tokens.hbm": 0, "tokens.host": 0})]
    serve(scheduler, "pushes it out of HBM", 300)
    serve(scheduler, "back", 100)
    assert scheduler.seen["host hits"] == 1
    (_, lookup), (name, restore) = spans.ours()[-2:]
    assert name == "restore"
    n_tokens = int(restore["tokens"])
    assert lookup["tokens.host"] == n_tokens > 0
    assert lookup["tokens.hbm"] == 80 - n_tokens
    assert restore["bytes"] == n_tokens // 4 * scheduler.real.linker.slot_nbytes


@pytest.mark.parametrize("ends", ["admitted", "aborted", "flushed"])
def test_a_wait_ends_however_the_cache_ends_it(spans: Spans, scheduler: Scheduler, ends: str) -> None:
    """Two of the same prompt arrive together: one computes it in two chunks, and the other waits for it."""
    scheduler.arrive("leads", prompt(100))
    scheduler.arrive("follows", prompt(100))
    scheduler.prefill(10, 8)
    if ends == "aborted":
        scheduler.abort_waiting(0)
    elif ends == "flushed":
        scheduler.cache.reset()
    while ends == "admitted" and scheduler.waiting:
        scheduler.prefill(100, 8)
    waits = [attributes for name, attributes in spans.ours() if name == "wait"]
    assert [(wait["waiting_for"], wait["ended"]) for wait in waits] == [
        ("prefill", "there" if ends == "admitted" else "dropped")
    ]
