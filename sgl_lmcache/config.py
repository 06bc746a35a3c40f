"""The configuration: what one YAML file may say (docs/configuration.md). `config_file` reads it.

The structs are the only description of the keys: a new key is a new field, a new tier a new struct. Everything has a
default, so no file is needed.

This module and those that read it import neither SGLang nor torch: the command line reads configurations with them and
has to start at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from sgl_lmcache.errors import StartError
from sgl_lmcache.quantities import Nbytes, NbytesOrNone, Quota, Seconds

VARIABLE = "SGL_LMCACHE_CONFIG"
"""The environment variable that names the file. Unset or empty: every key has its default."""

RECORD_VARIABLE, RECORD_LIMIT_VARIABLE = "SGL_LMCACHE_RECORD", "SGL_LMCACHE_RECORD_LIMIT"
"""These have the values of `record.path` and `record.limit`. With the first, the file's `record` does not count."""

Eviction = Literal["lru", "lfu", "s3fifo", "gdsf", "gittins"]

EVICTIONS: tuple[str, ...] = get_args(Eviction)
"""The eviction policies that may be named. A test holds them equal to the registry of `radix`, which takes too long to
import from here."""

SsdEviction = Literal["lru", "lfu", "s3fifo", "gdsf"]
"""Those for an SSD. `gittins` learns from whole requests, which only host memory sees."""

Write = Literal["through", "selective", "back"]

WRITES: tuple[str, ...] = get_args(Write)
"""The write policies that may be named. A test holds them equal to the registry of `hicache`."""

PrefetchPolicy = Literal["auto", "wait", "best_effort"]

MAX_QUOTAS = 63
"""A test holds it equal to what `radix` can tell apart."""

MAX_CONNECTIONS = 64
"""Of one rank to a Valkey tier: each is a thread."""

MIN_NODE_TIMEOUT_S, MAX_NODE_TIMEOUT_S = 1.0, 10.0
"""For a node of a Mooncake Store, which counts whole seconds, and some in a row before it gives a call up."""


P2P_HANDSHAKE = "P2PHANDSHAKE"
"""Mooncake's name for no metadata server: nodes ask each other."""

MASTER_PORT = 50051
"""Where a `mooncake_master` listens that nobody has told otherwise."""


class ConfigError(StartError):
    """The configuration cannot be used. The message is one sentence for the person who wrote it."""


class HostTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="host"):
    """Host memory. `capacity` is for one server on this node and is divided over its local ranks; None: sized from free
    memory. `eviction` None: the policy of the whole configuration. `quotas`: by cache salt, how much of it a tenant's
    pages may hold, and are left."""

    capacity: Nbytes | None = None
    eviction: Eviction | None = None
    quotas: dict[str, Quota] = {}


class SsdTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="ssd"):
    """A store in the folder `path`, below host memory. `capacity` bounds the whole folder, for all ranks of a server on
    this node and across restarts. `write` says when pages go there: as soon as they are in host memory, when they are
    used again, or before host memory evicts them. `eviction` None: the policy of the whole configuration, or `lru`
    where that is for host memory only.
    `endurance`: so much may be written in any 24 hours, by all ranks of a server on this node; None: without limit.
    `quotas`: as for the host tier, of `capacity`."""

    path: str
    capacity: Nbytes
    write: Write = "through"
    eviction: SsdEviction | None = None
    endurance: Nbytes | None = None
    quotas: dict[str, Quota] = {}


class ValkeyTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="valkey"):
    """A store that servers share, Valkey or Redis: `url` is `valkey[s]://[user[:password]@]host[:port][/database]`.

    `cluster`: the URL names a node of a cluster. `ttl`: how long a page is kept that no server stores or loads again.
    The password is in the URL, in a file or in an environment variable. The files of `ca_file`, `cert_file` and
    `key_file` are PEM, for `valkeys`. `connections`: of each rank, to one node at a time each.
    """

    url: str
    cluster: bool = False
    ttl: Seconds = Seconds(7 * 86400.0)
    write: Write = "through"
    password_file: str | None = None
    password_env: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    connections: int = 4
    connect_timeout: Seconds = Seconds(1.0)
    timeout: Seconds = Seconds(2.0)

    def __repr__(self) -> str:
        """Without the password."""
        return f"ValkeyTier({without_password(self.url)!r})"


class MooncakeTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="mooncake"):
    """A pool of memory that many nodes make up, Mooncake Store, for all servers that name the same `master`.

    `master`: `host[:port]`, or `etcd://host:port[;host:port...]` for masters of which one leads. `metadata`: where
    nodes find each other, `P2PHANDSHAKE` (they ask each other), `http://host:port/metadata` or `etcd://host:port`.
    `address`: of this node, as the others reach it; None: that from which the master is reached. `protocol` and
    `devices` are the transfer engine's words for how bytes move, and by which network cards. `segment`: what this
    server adds to the pool, divided over its local ranks. `replicas`: copies of a page, on as many nodes. `soft_pin`:
    so long a page is evicted after those that are not pinned. `timeout`: for another node or the master to answer.

    `lease`, `eviction_high_watermark_ratio` and `eviction_ratio` are what a master started by `sgl-lmcache
    mooncake-master` does for all its nodes: so long it evicts no page that somebody has looked up; above this share of
    the pool it evicts; so much of it at a time.
    """

    master: str
    metadata: str = P2P_HANDSHAKE
    address: str | None = None
    protocol: str = "tcp"
    devices: str = ""
    segment: NbytesOrNone = NbytesOrNone(4 << 30)
    replicas: int = 1
    soft_pin: Seconds | None = None
    write: Write = "through"
    timeout: Seconds = Seconds(2.0)
    lease: Seconds = Seconds(10.0)
    eviction_high_watermark_ratio: float = 0.9
    eviction_ratio: float = 0.05


LowerTier = SsdTier | ValkeyTier | MooncakeTier
"""A tier below host memory."""


class Prefetch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long a waiting request lets its pages be fetched. `timeout` bounds the wait; `best_effort` has none."""

    policy: PrefetchPolicy = "auto"
    timeout: Seconds = Seconds(5.0)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trace that the server writes of itself, to a new file `path`, which gets no larger than `limit`."""

    path: str
    limit: Nbytes = Nbytes(256 << 20)


TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]
"""A prompt, as SGLang's endpoints take it and as files of tokens have it."""


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt's beginning that is kept in host memory. `tokens` names a file, a JSON list of token ids; of these the
    whole pages are kept, of the tenant `salt` (empty: of requests without one), until nobody has asked for them for
    `ttl`."""

    tokens: str
    ttl: Seconds = Seconds(86400.0)
    salt: str = ""


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Our metrics at an address of their own, `listen`, host:port, with or without SGLang's."""

    listen: str


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole configuration. `tiers` are ordered fastest first: the host tier, then lower ones, of each kind one.

    `record` None: nothing is recorded. `metrics` None: they are in SGLang's own, if it has any.
    """

    namespace: str = "default"
    tiers: tuple[HostTier | LowerTier, ...] = (HostTier(),)
    eviction: Eviction = "gittins"
    pins: tuple[Pin, ...] = ()
    prefetch: Prefetch = Prefetch()
    record: Record | None = None
    metrics: Metrics | None = None

    @property
    def host(self) -> HostTier:
        (host,) = (tier for tier in self.tiers if isinstance(tier, HostTier))
        return host

    @property
    def lower(self) -> tuple[LowerTier, ...]:
        """Those below host memory, fastest first."""
        return tuple(tier for tier in self.tiers if not isinstance(tier, HostTier))

    @property
    def valkey(self) -> ValkeyTier | None:
        """None: there is none."""
        return next((tier for tier in self.tiers if isinstance(tier, ValkeyTier)), None)

    @property
    def mooncake(self) -> MooncakeTier | None:
        """None: there is none."""
        return next((tier for tier in self.tiers if isinstance(tier, MooncakeTier)), None)

    @property
    def ssd(self) -> SsdTier | None:
        """None: there is none."""
        return next((tier for tier in self.tiers if isinstance(tier, SsdTier)), None)

    def eviction_of(self, tier: HostTier | SsdTier) -> str:
        """The tier's own policy, or else the one for every tier, as far as it is for that one."""
        if tier.eviction is not None:
            return tier.eviction
        return ssd_eviction(self.eviction) if isinstance(tier, SsdTier) else self.eviction


def ssd_eviction(eviction: str) -> str:
    """What an SSD does where this is the policy for every tier."""
    return "lru" if eviction == "gittins" else eviction


def split_address(address: str, default_port: int) -> tuple[str, int] | None:
    """Host and port of `host[:port]`. None: it is not one."""
    matched = re.fullmatch(r"([^\s:/;,]+)(?::([0-9]{1,5}))?", address)
    if matched is None:
        return None
    port = int(matched[2] or default_port)
    return (matched[1], port) if 0 < port < 65536 else None


def without_password(url: str) -> str:
    """The URL of a store as it may be shown."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    if parts.password is None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}").geturl()
