"""From the configuration of a Mooncake tier to the pool, and what to install where its client cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache.mooncake import Pool
from sgl_lmcache.config import Config, MooncakeTier
from sgl_lmcache.config_file import parse
from sgl_lmcache.errors import StartError
from sgl_lmcache.mooncake import explain_unusable, pool_of, why_unusable
from sgl_lmcache.quantities import NbytesOrNone, Seconds


def tier_of(**keys: object) -> MooncakeTier:
    config: Config = parse({"tiers": [{"type": "host"}, {"type": "mooncake", **keys}]}, source="test")
    assert config.mooncake is not None
    return config.mooncake


def test_the_pool_of_the_defaults() -> None:
    assert pool_of(tier_of(master="10.0.0.1"), 2) == Pool(
        master="10.0.0.1:50051", metadata="P2PHANDSHAKE", segment_nbytes=2 << 30, timeout_s=2.0
    )


def test_every_key_reaches_the_pool() -> None:
    tier = tier_of(
        master="etcd://a:1;b:2",
        metadata="http://10.0.0.1:8080/metadata",
        address="10.0.0.7",
        protocol="rdma",
        devices="mlx5_0",
        segment=0,
        replicas=2,
        soft_pin="5m",
        timeout="1s",
    )
    assert pool_of(tier, 4) == Pool(
        master="etcd://a:1;b:2",
        metadata="http://10.0.0.1:8080/metadata",
        address="10.0.0.7",
        protocol="rdma",
        devices="mlx5_0",
        segment_nbytes=0,
        replicas=2,
        soft_pin_s=300.0,
        timeout_s=1.0,
    )


def test_plain_numbers_reach_the_client_process() -> None:
    pool = pool_of(tier_of(master="a", soft_pin="5m"), 1)
    assert [type(value) for value in (pool.segment_nbytes, pool.timeout_s, pool.soft_pin_s)] == [int, float, float]
    assert isinstance(tier_of(master="a").timeout, Seconds)
    assert isinstance(tier_of(master="a").segment, NbytesOrNone)


def test_a_share_that_mooncake_would_refuse_is_told_at_the_start() -> None:
    pool_of(tier_of(master="a", segment="64MiB"), 4)
    with pytest.raises(StartError, match="is 60MiB, 15,728,640 bytes for each of 4 ranks"):
        pool_of(tier_of(master="a", segment="60MiB"), 4)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("ModuleNotFoundError: No module named 'mooncake'", 'pip install "sgl-lmcache[mooncake]"'),
        ("ImportError: libcudart.so.12: cannot open shared object file", "for CUDA, which is not here"),
        ("ImportError: libcuda.so.1: cannot open shared object file", '"sgl-lmcache[mooncake-cpu]"'),
        ("ImportError: libibverbs.so.1: cannot open shared", "apt-get install libibverbs1 librdmacm1 libnuma1"),
        ("ImportError: librdmacm.so.1: cannot open shared", "apt-get install libibverbs1 librdmacm1 libnuma1"),
        ("ImportError: libnuma.so.1: cannot open shared", "apt-get install libibverbs1 librdmacm1 libnuma1"),
        ("ImportError: libother.so.3: cannot open shared", "cannot be used here (ImportError: libother"),
    ],
)
def test_what_to_install(error: str, says: str) -> None:
    sentence = explain_unusable(error)
    assert says in sentence
    assert error in sentence


def test_the_client_can_be_used_where_the_tests_run() -> None:
    assert why_unusable() == ""


def test_a_missing_client_is_found_out_without_loading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("raise ImportError('libnuma.so.1: no such file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "apt-get install" in why_unusable()
