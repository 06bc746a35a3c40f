"""What a configuration may not be although each of its values is of the right kind: checked once it has been read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sgl_lmcache.config import (
    MASTER_PORT,
    MAX_CONNECTIONS,
    MAX_NODE_TIMEOUT_S,
    MAX_QUOTAS,
    MIN_NODE_TIMEOUT_S,
    P2P_HANDSHAKE,
    Config,
    HostTier,
    MooncakeTier,
    SsdTier,
    ValkeyTier,
    split_address,
)
from sgl_lmcache.quantities import Nbytes, Quota, quote


class KeyedError(Exception):
    """One thing wrong at one key; `parse` turns it into a `ConfigError` that names the file as well."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"{key} {what}" if key else f"the file {what}")


_INSTEAD_OF_A_SECOND: Mapping[type, str] = {
    HostTier: "add its capacity to tiers[0] and remove it",
    SsdTier: "remove it, or put both disks into one file system",
    ValkeyTier: "remove it, or make both servers nodes of a cluster",
    MooncakeTier: "remove it, or add its segment to the other's",
}
"""What would be right, for each kind of tier: there is one of each."""


def check(config: Config) -> None:
    """Raises `KeyedError` for the first thing that is wrong."""
    if not config.tiers:
        raise KeyedError("tiers", "is empty; the first tier has to be the host tier, `- {type: host}`")
    if not isinstance(config.tiers[0], HostTier):
        raise KeyedError("tiers[0]", "is not the host tier; put `- {type: host}` before it")
    for position, tier in enumerate(config.tiers):
        if type(tier) in map(type, config.tiers[:position]):
            name = tier.__struct_config__.tag
            raise KeyedError(f"tiers[{position}]", f"is a second {name} tier; {_INSTEAD_OF_A_SECOND[type(tier)]}")
        if isinstance(tier, HostTier | SsdTier):
            _check_quotas(tier.quotas, tier.capacity, f"tiers[{position}].quotas")
        if isinstance(tier, SsdTier):
            _check_absolute(tier.path, f"tiers[{position}].path")
        if isinstance(tier, ValkeyTier):
            _check_valkey(tier, f"tiers[{position}]")
        if isinstance(tier, MooncakeTier):
            _check_mooncake(tier, f"tiers[{position}]")
    for position, pin in enumerate(config.pins):
        _check_absolute(pin.tokens, f"pins[{position}].tokens")
    if config.record is not None:
        _check_absolute(config.record.path, "record.path")
    if config.metrics is not None:
        _check_listen(config.metrics.listen)
    if not config.namespace:
        raise KeyedError("namespace", "is empty; give it a name or leave the key out")


