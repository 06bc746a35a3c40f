"""The proxy that makes the network between nodes bad does what it says, and counts it."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import pytest

from tests.support.processes import free_port, wait_for
from tests.support.proxy import CALM, Counts, Proxy, Route, Trouble

WAIT_S = 30.0
LOOPBACK = "127.0.0.1"


@contextmanager
def echo() -> Iterator[int]:
    """A server that sends back what it gets; its port."""
    listener = socket.create_server((LOOPBACK, 0))

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextmanager
def proxied(trouble: Trouble = CALM) -> Iterator[Proxy]:
    with echo() as port, Proxy([Route((LOOPBACK, 0), (LOOPBACK, port))], trouble) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(proxy.addresses[0], WAIT_S)


def ask(proxy: Proxy, sent: bytes) -> bytes:
    """What comes back, once all has been sent and the proxy's end has closed."""
    with connect(proxy) as connection, ThreadPoolExecutor(1) as sender:

        def send() -> None:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)

        sending = sender.submit(send)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        sending.result()
        return received


@pytest.mark.parametrize("nbytes", [0, 1, 3_000_000])
def test_all_bytes_pass_both_ways_and_each_end_may_finish_first(nbytes: int) -> None:
    sent = random.Random(nbytes).randbytes(nbytes)
    with proxied() as proxy:
        assert ask(proxy, sent) == sent
        assert proxy.counts == Counts(connections=1, nbytes=2 * nbytes)


def test_late_bytes_are_the_same_bytes() -> None:
    sent = random.Random(0).randbytes(1_000_000)
    with proxied(Trouble(delayed=0.5, delay_s=(0.0, 0.002), stalled=0.1, stall_s=(0.0, 0.01))) as proxy:
        assert ask(proxy, sent) == sent
        assert proxy.counts.delays > 0
        assert proxy.counts.stalls > 0
        assert proxy.counts.resets == 0


def test_a_silence_holds_up_only_its_connection() -> None:
    with proxied(Trouble(stalled=1.0, stall_s=(WAIT_S, WAIT_S))) as proxy, connect(proxy) as silent:
        silent.sendall(b"held up")
        wait_for("it is held up", lambda: proxy.counts.stalls == 1 or None, WAIT_S)
        proxy.trouble = CALM
        assert ask(proxy, b"passes") == b"passes"
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(1)


def test_a_reset_is_an_error_at_both_ends() -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as target:
        target.settimeout(WAIT_S)
        with (
            Proxy([Route((LOOPBACK, 0), target.getsockname())]) as proxy,
            connect(proxy) as near,
            closing(target.accept()[0]) as far,
        ):
            far.settimeout(WAIT_S)
            near.sendall(b"a")
            assert far.recv(1) == b"a"
            proxy.trouble = Trouble(reset=1.0)
            near.sendall(b"b")
            for end in (near, far):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
            assert proxy.counts == Counts(connections=1, resets=1, nbytes=1)


def test_an_end_that_resets_resets_the_other() -> None:
    with closing(socket.create_server((LOOPBACK, 0))) as target:
        target.settimeout(WAIT_S)
        with Proxy([Route((LOOPBACK, 0), target.getsockname())]) as proxy, connect(proxy) as near:
            far = target.accept()[0]
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            far.close()
            with pytest.raises(ConnectionResetError):
                near.recv(1)


def test_a_target_that_is_not_there_is_a_reset() -> None:
    with Proxy([Route((LOOPBACK, 0), (LOOPBACK, free_port()))]) as proxy:
        with connect(proxy) as connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert proxy.counts == Counts(connections=1, unreachable=1)


def test_leaving_resets_what_is_open() -> None:
    with proxied() as proxy:
        connection = connect(proxy)
        connection.sendall(b"a")
        assert connection.recv(1) == b"a"
    with connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_one_seed_has_one_fate() -> None:
    def fates(seed: int) -> Counts:
        with echo() as port:
            trouble = Trouble(delayed=0.5, delay_s=(0.0, 0.0), stalled=0.2, stall_s=(0.0, 0.0))
            with Proxy([Route((LOOPBACK, 0), (LOOPBACK, port))], trouble, seed=seed) as proxy:
                with connect(proxy) as connection:
                    for _ in range(30):  # each a chunk of its own: it is back before the next is sent
                        connection.sendall(b"a")
                        assert connection.recv(1) == b"a"
                return proxy.counts

    assert fates(1) == fates(1)
    assert fates(1) != fates(2)
