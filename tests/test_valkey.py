"""From the keys of a Valkey tier to its store: passwords, certificates, and what the doctor finds."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hicache.valkey import Endpoint, Tls
from sgl_lmcache.config import ValkeyTier, without_password
from sgl_lmcache.errors import StartError
from sgl_lmcache.quantities import Seconds
from sgl_lmcache.store import read_store
from sgl_lmcache.valkey import endpoint_of, warn_of_plain_text
from tests.support.processes import free_port
from tests.support.valkey import cluster, store_server


def test_a_url_says_where_the_store_is_and_who_we_are() -> None:
    endpoint = endpoint_of(ValkeyTier("valkey://kv%40team:p%2Fw@[::1]:7000/3", timeout=Seconds(0.5)), {})
    assert (endpoint.host, endpoint.port, endpoint.db) == ("::1", 7000, 3)
    assert (endpoint.username, endpoint.password, endpoint.tls) == ("kv@team", "p/w", None)
    assert endpoint.timeout_s == 0.5
    assert endpoint_of(ValkeyTier("valkey://kv"), {}) == Endpoint("kv", 6379)
    assert endpoint_of(ValkeyTier("valkeys://kv", cluster=True), {}) == Endpoint("kv", 6379, tls=Tls(), is_cluster=True)


def test_a_password_may_be_in_a_file_or_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("of the file\n")
    assert (
        endpoint_of(ValkeyTier("valkey://kv", password_file=str(tmp_path / "password")), {}).password == "of the file"
    )
    assert (
        endpoint_of(ValkeyTier("valkey://kv", password_env="PW"), {"PW": "of the variable"}).password
        == "of the variable"
    )
    with pytest.raises(StartError, match="the environment variable PW, which password_env"):
        endpoint_of(ValkeyTier("valkey://kv", password_env="PW"), {})
    with pytest.raises(StartError, match=r"/nowhere, which password_file .* \(No such file"):
        endpoint_of(ValkeyTier("valkey://kv", password_file="/nowhere"), {})
    with pytest.raises(StartError, match=r"/nowhere, which ca_file"):
        endpoint_of(ValkeyTier("valkeys://kv", ca_file="/nowhere"), {})


def test_a_password_is_never_shown() -> None:
    tier = ValkeyTier("valkey://user:secret@kv:6379/0")
    assert "secret" not in repr(tier) + repr(endpoint_of(tier, {})) + str(endpoint_of(tier, {}))
    assert without_password(tier.url) == "valkey://user:***@kv:6379/0"
    assert without_password("valkey://:secret@kv") == "valkey://:***@kv"
    assert without_password("valkey://user@kv") == "valkey://user@kv"


@pytest.mark.parametrize(
    ("endpoint", "warns"),
    [
        (Endpoint("kv.example", 6379), True),
        (Endpoint("192.0.2.1", 6379), True),
        (Endpoint("kv.example", 6379, tls=Tls()), False),
        (Endpoint("127.0.0.1", 6379), False),
        (Endpoint("::1", 6379), False),
        (Endpoint("localhost", 6379), False),
    ],
)
def test_plain_text_to_another_machine_is_warned_of(
    endpoint: Endpoint, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_plain_text(endpoint)
    assert ("not encrypted" in caplog.text) == warns


def test_the_doctor_asks_the_store(tmp_path: Path) -> None:
    reader = ("--user", "reader", "on", ">secret", "~sgl-lmcache:*", "+@all", "-set")
    with store_server(tmp_path / "store", *reader) as server:
        url = f"valkey://127.0.0.1:{server.port}"
        store = read_store(ValkeyTier(url))
        assert (store.refusal, store.trouble, store.is_local) == ("", "", True)
        refused = read_store(ValkeyTier(f"valkey://reader:secret@127.0.0.1:{server.port}"))
        assert "refuses SET: NOPERM" in refused.trouble
        assert "secret" not in repr(refused)
        assert (
            "refuses the user or the password"
            in read_store(ValkeyTier(f"valkey://reader:no@127.0.0.1:{server.port}")).trouble
        )
    assert "cannot be reached" in read_store(ValkeyTier(f"valkey://127.0.0.1:{free_port()}")).trouble
    assert "password_env" in read_store(ValkeyTier(url, password_env="NOWHERE"), {}).refusal


def test_the_doctor_asks_every_node_of_a_cluster(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster", 3) as nodes:
        tier = ValkeyTier(f"valkey://127.0.0.1:{nodes[0].port}", cluster=True)
        assert read_store(tier).trouble == ""
        nodes[2].kill()
        assert str(nodes[2].port) in read_store(tier).trouble
    assert "CLUSTER" in _of_a_single_server(tmp_path)


def _of_a_single_server(tmp_path: Path) -> str:
    with store_server(tmp_path / "single") as server:
        return read_store(ValkeyTier(f"valkey://127.0.0.1:{server.port}", cluster=True)).trouble.upper()
