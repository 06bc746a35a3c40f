"""The configuration file, the sentences that refuse it, and the page that documents it."""

from __future__ import annotations

import contextlib
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from hicache import WRITE_POLICIES
from radix import MAX_GROUPS, POLICIES
from sgl_lmcache.config import (
    EVICTIONS,
    MAX_QUOTAS,
    RECORD_LIMIT_VARIABLE,
    RECORD_VARIABLE,
    VARIABLE,
    WRITES,
    Config,
    ConfigError,
    HostTier,
    MooncakeTier,
    Record,
    SsdTier,
    ValkeyTier,
)
from sgl_lmcache.config_file import from_environment, load, parse
from sgl_lmcache.errors import StartError
from sgl_lmcache.quantities import Nbytes, NbytesOrNone, Seconds

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"


def write(folder: Path, text: str) -> Path:
    path = folder / "tiers.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    """The sentence with which this file is refused, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(f"{folder}/")


def host(**keys: Any) -> HostTier:
    return parse({"tiers": [{"type": "host", **keys}]}, source="test").host


SSD = "tiers: [{type: host}, {type: ssd, path: /x, capacity: 1GiB"
"""The beginning of a configuration."""


def ssd(**keys: Any) -> SsdTier:
    below = {"type": "ssd", "path": "/x", "capacity": "1GiB", **keys}
    tier = parse({"tiers": [{"type": "host"}, below]}, source="test").ssd
    assert tier is not None
    return tier


def mooncake(**keys: Any) -> MooncakeTier:
    below = {"type": "mooncake", "master": "10.0.0.1", **keys}
    tier = parse({"tiers": [{"type": "host"}, below]}, source="test").mooncake
    assert tier is not None
    return tier


def test_no_file_means_defaults() -> None:
    assert load(None) == from_environment({}) == from_environment({VARIABLE: ""}) == Config()
    assert Config().host.capacity is None
    assert Config().ssd is None
    assert Config().prefetch.timeout == 5.0


@pytest.mark.parametrize("text", ["", "# a comment only\n", "---\n", "{}"])
def test_an_empty_file_means_defaults(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, text)) == Config()


def test_every_key(tmp_path: Path) -> None:
    text = """
        namespace: blue
        tiers:
          - {type: host, capacity: 8GiB, eviction: lru}
          - {type: ssd, path: /var/lib/sgl-lmcache, capacity: 200GiB, write: through, eviction: lru}
        eviction: lru
        prefetch: {policy: best_effort, timeout: 500ms}
        """
    config = from_environment({VARIABLE: str(write(tmp_path, text))})
    assert config.namespace == "blue"
    assert config.host == HostTier(capacity=Nbytes(8 * 2**30), eviction="lru")
    assert config.ssd == SsdTier("/var/lib/sgl-lmcache", Nbytes(200 * 2**30), "through", "lru")
    assert config.prefetch.policy == "best_effort"
    assert config.prefetch.timeout == 0.5


def test_nothing_is_recorded_unless_it_is_asked_for() -> None:
    assert Config().record is None
    assert parse({"record": {"path": "/x"}}, source="test").record == Record("/x", Nbytes(256 << 20))
    assert parse({"record": {"path": "/x", "limit": "1GB"}}, source="test").record == Record("/x", Nbytes(10**9))
    assert parse({"record": None}, source="test").record is None


