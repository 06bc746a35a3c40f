"""TLS, on Debian's redis-server: the Valkey of the tests is built without it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hicache.valkey import CertificateError, Endpoint, Nodes, Tls
from tests.hicache.tier_contract import batch
from tests.hicache.valkey.tiers import random_slab, rig
from tests.support.certificates import Authority, Pair
from tests.support.processes import free_port, wait_for
from tests.support.valkey import redis_binary, store_server

pytestmark = pytest.mark.skipif(redis_binary() is None, reason="needs redis-server (apt-get install redis-server)")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "stranger")


@pytest.fixture(scope="module")
def client_pair(authority: Authority) -> Pair:
    return authority.sign("client")


def tls_options(port: int, pair: Pair, authority: Authority, *, clients: str) -> list[str]:
    """Of redis-server. clients: whether they have to show a certificate."""
    files = ["--tls-cert-file", pair.certificate, "--tls-key-file", pair.key]
    return [
        "--tls-port",
        str(port),
        *files,
        "--tls-ca-cert-file",
        authority.pair.certificate,
        "--tls-auth-clients",
        clients,
    ]


@pytest.fixture(scope="module")
def tls_port(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server that wants a certificate from its clients, too."""
    pair, port = authority.sign("server"), free_port()
    options = tls_options(port, pair, authority, clients="yes")
    with store_server(tmp_path_factory.mktemp("tls"), *options, binary=redis_binary()):
        yield port


def endpoint(port: int, tls: Tls | None) -> Endpoint:
    return Endpoint("127.0.0.1", port, tls=tls, timeout_s=2.0)


def test_pages_come_back_the_same_over_tls(tls_port: int, authority: Authority, client_pair: Pair) -> None:
    tls = Tls(authority.pair.certificate, client_pair.certificate, client_pair.key)
    slab = random_slab(40, 393216)
    with rig(endpoint(tls_port, tls), slab) as on:
        assert on.tier.store(batch(20, "tls")).result() == 20
        assert on.tier.load(batch(20, "tls", first_slot=20)).result() == 20
        assert np.array_equal(slab[20:40], slab[:20])
        assert on.tier.health().available


def refused(port: int, tls: Tls | None, caplog: pytest.LogCaptureFixture) -> str:
    """What is told when a tier starts that cannot be used."""
    with rig(endpoint(port, tls)) as on:
        wait_for("it is told", lambda: "going on without it" in caplog.text or None, 20)
        assert on.tier.store(batch(4, "a")).result() == 0
        assert not on.tier.health().available
    return caplog.text


def test_a_server_that_another_authority_has_signed_is_not_trusted(
    tls_port: int, stranger: Authority, client_pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Tls(stranger.pair.certificate, client_pair.certificate, client_pair.key)
    told = refused(tls_port, tls, caplog)
    assert "do not agree about TLS" in told
    assert "ca_file" in told


def test_a_client_that_another_authority_has_signed_is_refused(
    tls_port: int, authority: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    pair = stranger.sign("thief")
    assert "TLS" in refused(tls_port, Tls(authority.pair.certificate, pair.certificate, pair.key), caplog)


def test_a_client_without_a_certificate_is_refused(
    tls_port: int, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    assert "TLS" in refused(tls_port, Tls(authority.pair.certificate), caplog)


def test_plain_text_on_a_tls_port(tls_port: int, caplog: pytest.LogCaptureFixture) -> None:
    assert f"127.0.0.1:{tls_port}" in refused(tls_port, None, caplog)


def test_a_certificate_for_another_address_is_not_trusted(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair, port = authority.sign("elsewhere", address="192.0.2.1"), free_port()
    options = tls_options(port, pair, authority, clients="no")
    with store_server(tmp_path / "elsewhere", *options, binary=redis_binary()):
        assert "do not agree about TLS" in refused(port, Tls(authority.pair.certificate), caplog)


def test_with_a_ca_file_whom_the_system_trusts_is_not_trusted(
    tls_port: int, authority: Authority, stranger: Authority, client_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority.pair.certificate)  # OpenSSL takes it for the system's authorities
    with rig(endpoint(tls_port, Tls(None, client_pair.certificate, client_pair.key))) as on:
        assert on.tier.store(batch(2, "system")).result() == 2
    with rig(endpoint(tls_port, Tls(stranger.pair.certificate, client_pair.certificate, client_pair.key))) as on:
        wait_for("it is refused", lambda: not on.tier.health().available or None, 20)
        assert "do not agree about TLS" in on.tier.health().reason


def test_files_that_are_no_certificates_are_told_before_anything_is_asked(tmp_path: Path, client_pair: Pair) -> None:
    (tmp_path / "text").write_text("no certificate")
    with pytest.raises(CertificateError, match=r"TLS cannot use .*text"):
        Nodes(endpoint(1, Tls(str(tmp_path / "text"))), time.monotonic)
    with pytest.raises(CertificateError, match="TLS cannot use"):
        Nodes(endpoint(1, Tls(None, client_pair.certificate, str(tmp_path / "text"))), time.monotonic)
