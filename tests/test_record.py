"""A recording: what is in the file, in which order, and what ends it."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix import KEY_NBYTES
from sgl_lmcache import record
from sgl_lmcache.record import Entry, Recorder, TraceFile
from sgl_lmcache.simulate import trace as simulated
from tests.support.clock import Clock
from tests.support.keys import path_keys

LIMIT = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def opened(path: Path, limit_nbytes: int = LIMIT) -> TraceFile:
    return TraceFile.open(path, block_tokens=512, limit_nbytes=limit_nbytes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def written(path: Path, entries: Sequence[Entry], limit_nbytes: int = LIMIT) -> list[dict[str, Any]]:
    trace = opened(path, limit_nbytes)
    for entry in entries:
        trace.put(entry)
    trace.close()
    return lines(path)


def started(path: Path, clock: Clock | None = None, **options: Any) -> Recorder:
    options = {"replica": (0, 1), "page_size": 16, "limit_nbytes": LIMIT, **options}
    recorder = record.start(path, clock=clock or Clock(), **options)
    assert recorder is not None
    return recorder


# ---- lines ----


def test_a_line_is_mooncakes_with_the_size_of_a_block(path: Path) -> None:
    (line,) = written(path, [Entry(1250, 1187, 64, path_keys("ab"))])
    ids = line.pop("hash_ids")
    assert line == {"timestamp": 1250, "input_length": 1187, "output_length": 64, "block_size": 512}
    assert len(set(ids)) == 2
    assert all(0 <= number < 2**53 for number in ids)


def test_the_simulator_reads_it(path: Path) -> None:
    written(path, [Entry(0, 1187, 64, path_keys("ab")), Entry(500, 1100, 0, path_keys("ac")), Entry(500, 9, 9, b"")])
    trace = simulated.read(path)
    assert (trace.block_tokens, trace.n_blocks, trace.n_repeated) == (512, 3, 0)
    assert trace.times_s.tolist() == [0.0, 0.5, 0.5]
    assert trace.input_tokens.tolist() == [1187, 1100, 9]
    assert trace.blocks.tolist() == [0, 1, 0, 2]


def test_ids_are_equal_where_keys_are_and_only_there(path: Path) -> None:
    keys = path_keys("abc")
    first, second, third = written(path, [Entry(0, 1, 1, keys), Entry(1, 1, 1, keys[:64]), Entry(2, 1, 1, keys[32:])])
    assert second["hash_ids"] == first["hash_ids"][:2]
    assert third["hash_ids"] == first["hash_ids"][1:]
    assert len(set(first["hash_ids"])) == 3


def test_two_recordings_have_no_id_in_common(tmp_path: Path) -> None:
    keys = path_keys("abcd")
    found = [written(tmp_path / name, [Entry(0, 2048, 1, keys)])[0]["hash_ids"] for name in ("one", "two")]
    assert not set(found[0]) & set(found[1])


def test_no_page_key_is_in_the_file(path: Path) -> None:
    keys = path_keys("abcd")
    written(path, [Entry(0, 2048, 1, keys)])
    text = path.read_text()
    for at in range(0, len(keys), KEY_NBYTES):
        key = keys[at : at + KEY_NBYTES]
        assert key.hex()[:8] not in text
        assert str(int.from_bytes(key[:8]) >> 11) not in text


@pytest.mark.parametrize(
    ("page_size", "tokens"), [(16, 512), (64, 512), (512, 512), (48, 528), (100, 600), (1024, 1024)]
)
def test_a_block_is_whole_pages_of_512_tokens_or_little_more(page_size: int, tokens: int) -> None:
    assert record.pages_of_block(page_size) * page_size == tokens


# ---- the order ----


def test_lines_come_in_the_order_of_arrival(path: Path) -> None:
    clock = Clock()
    recorder = started(path, clock)
    for number, rid in enumerate("abc"):
        clock.now_s = 100.0 + 0.25 * number
        recorder.arrived(rid, 10 + number, b"")
    for rid, n_output in (("c", 3), ("a", 1), ("b", 2)):
        recorder.ended(rid, n_output)
    recorder.close()
    found = [(line["timestamp"], line["input_length"], line["output_length"]) for line in lines(path)]
    assert found == [(0, 10, 1), (250, 11, 2), (500, 12, 3)]


def test_a_line_waits_for_earlier_requests_only(path: Path) -> None:
    recorder = started(path)
    for rid in "abc":
        recorder.arrived(rid, 1, b"")
    recorder.ended("a", 7)
    recorder.ended("c", 9)
    wait_until(lambda: path.read_bytes().endswith(b"\n"))
    assert [line["output_length"] for line in lines(path)] == [7]
    recorder.close()
    assert [line["output_length"] for line in lines(path)] == [7, 0, 9]  # b was running when the server ended


def test_a_request_that_comes_back_is_the_same_until_it_has_ended(path: Path) -> None:
    recorder = started(path)
    assert recorder.wants("a")
    recorder.arrived("a", 5, b"")
    assert not recorder.wants("a")
    recorder.ended("a", 1)
    assert recorder.wants("a")
    recorder.arrived("a", 6, b"")
    recorder.ended("a", 2)
    recorder.ended("a", 3)  # an abort tells twice
    recorder.ended("unknown", 4)
    recorder.close()
    assert [(line["input_length"], line["output_length"]) for line in lines(path)] == [(5, 1), (6, 2)]


def test_a_request_that_never_ends_holds_up_a_bounded_number(path: Path) -> None:
    recorder = Recorder(opened(path), Clock(), max_held=3)
    for number in range(5):
        recorder.arrived(str(number), number, b"")
        if number:
            recorder.ended(str(number), 10 + number)
    recorder.ended("0", 99)  # too late
    recorder.close()
    assert [(line["input_length"], line["output_length"]) for line in lines(path)] == [
        (0, 0),
        *((number, 10 + number) for number in range(1, 5)),
    ]


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=60), st.integers(1, 5))
def test_whatever_happens_each_request_is_written_once_and_in_order(
    steps: list[tuple[int, bool]], max_held: int
) -> None:
    trace, clock = _Memory(), Clock()
    recorder = Recorder(trace, clock, max_held=max_held)
    n_arrived = 0
    for rid, ends in steps:
        clock.now_s += 1.0
        if ends:
            recorder.ended(str(rid), 1)
        elif recorder.wants(str(rid)):
            recorder.arrived(str(rid), n_arrived, b"")
            n_arrived += 1
        assert n_arrived - len(trace.entries) <= max_held
    recorder.close()
    assert [entry.n_input for entry in trace.entries] == list(range(n_arrived))
    times = [entry.timestamp_ms for entry in trace.entries]
    assert times == sorted(times)


class _Memory(TraceFile):
    """Keeps what would be written."""

    def __init__(self) -> None:
        self.is_open = True
        self.entries: list[Entry] = []

    def put(self, entry: Entry) -> None:
        self.entries.append(entry)

    def close(self) -> None:
        self.is_open = False


# ---- the file ----


def test_the_file_is_its_owners_only(path: Path) -> None:
    umask = os.umask(0)
    try:
        trace = opened(path)
    finally:
        os.umask(umask)
    trace.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_file_stays_within_its_limit_and_ends_with_a_whole_line(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = started(path, limit_nbytes=1000)
    for number in range(50):
        if recorder.wants(str(number)):
            recorder.arrived(str(number), number, path_keys("ab"))
            recorder.ended(str(number), 0)
    wait_until(lambda: not recorder.wants("next"))
    recorder.close()
    assert 800 < path.stat().st_size <= 1000
    assert [line["input_length"] for line in lines(path)] == list(range(len(lines(path))))
    assert [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING] == [
        f"sgl_lmcache: the recording has ended: {path} would grow beyond its limit, 1,000 bytes"
    ]


def test_replicas_have_a_file_each_and_share_the_limit(tmp_path: Path) -> None:
    for number in range(2):
        recorder = started(tmp_path / "trace.jsonl", replica=(number, 2), limit_nbytes=300)
        for rid in "abcdef":
            recorder.arrived(rid, number, b"")
            recorder.ended(rid, 0)
        recorder.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["trace.dp0.jsonl", "trace.dp1.jsonl"]
    for number in range(2):
        file = tmp_path / f"trace.dp{number}.jsonl"
        assert {line["input_length"] for line in lines(file)} == {number}
        assert file.stat().st_size <= 150


@pytest.mark.parametrize("text", ["", "not ours\n"])
def test_a_file_that_is_there_is_left_as_it_is(path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text(text)
    assert record.start(path, replica=(0, 1), page_size=16, limit_nbytes=LIMIT, clock=Clock()) is None
    assert path.read_text() == text
    assert caplog.messages == [f"sgl_lmcache: nothing is recorded: {path} exists; move it away, or name another file"]


def test_a_link_is_not_followed(tmp_path: Path, path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    assert record.start(path, replica=(0, 1), page_size=16, limit_nbytes=LIMIT, clock=Clock()) is None
    assert not (tmp_path / "elsewhere").exists()


def test_without_its_folder_nothing_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "none" / "trace.jsonl"
    assert record.start(path, replica=(0, 1), page_size=16, limit_nbytes=LIMIT, clock=Clock()) is None
    assert "cannot be made (No such file or directory)" in caplog.text


def test_a_full_disk_ends_the_recording_and_nothing_else(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = TraceFile(path, os.open("/dev/full", os.O_WRONLY), block_tokens=512, limit_nbytes=LIMIT)
    recorder = Recorder(trace, Clock())
    recorder.arrived("a", 1, b"")
    recorder.ended("a", 1)
    wait_until(lambda: not trace.is_open)
    for number in range(3 * record.MAX_QUEUED):  # nobody takes them any more
        recorder.arrived(str(number), 1, b"")
        recorder.ended(str(number), 1)
    recorder.close()
    assert caplog.messages == [
        f"sgl_lmcache: the recording has ended: {path} cannot be written: {os.strerror(errno.ENOSPC)}"
    ]


def test_a_deleted_file_ends_the_recording(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = opened(path)
    path.unlink()
    trace.put(Entry(0, 1, 1, b""))
    trace.close()
    assert not trace.is_open
    assert caplog.messages == [f"sgl_lmcache: the recording has ended: {path} cannot be written: it was deleted"]


def test_a_write_that_is_taken_in_parts_is_a_whole_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr("sgl_lmcache.record.os.write", lambda fd, data: real(fd, data[:7]))
    assert written(path, [Entry(0, 1, 1, path_keys("abc"))])[0]["input_length"] == 1


def test_what_the_disk_is_too_slow_for_is_left_out_and_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = os.pipe()
    trace = TraceFile(path, writer, block_tokens=512, limit_nbytes=1 << 30)
    monkeypatch.setattr(record, "CLOSE_TIMEOUT_S", 0.01)
    big = Entry(0, 1, 1, path_keys("ab") * 600)  # some fill the pipe, and the thread hangs
    for _ in range(record.MAX_QUEUED + 200):
        trace.put(big)
    assert trace.n_dropped > 0
    assert caplog.messages == [f"sgl_lmcache: requests are left out of the trace {path}: its disk is too slow"]
    trace.close()  # does not wait for ever
    os.close(reader)  # ends the thread, with an error
    wait_until(lambda: not trace.is_open)


def wait_until(is_true: Callable[[], bool]) -> None:
    """Of what a thread is doing. Ends the test if it does not come."""
    deadline_s = time.monotonic() + 60.0
    while not is_true():
        assert time.monotonic() < deadline_s
        os.sched_yield()