def test_a_recording_that_the_environment_asks_for_takes_the_place_of_the_files(tmp_path: Path) -> None:
    file = {VARIABLE: str(write(tmp_path, "namespace: blue\nrecord: {path: /x, limit: 1MiB}"))}
    assert from_environment(file).record == Record("/x", Nbytes(1 << 20))
    assert from_environment({**file, RECORD_VARIABLE: ""}).record == Record("/x", Nbytes(1 << 20))
    assert from_environment({**file, RECORD_LIMIT_VARIABLE: "2MiB"}).record == Record("/x", Nbytes(1 << 20))
    assert from_environment({**file, RECORD_VARIABLE: "/y"}).record == Record("/y")
    for limit in ("2MiB", "2097152"):
        assert from_environment({RECORD_VARIABLE: "/y", RECORD_LIMIT_VARIABLE: limit}).record == Record(
            "/y", Nbytes(2 << 20)
        )
    config = from_environment({**file, RECORD_VARIABLE: "/y", RECORD_LIMIT_VARIABLE: "2MiB"})
    assert config == Config(namespace="blue", record=Record("/y", Nbytes(2 << 20)))


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({RECORD_VARIABLE: "y"}, 'record.path is "y", which is not an absolute path; write one that begins with /.'),
        ({RECORD_VARIABLE: "/y", RECORD_LIMIT_VARIABLE: "much"}, 'record.limit is "much", which cannot be read; '),
    ],
)
def test_a_wrong_variable_is_named(variables: dict[str, str], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment(variables)
    assert str(caught.value).startswith(f"{RECORD_VARIABLE}: {what}")


def test_an_ssd_tier_needs_its_path_and_its_capacity_only() -> None:
    assert ssd(path="/x", capacity=2**30) == SsdTier("/x", Nbytes(2**30), "through", None)


def test_a_mooncake_tier_needs_its_master_only() -> None:
    assert mooncake() == MooncakeTier("10.0.0.1")
    assert Config().mooncake is None


def test_every_key_of_a_mooncake_tier() -> None:
    assert mooncake(
        master="etcd://10.0.0.1:2379;10.0.0.2:2379",
        metadata="etcd://10.0.0.1:2379",
        address="node-1.example",
        protocol="rdma",
        devices="mlx5_0,mlx5_1",
        segment="64GiB",
        replicas=2,
        soft_pin="30m",
        write="selective",
        timeout="1500ms",
        lease="20s",
        eviction_high_watermark_ratio=0.8,
        eviction_ratio=0.1,
    ) == MooncakeTier(
        master="etcd://10.0.0.1:2379;10.0.0.2:2379",
        metadata="etcd://10.0.0.1:2379",
        address="node-1.example",
        protocol="rdma",
        devices="mlx5_0,mlx5_1",
        segment=NbytesOrNone(64 << 30),
        replicas=2,
        soft_pin=Seconds(1800.0),
        write="selective",
        timeout=Seconds(1.5),
        lease=Seconds(20.0),
        eviction_high_watermark_ratio=0.8,
        eviction_ratio=0.1,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("master", form) for form in ("kv", "kv:1", "10.0.0.1:65535", "etcd://kv:1", "etcd://a:1;b:2;c:3")),
        *(("metadata", form) for form in ("P2PHANDSHAKE", "http://kv:1/metadata", "etcd://a:1", "etcd://a:1;b:2")),
        *(("segment", form) for form in (0, "0GiB", 1, "1.5TiB")),
        *(("timeout", seconds) for seconds in (1.0, 10.0)),
        *(("eviction_ratio", ratio) for ratio in (1, 0.001)),
    ],
)
def test_forms_of_the_keys_of_a_mooncake_tier(key: str, value: object) -> None:
    assert getattr(mooncake(**{key: value}), key) == (mooncake(segment=value).segment if key == "segment" else value)


def test_a_segment_of_nothing_is_a_size() -> None:
    assert mooncake(segment=0).segment == 0
    assert mooncake(segment=str(mooncake(segment=0).segment)).segment == 0


@pytest.mark.parametrize("tier", [HostTier(), SsdTier("/x", Nbytes(1))])
def test_a_tier_without_eviction_has_the_one_for_all(tier: HostTier | SsdTier) -> None:
    config = Config(eviction="lfu")
    assert tier.eviction is None
    assert config.eviction_of(tier) == config.eviction == "lfu"


def test_an_ssd_has_another_policy_where_that_for_all_is_for_host_memory_only() -> None:
    ssd = SsdTier("/x", Nbytes(1 << 30))
    config = Config(tiers=(HostTier(), ssd), eviction="gittins")
    assert (config.eviction_of(config.host), config.eviction_of(ssd)) == ("gittins", "lru")


@pytest.mark.parametrize(
    ("quota", "nbytes", "text"),
    [("40%", 4000, "40%"), ("0.5 %", 50, "0.5%"), ("2KiB", 2048, "2KiB"), (77, 77, "77B"), ("100%", 10_000, "100%")],
)
def test_a_quota_is_a_size_or_a_share(quota: object, nbytes: int, text: str) -> None:
    config = parse({"tiers": [{"type": "host", "quotas": {"team": quota}}]}, source="x")
    assert config.host.quotas["team"].of(10_000) == nbytes
    assert str(config.host.quotas["team"]) == text