def _check_listen(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise KeyedError("metrics.listen", f"is {quote(listen)}; write an address and a port, such as 127.0.0.1:9401")


def _check_absolute(path: str, key: str) -> None:
    if not Path(path).is_absolute():
        raise KeyedError(key, f"is {quote(path)}, which is not an absolute path; write one that begins with /")


def _check_quotas(quotas: Mapping[str, Quota], capacity: Nbytes | None, key: str) -> None:
    if "" in quotas:
        raise KeyedError(key, "has a quota for an empty name; name a cache_salt")
    if len(quotas) > MAX_QUOTAS:
        raise KeyedError(key, f"has {len(quotas)} tenants; at most {MAX_QUOTAS} can have one")
    percent = sum(quota.percent for quota in quotas.values())
    sizes = sum(quota.nbytes for quota in quotas.values())
    if percent > 100:
        raise KeyedError(key, f"are {percent:g}% together, and there is 100%; make some smaller")
    if capacity is not None and sizes + percent / 100 * capacity > capacity:
        raise KeyedError(key, f"are more together than the capacity, {capacity}; make some smaller")


def _check_valkey(tier: ValkeyTier, key: str) -> None:
    """The URL is never quoted: a password may be in it."""
    form = (
        "write it as valkey://[user[:password]@]host[:port][/database], or valkeys:// for TLS, with / ? # and @ in a "
        "password as %2F %3F %23 and %40"
    )
    try:
        url = urlsplit(tier.url)
        host, port = url.hostname, url.port
    except ValueError:
        raise KeyedError(f"{key}.url", f"has a host or a port that cannot be; {form}") from None
    if url.scheme not in ("valkey", "valkeys"):
        raise KeyedError(f"{key}.url", f"begins with {quote(url.scheme)}, which is not a scheme of this tier; {form}")
    if not host:
        raise KeyedError(f"{key}.url", f"names no host; {form}")
    if port == 0:
        raise KeyedError(f"{key}.url", f"names port 0; {form}")
    database = url.path.removeprefix("/")
    if not re.fullmatch(r"[0-9]{0,5}", database):
        raise KeyedError(f"{key}.url", f"has a path that is not the number of a database; {form}")
    if url.query or url.fragment:
        raise KeyedError(f"{key}.url", f"has something behind ? or #, which means nothing here; {form}")
    if tier.cluster and int(database or 0):
        raise KeyedError(f"{key}.url", "names a database, and a cluster has only database 0; remove it")
    passwords = [name for name in ("password_file", "password_env") if getattr(tier, name) is not None]
    passwords += ["a password in url"] if url.password else []
    if len(passwords) > 1:
        raise KeyedError(key, f"has {' and '.join(passwords)}; give the password once")
    files = [name for name in ("ca_file", "cert_file", "key_file") if getattr(tier, name) is not None]
    if files and url.scheme != "valkeys":
        raise KeyedError(f"{key}.{files[0]}", "is for TLS, and url begins with valkey://; write valkeys:// there")
    if (tier.cert_file is None) != (tier.key_file is None):
        raise KeyedError(key, "has one of cert_file and key_file; a certificate needs its key, so give both or none")
    if not 1 <= tier.connections <= MAX_CONNECTIONS:
        raise KeyedError(f"{key}.connections", f"is {tier.connections}, which is not from 1 to {MAX_CONNECTIONS}")
    if tier.ttl < 1:
        raise KeyedError(f"{key}.ttl", f"is {tier.ttl}, and a store counts whole seconds; give at least 1s")


_HOST_PORT = r"[^\s:/;,]+:[0-9]{1,5}"

_HA_MASTER = re.compile(rf"etcd://{_HOST_PORT}(;{_HOST_PORT})*")

_METADATA = re.compile(rf"(http://{_HOST_PORT}/\S+|etcd://{_HOST_PORT}(;{_HOST_PORT})*)")


def _check_mooncake(tier: MooncakeTier, key: str) -> None:
    if not _HA_MASTER.fullmatch(tier.master) and split_address(tier.master, MASTER_PORT) is None:
        raise KeyedError(
            f"{key}.master",
            f"is {quote(tier.master)}, which is not a master; write host:port, or etcd://host:port;host:port for "
            "masters of which one leads",
        )
    if tier.metadata != P2P_HANDSHAKE and not _METADATA.fullmatch(tier.metadata):
        raise KeyedError(
            f"{key}.metadata",
            f"is {quote(tier.metadata)}, where nodes cannot find each other; write {P2P_HANDSHAKE}, "
            "http://host:port/metadata or etcd://host:port",
        )
    if tier.address is not None and not re.fullmatch(r"[^\s:/]+", tier.address):
        raise KeyedError(
            f"{key}.address",
            f"is {quote(tier.address)}, which is not a name or an IPv4 address; write it without scheme and port",
        )
    if not re.fullmatch(r"[a-z_]+", tier.protocol):
        raise KeyedError(f"{key}.protocol", f"is {quote(tier.protocol)}, which is not a protocol; write tcp or rdma")
    if not MIN_NODE_TIMEOUT_S <= tier.timeout <= MAX_NODE_TIMEOUT_S:
        raise KeyedError(f"{key}.timeout", f"is {tier.timeout}, which Mooncake cannot keep to; give it from 1s to 10s")
    if tier.replicas < 1:
        raise KeyedError(f"{key}.replicas", f"is {tier.replicas}, and a page needs one copy at least; write 1")
    for name in ("eviction_high_watermark_ratio", "eviction_ratio"):
        if not 0 < getattr(tier, name) <= 1:
            raise KeyedError(f"{key}.{name}", f"is {getattr(tier, name)}, which is not above 0 and up to 1")
