from __future__ import annotations

import threading

import pytest

from hicache.workers import Speed, Work, Workers
from tests.support.clock import Clock


def test_the_speed_is_that_of_the_time_in_which_something_was_read() -> None:
    speed = Speed()
    assert speed.time_s(1000, 0.0) == 0.0, "nothing has been measured"
    speed.begin(10.0)
    speed.begin(10.5)
    speed.end(11.0, 300)
    speed.end(12.0, 700)
    speed.begin(50.0)
    speed.end(51.0, 500)
    assert speed.time_s(500, 51.0) == 1.0, "1,500 bytes in three seconds"


def test_a_speed_is_forgotten_so_that_a_disk_that_was_slow_is_asked_again() -> None:
    speed = Speed()
    speed.begin(10.0)
    speed.end(20.0, 100)
    assert speed.time_s(100, 79.0) == 10.0
    assert speed.time_s(100, 81.0) == 0.0
    speed.begin(90.0)
    assert speed.time_s(100, 200.0) == 10.0, "it is being read"


def test_old_readings_count_less() -> None:
    speed = Speed()
    speed.begin(0.0)
    speed.end(10.0, 10)
    for second in range(10, 40):
        speed.begin(float(second))
        speed.end(second + 1.0, 1000)
    assert speed.time_s(1000, 40.0) < 1.1


class Step(Work):
    """Work that notes its name; `gate`: it waits for that first."""

    nbytes = 0

    def __init__(self, name: str, done: list[str], gate: threading.Event | None = None) -> None:
        self.is_read = name.startswith("read")
        self._name = name
        self._done = done
        self._gate = gate
        self.begun, self.ended = threading.Event(), threading.Event()

    def run(self) -> None:
        self.begun.set()
        if self._gate is not None:
            assert self._gate.wait(20)
        self._done.append(self._name)

    def finish(self) -> None:
        self.ended.set()


@pytest.mark.parametrize(
    ("waited_s", "order"),
    [(0.4, ["read 1", "read 2", "write 1", "write 2"]), (0.6, ["write 1", "write 2", "read 1", "read 2"])],
)
def test_a_write_that_has_waited_for_long_goes_before_reads(waited_s: float, order: list[str]) -> None:
    clock, gate, done = Clock(), threading.Event(), list[str]()
    workers = Workers("test", 1, clock)
    first = Step("read 0", done, gate)
    workers.submit([first])
    assert first.begun.wait(20)
    steps = [Step(name, done) for name in ("write 1", "write 2", "read 1", "read 2")]
    workers.submit(steps[:2])
    workers.submit(steps[2:])
    clock.now_s += waited_s
    gate.set()
    assert all(step.ended.wait(20) for step in steps)
    assert done == ["read 0", *order]
    assert workers.stop(20.0)


def test_only_one_thread_prefers_writes() -> None:
    clock, gates, done = Clock(), [threading.Event() for _ in range(4)], list[str]()
    workers = Workers("test", 4, clock)
    busy = [Step("read 0", done, gate) for gate in gates]
    workers.submit(busy)
    assert all(step.begun.wait(20) for step in busy)
    hold = threading.Event()
    writes = [Step(f"write {n}", done, hold) for n in range(2)]
    reads = [Step(f"read {n}", done) for n in range(1, 3)]
    workers.submit(writes)
    workers.submit(reads)
    clock.now_s += 1.0
    for gate in gates[:2]:
        gate.set()
    assert all(read.ended.wait(20) for read in reads), "the other thread reads"
    assert not any(write.ended.is_set() for write in writes)
    for event in (*gates, hold):
        event.set()
    assert workers.stop(20.0)


class _Timed(Work):
    is_read = True

    def __init__(self, clock: Clock, nbytes: int, seconds: float, error: Exception | None = None) -> None:
        self.nbytes = nbytes
        self._clock, self._seconds, self._error = clock, seconds, error
        self.done = threading.Event()

    def run(self) -> None:
        self._clock.now_s += self._seconds
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        self.done.set()


def test_questions_and_failures_do_not_make_reads_look_slow() -> None:
    clock = Clock()
    workers = Workers("test", 1, clock)

    def expected_s(*work: _Timed) -> float:
        for piece in work:
            workers.submit([piece])
            assert piece.done.wait(10)
        return workers.expected_read_s(1000)

    assert expected_s(_Timed(clock, 1000, 1.0)) == 1.0
    assert expected_s(*(_Timed(clock, 0, 5.0) for _ in range(10))) == 1.0, "nothing was moved"
    assert expected_s(_Timed(clock, 1000, 30.0, OSError("no answer"))) == 0.0, "nothing is known any more"
    assert expected_s(_Timed(clock, 1000, 2.0)) == 2.0
    assert workers.stop(10)