def test_as_many_quotas_as_there_are_groups_of_pages() -> None:
    assert MAX_QUOTAS == MAX_GROUPS - 1


def test_the_evictions_are_those_of_the_index() -> None:
    assert set(EVICTIONS) == set(POLICIES)


def test_the_write_policies_are_those_of_the_engine() -> None:
    assert tuple(WRITE_POLICIES) == WRITES
    assert [ssd(write=write).write for write in WRITES] == list(WRITES)


def test_the_lower_tiers_are_those_below_host_memory_in_their_order() -> None:
    assert Config().lower == ()
    below = ssd()
    assert Config(tiers=(HostTier(), below)).lower == (below,)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (4096, 4096),
        ("1B", 1),
        ("8GiB", 8 * 2**30),
        ("512MiB", 2**29),
        ("1.5GiB", 3 * 2**29),
        ("2GB", 2 * 10**9),
        (" 3 KiB ", 3072),
        ("0.1TB", 10**11),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert host(capacity=text).capacity == nbytes


@pytest.mark.parametrize(
    ("text", "timeout_s"),
    [(5, 5.0), (0.25, 0.25), ("5s", 5.0), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0), ("7d", 604800.0)],
)
def test_durations(text: str | float, timeout_s: float) -> None:
    assert parse({"prefetch": {"timeout": text}}, source="test").prefetch.timeout == timeout_s


@given(st.integers(min_value=1, max_value=2**50))
def test_a_size_is_written_as_it_is_read(nbytes: int) -> None:
    assert host(capacity=str(Nbytes(nbytes))).capacity == nbytes


@given(st.floats(min_value=1e-9, max_value=8e8))
def test_a_duration_is_written_as_it_is_read(timeout_s: float) -> None:
    assert parse({"prefetch": {"timeout": str(Seconds(timeout_s))}}, source="test").prefetch.timeout == timeout_s


@given(st.integers(min_value=1, max_value=10**6), st.integers(min_value=0, max_value=999))
def test_a_decimal_size_is_exact_to_the_byte(whole: int, thousandths: int) -> None:
    assert host(capacity=f"{whole}.{thousandths:03}GiB").capacity == int(Decimal(f"{whole}.{thousandths:03}") * 2**30)


@pytest.mark.parametrize(
    ("text", "key", "right"),
    [
        ("namespase: a", "namespase", "did you mean namespace?"),
        ("zzz: a", "zzz", "possible: namespace, tiers, eviction, pins, prefetch"),
        ("1: a", "1", "possible: namespace"),
        ("tiers: [{type: host, capcity: 8GiB}]", "tiers[0].capcity", "did you mean capacity?"),
        ("tiers: [{type: host, path: /x}]", "tiers[0].path", "possible: capacity, eviction, quotas, type"),
        ("prefetch: {polcy: auto}", "prefetch.polcy", "did you mean policy?"),
        ("namespace: ''", "namespace", "give it a name"),
        ("namespace: 7", "namespace", "put it in quotes"),
        ("namespace: [a]", "namespace", "text is expected"),
        ("tiers: host", "tiers", "a list is expected"),
        ("tiers:", "tiers", "a list is expected"),
        ("tiers: []", "tiers", "- {type: host}"),
        ("tiers: [host]", "tiers[0]", "a mapping is expected"),
        ("tiers: [{capacity: 8GiB}]", "tiers[0]", "available: host, ssd, valkey, mooncake"),
        ("tiers: [{type: disk}]", "tiers[0].type", "available: host, ssd, valkey, mooncake"),
        ("tiers: [{type: [host]}]", "tiers[0].type", "available: host, ssd, valkey, mooncake"),
        ("tiers: [{type: host}, {type: host}]", "tiers[1]", "add its capacity to tiers[0]"),
        ("tiers: [{type: ssd, path: /x, capacity: 1GiB}]", "tiers[0]", "put `- {type: host}` before it"),
        ("tiers: [{type: host}, {path: /x, capacity: 1GiB}]", "tiers[1]", "available: host, ssd, valkey, mooncake"),
        ("tiers: [{type: host}, {type: ssd, capacity: 1GiB}]", "tiers[1]", "such as /var/lib/sgl-lmcache"),
        ("tiers: [{type: host}, {type: ssd, path: /x}]", "tiers[1]", "such as 200GiB"),
        ("tiers: [{type: host}, {type: ssd, paht: /x, capacity: 1GiB}]", "tiers[1].paht", "did you mean path?"),
        ("tiers: [{type: host}, {type: ssd, url: /x, capacity: 1GiB}]", "tiers[1].url", "possible: path, capacity"),
        ("tiers: [{type: host}, {type: ssd, path: 7, capacity: 1GiB}]", "tiers[1].path", "put it in quotes"),
        ("tiers: [{type: host}, {type: ssd, path: x, capacity: 1GiB}]", "tiers[1].path", "begins with /"),
        ("tiers: [{type: host}, {type: ssd, path: ~/x, capacity: 1GiB}]", "tiers[1].path", "begins with /"),
        ("tiers: [{type: host}, {type: ssd, path: '', capacity: 1GiB}]", "tiers[1].path", "begins with /"),
        ("tiers: [{type: host}, {type: ssd, path: /x, capacity: 0}]", "tiers[1].capacity", "above 0"),
        ("tiers: [{type: host}, {type: ssd, path: /x, capacity: 1Gb}]", "tiers[1].capacity", "did you mean 1GB?"),
        (
            "tiers: [{type: host}, {type: ssd, path: /x, capacity: 1GiB, write: never}]",
            *("tiers[1].write", "possible: back, selective, through"),
        ),
        (
            "tiers: [{type: host}, {type: ssd, path: /x, capacity: 1GiB, eviction: gittins}]",
            *("tiers[1].eviction", "possible: gdsf, lfu, lru, s3fifo"),
        ),
        (
            "tiers: [{type: host}, {type: ssd, path: /x, capacity: 1GiB}, {type: ssd, path: /y, capacity: 1GiB}]",
            *("tiers[2]", "put both disks into one file system"),
        ),
        (
            "tiers: [{type: host}, {type: ssd, path: /x, capacity: 1GiB}, {type: host}]",
            *("tiers[2]", "add its capacity to tiers[0]"),
        ),
        ("record: {path: trace.jsonl}", "record.path", "write one that begins with /"),
        ("record: {limit: 1MiB}", "record", "such as /var/log/sgl-lmcache/trace.jsonl"),
        ("record: {path: /x, limit: 0}", "record.limit", "not above 0"),
        ("record: {path: /x, limits: 1MiB}", "record.limits", "did you mean limit?"),
        ("record: /x", "record", "a mapping"),
        ("metrics: {listen: 9401}", "metrics.listen", "text is expected"),
        ('metrics: {listen: "9401"}', "metrics.listen", "such as 127.0.0.1:9401"),
        ('metrics: {listen: "localhost:metrics"}', "metrics.listen", "such as 127.0.0.1:9401"),
        ('metrics: {listen: "localhost:0"}', "metrics.listen", "such as 127.0.0.1:9401"),
        ("metrics: {}", "metrics", "such as 127.0.0.1:9401"),
        ("tiers: [{type: host}, {type: ssd, path: /x, capacity: 1GiB, endurance: much}]", "tiers[1].endurance", "read"),
        ("tiers: [{type: host}, {type: ssd, path: /x, capacity: 1GiB, endurance: 0}]", "tiers[1].endurance", "above 0"),
        ("tiers: [{type: valkey, url: 'valkey://a'}]", "tiers[0]", "put `- {type: host}` before it"),
        ("tiers: [{type: host}, {type: valkey}]", "tiers[1]", "such as valkey://127.0.0.1:6379/0"),
        ("tiers: [{type: host}, {type: valkey, url: 'kv:6379'}]", "tiers[1].url", "valkeys:// for TLS"),
        ("tiers: [{type: host}, {type: valkey, url: 'http://:secret@kv'}]", "tiers[1].url", 'begins with "http"'),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://:secret@'}]", "tiers[1].url", "names no host"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://:secret@kv:port'}]", "tiers[1].url", "cannot be"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://kv:70000'}]", "tiers[1].url", "cannot be"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://kv:0'}]", "tiers[1].url", "port 0"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://u:secret/w@kv:1/0'}]", "tiers[1].url", "as %2F"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://kv/a'}]", "tiers[1].url", "number of a database"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://kv/1?a=secret'}]", "tiers[1].url", "behind ? or #"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://kv/1', cluster: true}]", "tiers[1].url", "database 0"),
        (
            "tiers: [{type: host}, {type: valkey, url: 'valkey://:secret@kv', password_env: P}]",
            *("tiers[1]", "give the password once"),
        ),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://kv', ca_file: /ca}]", "tiers[1].ca_file", "valkeys://"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkeys://kv', cert_file: /c}]", "tiers[1]", "both or none"),
        (
            "tiers: [{type: host}, {type: valkey, url: 'valkey://kv', connections: 0}]",
            "tiers[1].connections",
            "1 to 64",
        ),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://kv', ttl: 500ms}]", "tiers[1].ttl", "at least 1s"),
        (
            "tiers: [{type: host}, {type: valkey, url: 'valkey://a'}, {type: valkey, url: 'valkey://b'}]",
            *("tiers[2]", "nodes of a cluster"),
        ),
        ("tiers: [{type: mooncake, master: kv}]", "tiers[0]", "put `- {type: host}` before it"),
        ("tiers: [{type: host}, {type: mooncake}]", "tiers[1]", "has no master, which has no default"),
        ("tiers: [{type: host}, {type: mooncake}]", "tiers[1]", "such as 10.0.0.1:50051"),
        ("tiers: [{type: host}, {type: mooncake, master: 7}]", "tiers[1].master", "put it in quotes"),
        ("tiers: [{type: host}, {type: mooncake, mastr: a}]", "tiers[1].mastr", "did you mean master?"),
        *(
            (f"tiers: [{{type: host}}, {{type: mooncake, master: '{master}'}}]", "tiers[1].master", "is not a master")
            for master in ("", "a b", "a:b", "a:0", "a:65536", "a:1:2", "http://a:1", "etcd://", "etcd://a", "a:1;b:2")
        ),
        ("tiers: [{type: host}, {type: mooncake, master: 'etcd://a:1;'}]", "tiers[1].master", "etcd://host:port;host"),
        *(
            (
                f"tiers: [{{type: host}}, {{type: mooncake, master: a, metadata: '{metadata}'}}]",
                *("tiers[1].metadata", "write P2PHANDSHAKE, http://host:port/metadata or etcd://host:port"),
            )
            for metadata in ("", "p2phandshake", "a:1", "http://a/metadata", "http://a:1", "etcd://a", "redis://a:1")
        ),
        *(
            (
                f"tiers: [{{type: host}}, {{type: mooncake, master: a, address: '{address}'}}]",
                *("tiers[1].address", "without scheme and port"),
            )
            for address in ("", "a:1", "tcp://a", "fd00::1", "a b")
        ),
        (
            "tiers: [{type: host}, {type: mooncake, master: a, protocol: RDMA}]",
            *("tiers[1].protocol", "write tcp or rdma"),
        ),
        ("tiers: [{type: host}, {type: mooncake, master: a, devices: [b]}]", "tiers[1].devices", "text is expected"),
        ("tiers: [{type: host}, {type: mooncake, master: a, segment: -1}]", "tiers[1].segment", "or 0 for none"),
        ("tiers: [{type: host}, {type: mooncake, master: a, segment: 4G}]", "tiers[1].segment", "mean 4GiB?"),
        ("tiers: [{type: host}, {type: mooncake, master: a, replicas: 0}]", "tiers[1].replicas", "write 1"),
        ("tiers: [{type: host}, {type: mooncake, master: a, replicas: 1.5}]", "tiers[1].replicas", "a whole number"),
        ("tiers: [{type: host}, {type: mooncake, master: a, soft_pin: 0}]", "tiers[1].soft_pin", "not above 0"),
        ("tiers: [{type: host}, {type: mooncake, master: a, write: never}]", "tiers[1].write", "possible: back"),
        *(
            (
                f"tiers: [{{type: host}}, {{type: mooncake, master: a, timeout: {timeout}}}]",
                *("tiers[1].timeout", "from 1s to 10s"),
            )
            for timeout in ("999ms", "10.5s")
        ),
        ("tiers: [{type: host}, {type: mooncake, master: a, timeout: 2 sec}]", "tiers[1].timeout", "500ms"),
        ("tiers: [{type: host}, {type: mooncake, master: a, lease: 0s}]", "tiers[1].lease", "not above 0"),
        *(
            (
                f"tiers: [{{type: host}}, {{type: mooncake, master: a, {key}: {ratio}}}]",
                *(f"tiers[1].{key}", "which is not above 0 and up to 1"),
            )
            for key in ("eviction_high_watermark_ratio", "eviction_ratio")
            for ratio in (0, -0.5, 1.01, ".nan")
        ),
        ("tiers: [{type: host}, {type: mooncake, master: a, eviction_ratio: 5%}]", "tiers[1].eviction_ratio", "number"),
        (
            "tiers: [{type: host}, {type: mooncake, master: a}, {type: mooncake, master: b}]",
            *("tiers[2]", "add its segment to the other's"),
        ),
        ("tiers: [{type: host, capacity: 0}]", "tiers[0].capacity", "above 0"),
        ("tiers: [{type: host, capacity: -8}]", "tiers[0].capacity", "above 0"),
        ("tiers: [{type: host, capacity: 0GiB}]", "tiers[0].capacity", "above 0"),
        ("tiers: [{type: host, capacity: 1.5}]", "tiers[0].capacity", "8GiB"),
        ("tiers: [{type: host, capacity: yes}]", "tiers[0].capacity", "8GiB"),
        ("tiers: [{type: host, capacity: '8'}]", "tiers[0].capacity", "8GiB"),
        ("tiers: [{type: host, capacity: -8GiB}]", "tiers[0].capacity", "8GiB"),
        ("tiers: [{type: host, capacity: 4gib}]", "tiers[0].capacity", "did you mean 4GiB?"),
        ("tiers: [{type: host, capacity: 4G}]", "tiers[0].capacity", "did you mean 4GiB?"),
        ("tiers: [{type: host, capacity: 4Gi}]", "tiers[0].capacity", "did you mean 4GiB?"),
        ("tiers: [{type: host, capacity: 4 pages}]", "tiers[0].capacity", "8GiB"),
        ("tiers: [{type: host, eviction: lru2}]", "tiers[0].eviction", "did you mean lru?"),
        ("eviction: random", "eviction", "possible: gdsf, gittins, lfu, lru, s3fifo"),
        ("eviction: 3", "eviction", "possible: gdsf, gittins"),
        ("tiers: [{type: host, quotas: {a: 101%}}]", "tiers[0].quotas[...]", "more than there is"),
        ("tiers: [{type: host, quotas: {a: 60%, b: 41%}}]", "tiers[0].quotas", "101% together"),
        ("tiers: [{type: host, capacity: 1GiB, quotas: {a: 1GiB, b: 1%}}]", "tiers[0].quotas", "more together"),
        ("tiers: [{type: host, quotas: {'': 1%}}]", "tiers[0].quotas", "name a cache_salt"),
        ("tiers: [{type: host, quotas: {a: lots}}]", "tiers[0].quotas[...]", "cannot be read"),
        (f"tiers: [{{type: host, quotas: {{{', '.join(f't{i}: 1%' for i in range(64))}}}}}]", "tiers[0].quotas", "63"),
        (f"{SSD}, quotas: {{a: 101%}}}}]", "tiers[1].quotas[...]", "more than there is"),
        (f"{SSD}, quotas: {{a: 60%, b: 41%}}}}]", "tiers[1].quotas", "101% together"),
        (f"{SSD}, quotas: {{a: 1GiB, b: 1%}}}}]", "tiers[1].quotas", "more together than the capacity, 1GiB"),
        (f"{SSD}, quotas: {{'': 1%}}}}]", "tiers[1].quotas", "name a cache_salt"),
        (f"{SSD}, quota: {{a: 1%}}}}]", "tiers[1].quota", "did you mean quotas?"),
        ("tiers: [{type: host}, {type: valkey, url: 'valkey://h', quotas: {a: 1%}}]", "tiers[1].quotas", "not a known"),
        ("pins: [{tokens: prompt.json}]", "pins[0].tokens", "absolute path"),
        ("pins: [{ttl: 1h}]", "pins[0]", "has no tokens, which has no default"),
        ("prefetch: auto", "prefetch", "a mapping is expected"),
        ("prefetch: {policy: waitt}", "prefetch.policy", "did you mean wait?"),
        ("prefetch: {timeout: 0}", "prefetch.timeout", "500ms"),
        ("prefetch: {timeout: -1}", "prefetch.timeout", "500ms"),
        ("prefetch: {timeout: .inf}", "prefetch.timeout", "500ms"),
        ("prefetch: {timeout: .nan}", "prefetch.timeout", "500ms"),
        ("prefetch: {timeout: true}", "prefetch.timeout", "500ms"),
        ("prefetch: {timeout: 5 sec}", "prefetch.timeout", "500ms"),
        ("prefetch: {timeout: 5S}", "prefetch.timeout", "did you mean 5s?"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(tmp_path: Path, text: str, key: str, right: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"tiers.yaml: {key} ")
    assert right in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tiers: [", "line 1, column 9"),
        ("a: 1\n\tb: 2", "line 2"),
        ("a: 1\n---\nb: 2", "another document"),
        ("eviction: lru\neviction: lru", "the key eviction stands here and in line 1"),
        ("tiers: [{type: host, type: host}]", "the key type stands here and in line 1"),
        ("[1, 2]: 3", "line 1"),
        ("? {a: 1}\n: 3", "line 1"),
        ("namespace: 2020-13-45", "month must be in 1..12"),
        ("namespace: \x01", "not valid YAML"),
        ("!!python/object:os.system {}", "constructor"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["- type: host", "host", "7"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith("tiers.yaml: the file is ")
    assert "where a mapping is expected" in message


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, says in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), (binary, "not UTF-8")):
        with pytest.raises(StartError, match=says) as caught:
            from_environment({VARIABLE: str(path)})
        assert str(path) in str(caught.value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.sampled_from(["host", "ssd", "mooncake", "lru", "8GiB", "/x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *("namespace", "tiers", "eviction", "prefetch"),
                        *("type", "capacity", "path", "write", "policy", "timeout", "url", "ttl", "x"),
                        *("master", "segment", "replicas", "lease", "eviction_ratio"),
                        *("record", "limit"),
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_tree_is_a_configuration_or_is_refused(tree: object) -> None:
    with contextlib.suppress(ConfigError):
        config = parse(tree, source="tree")
        assert config.host.capacity is None or config.host.capacity > 0
        assert config.prefetch.timeout > 0


def keys_of(struct: inspect.Type, prefix: str = "") -> list[str]:
    """The path of every key below a struct, in the notation of the documentation."""
    assert isinstance(struct, inspect.StructType)
    keys = [f"{prefix}{struct.tag_field}"] if struct.tag_field else []
    for field in struct.fields:
        members = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
        below = [member for member in members if isinstance(member, inspect.StructType)]
        item = field.type.item_type if isinstance(field.type, inspect.VarTupleType) else None
        if isinstance(item, inspect.StructType) and not item.tag_field:
            keys += keys_of(item, f"{prefix}{field.encode_name}[].")
        elif below:
            keys += keys_of(below[0], f"{prefix}{field.encode_name}.")
        else:
            keys.append(prefix + field.encode_name)
    return keys


def keys_in(section: str) -> list[str]:
    """What stands between backticks in the first column of a section of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n#")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("section", "struct", "prefix"),
    [
        ("Keys", Config, ""),
        ("Keys of the host tier", HostTier, "tiers[]."),
        ("Keys of the SSD tier", SsdTier, "tiers[]."),
        ("Keys of the Valkey tier", ValkeyTier, "tiers[]."),
        ("Keys of the Mooncake tier", MooncakeTier, "tiers[]."),
    ],
)
def test_the_page_documents_every_key_and_no_other(section: str, struct: type, prefix: str) -> None:
    assert sorted(keys_in(section)) == sorted(keys_of(inspect.type_info(struct), prefix))


def test_every_kind_of_tier_has_a_section_of_keys() -> None:
    kinds = get_args(get_args(get_type_hints(Config)["tiers"])[0])
    assert set(kinds) == {HostTier, SsdTier, ValkeyTier, MooncakeTier}


def test_the_examples_of_the_page_load(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for example in examples:
        load(write(tmp_path, example))


def test_the_error_that_the_page_shows_is_the_one_given(tmp_path: Path) -> None:
    assert refusal(tmp_path, "tiers: [{type: host, capcity: 8GiB}]") in PAGE.read_text(encoding="utf-8")


def test_the_first_example_of_the_page_shows_the_defaults() -> None:
    example = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    shown = parse(yaml.safe_load(example), source="page")
    assert msgspec.structs.replace(shown, tiers=()) == msgspec.structs.replace(Config(), tiers=())
