"""The configuration: one YAML file, named by the environment variable `SGL_LMCACHE_CONFIG`.

docs/configuration.md describes the keys. Everything has a default, so no file is needed. What a file does say is taken
strictly: an unknown key is an error, never ignored, because a misspelt `capcity` would silently run with another size.
Each error is one sentence that names the file, the key as a path (`tiers[0].capacity`), what is wrong and what would be
right, because it is read by somebody whose server has just refused to start.

Reading takes three steps, and each can fail only in its own way: YAML to a tree of plain values (`read`), the tree
against the names that the structs know (`_check_names`, which guesses what was meant), the tree to frozen structs
(msgspec; `_decode` reads sizes and durations). The structs are the only description of the keys: a new key is a new
field, a new tier a new struct.

This module imports neither SGLang nor torch: the command line reads configurations with it and has to start at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import inspect

from sgl_lmcache.errors import StartError

VARIABLE = "SGL_LMCACHE_CONFIG"
"""The environment variable that names the file. Unset or empty: every key has its default."""

Eviction = Literal["lru"]
EVICTIONS: tuple[str, ...] = get_args(Eviction)
"""The eviction policies that may be named. A test holds them equal to the registry of `radix`, which takes too long to
import from here."""

Write = Literal["through", "selective", "back"]
WRITES: tuple[str, ...] = get_args(Write)
"""The write policies that may be named. A test holds them equal to the registry of `hicache`."""

PrefetchPolicy = Literal["auto", "wait", "best_effort"]

MAX_CONNECTIONS = 64
"""Of one rank to a Valkey tier: each is a thread."""

MIN_NODE_TIMEOUT_S, MAX_NODE_TIMEOUT_S = 1.0, 10.0
"""For a node of a Mooncake Store, which counts whole seconds, and some in a row before it gives a call up."""

P2P_HANDSHAKE = "P2PHANDSHAKE"
"""Mooncake's name for no metadata server: nodes ask each other."""

MASTER_PORT = 50051
"""Where a `mooncake_master` listens that nobody has told otherwise."""

_BINARY_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_SIZE_UNITS = {**_BINARY_UNITS, "TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
_DURATION_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MAX_DURATION_S = 10_000 * 86400.0


class ConfigError(StartError):
    """The configuration cannot be used. The message is one sentence for the person who wrote it."""


class Nbytes(int):
    """A size in bytes, at least 1. In YAML: a whole number of bytes, or a number with a unit (`1.5GiB`, `2GB`).

    `str` gives it as YAML that means exactly the same."""

    def __str__(self) -> str:
        for unit, factor in _BINARY_UNITS.items():
            if self % factor == 0:
                return f"{self // factor}{unit}"
        return f"{int(self)}B"


class NbytesOrNone(Nbytes):
    """A size in bytes that may be 0."""

    def __str__(self) -> str:
        return super().__str__() if self else "0B"


class Seconds(float):
    """A finite duration in seconds, above 0. In YAML: a number of seconds, or a number with a unit (`500ms`, `2m`).

    `str` gives it as YAML that means exactly the same."""

    def __str__(self) -> str:
        return f"{Decimal(repr(float(self))).normalize():f}s"


class HostTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="host"):
    """Host memory. `capacity` is for one server on this node and is divided over its local ranks; None: sized from free
    memory. `eviction` None: the policy of the whole configuration."""

    capacity: Nbytes | None = None
    eviction: Eviction | None = None


class SsdTier(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="ssd"):
    """A store in the folder `path`, below host memory. `capacity` bounds the whole folder, for all ranks of a server on
    this node and across restarts. `write` says when pages go there: as soon as they are in host memory, when they are
    used again, or before host memory evicts them. `eviction` None: the policy of the whole configuration."""

    path: str
    capacity: Nbytes
    write: Write = "through"
    eviction: Eviction | None = None


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


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole configuration. `tiers` are ordered fastest first: the host tier, then lower ones, of each kind one."""

    namespace: str = "default"
    tiers: tuple[HostTier | LowerTier, ...] = (HostTier(),)
    eviction: Eviction = "lru"
    prefetch: Prefetch = Prefetch()

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

    def eviction_of(self, tier: HostTier | SsdTier) -> Eviction:
        """The tier's own policy, or else the one for every tier."""
        return tier.eviction or self.eviction


def from_environment(env: Mapping[str, str] = os.environ) -> Config:
    """The configuration of the file that `SGL_LMCACHE_CONFIG` names, or the defaults. Raises `ConfigError`."""
    return load(path_in(env))


def path_in(env: Mapping[str, str]) -> Path | None:
    """The file that the environment names, if any. It need not exist."""
    name = env.get(VARIABLE)
    return Path(name) if name else None


def load(path: Path | None) -> Config:
    """The configuration in a file; None: the defaults. Raises `ConfigError`."""
    return Config() if path is None else parse(read(path), source=str(path))


def read(path: Path) -> Any:
    """The plain values in a YAML file; an empty file is an empty mapping. Raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: the file cannot be read ({error.strerror}); {VARIABLE} has to name a readable YAML file."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the file is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    try:
        tree = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that Python does not have
        raise ConfigError(f"{path}: {_describe_yaml_error(error)}.") from error
    return {} if tree is None else tree


def parse(tree: Any, *, source: str) -> Config:
    """The configuration that plain values describe. `source` begins each message. Raises `ConfigError`."""
    try:
        _check_names(tree, inspect.type_info(Config), "")
        config = _convert(tree)
        _check_tiers(config)
    except _KeyedError as error:
        raise ConfigError(f"{source}: {error}.") from error
    return config


class _KeyedError(Exception):
    """One thing wrong at one key; `parse` turns it into a `ConfigError` that names the file as well."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"{key} {what}" if key else f"the file {what}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Reads what `yaml.safe_load` reads, but refuses a key that stands twice, of which that one loses the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands here and in line {lines[key]}", key_node.start_mark
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


def _describe_yaml_error(error: yaml.YAMLError | ValueError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: "
        return f"{where}this is not valid YAML ({error.problem}); correct it there or just above"
    return f"this is not valid YAML ({' '.join(str(error).split())}); correct or quote it"


def _check_names(value: Any, expected: inspect.Type, key: str) -> None:
    """Raise for the first key or word that `expected` does not know. Values of another shape are left to `_convert`."""
    if isinstance(expected, inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field.type for field in expected.fields}
        for name, item in value.items():
            if name != expected.tag_field:
                if name not in fields:
                    known = (*fields, expected.tag_field) if expected.tag_field else tuple(fields)
                    raise _KeyedError(_join(key, name), f"is not a known key; {_advise(name, known)}")
                _check_names(item, fields[name], _join(key, name))
    elif isinstance(expected, inspect.VarTupleType) and isinstance(value, list):
        for position, item in enumerate(value):
            _check_names(item, expected.item_type, f"{key}[{position}]")
    elif isinstance(expected, inspect.UnionType) and value is not None:
        tagged = [member for member in expected.types if isinstance(member, inspect.StructType)]
        members = [_tier_of(value, tagged, key)] if tagged and isinstance(value, dict) else expected.types
        for member in members:
            _check_names(value, member, key)
    elif isinstance(expected, inspect.LiteralType) and value not in expected.values:
        known_words = tuple(str(word) for word in expected.values)
        raise _KeyedError(key, f"is {_quote(value)}, which is not a choice; {_advise(value, known_words)}")


def _tier_of(value: Mapping[Any, Any], tiers: Sequence[inspect.StructType], key: str) -> inspect.StructType:
    """The tier that a mapping says it is, of those there are. Raises if it says none or another."""
    by_name = {str(tier.tag): tier for tier in tiers}
    tag_field = str(tiers[0].tag_field)
    available = f"available: {', '.join(by_name)}"
    if tag_field not in value:
        raise _KeyedError(key, f"does not say which tier it is; give it a {tag_field} ({available})")
    named = value[tag_field]
    if not isinstance(named, str) or named not in by_name:
        raise _KeyedError(_join(key, tag_field), f"is {_quote(named)}, which is not a tier; {available}")
    return by_name[named]


def _convert(tree: Any) -> Config:
    try:
        return msgspec.convert(tree, Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        matched = _MSGSPEC_ERROR.fullmatch(str(error))
        assert matched is not None
        what, key = matched.groups(default="")
        missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
        if missing is not None:
            what = f"has no {missing[1]}, which has no default; give it one such as {_EXAMPLES[missing[1]]}"
        mismatch = re.fullmatch(r"Expected `(\w+).*`, got `(\w+)`", what)
        if mismatch is not None:
            wanted, got = (_SHAPES.get(word, word) for word in mismatch.groups())
            quotable = wanted == "text" and got not in ("a list", "a mapping", "nothing")
            what = f"is {got} where {wanted} is expected{'; put it in quotes' if quotable else ''}"
        raise _KeyedError(key, what) from error


_MSGSPEC_ERROR = re.compile(r"(.*?)(?: - at `\$\.?([^`]*)`)?", re.DOTALL)
"""What is wrong, and the key at which it is, if that is not the whole file."""

_EXAMPLES = {
    "path": "/var/lib/sgl-lmcache",
    "capacity": "200GiB",
    "url": "valkey://127.0.0.1:6379/0",
    "master": "10.0.0.1:50051",
}
"""Values of the keys that have no default."""

_INSTEAD_OF_A_SECOND: Mapping[type, str] = {
    HostTier: "add its capacity to tiers[0] and remove it",
    SsdTier: "remove it, or put both disks into one file system",
    ValkeyTier: "remove it, or make both servers nodes of a cluster",
    MooncakeTier: "remove it, or add its segment to the other's",
}
"""What would be right, for each kind of tier: there is one of each."""

_SHAPES = {
    "object": "a mapping",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}
"""msgspec's names of shapes in the words of somebody who writes YAML."""


def _check_tiers(config: Config) -> None:
    if not config.tiers:
        raise _KeyedError("tiers", "is empty; the first tier has to be the host tier, `- {type: host}`")
    if not isinstance(config.tiers[0], HostTier):
        raise _KeyedError("tiers[0]", "is not the host tier; put `- {type: host}` before it")
    for position, tier in enumerate(config.tiers):
        if type(tier) in map(type, config.tiers[:position]):
            name = tier.__struct_config__.tag
            raise _KeyedError(f"tiers[{position}]", f"is a second {name} tier; {_INSTEAD_OF_A_SECOND[type(tier)]}")
        if isinstance(tier, SsdTier) and not Path(tier.path).is_absolute():
            raise _KeyedError(
                f"tiers[{position}].path",
                f"is {_quote(tier.path)}, which is not an absolute path; write one that begins with /",
            )
        if isinstance(tier, ValkeyTier):
            _check_valkey(tier, f"tiers[{position}]")
        if isinstance(tier, MooncakeTier):
            _check_mooncake(tier, f"tiers[{position}]")
    if not config.namespace:
        raise _KeyedError("namespace", "is empty; give it a name or leave the key out")


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
        raise _KeyedError(f"{key}.url", f"has a host or a port that cannot be; {form}") from None
    if url.scheme not in ("valkey", "valkeys"):
        raise _KeyedError(f"{key}.url", f"begins with {_quote(url.scheme)}, which is not a scheme of this tier; {form}")
    if not host:
        raise _KeyedError(f"{key}.url", f"names no host; {form}")
    if port == 0:
        raise _KeyedError(f"{key}.url", f"names port 0; {form}")
    database = url.path.removeprefix("/")
    if not re.fullmatch(r"[0-9]{0,5}", database):
        raise _KeyedError(f"{key}.url", f"has a path that is not the number of a database; {form}")
    if url.query or url.fragment:
        raise _KeyedError(f"{key}.url", f"has something behind ? or #, which means nothing here; {form}")
    if tier.cluster and int(database or 0):
        raise _KeyedError(f"{key}.url", "names a database, and a cluster has only database 0; remove it")
    passwords = [name for name in ("password_file", "password_env") if getattr(tier, name) is not None]
    passwords += ["a password in url"] if url.password else []
    if len(passwords) > 1:
        raise _KeyedError(key, f"has {' and '.join(passwords)}; give the password once")
    files = [name for name in ("ca_file", "cert_file", "key_file") if getattr(tier, name) is not None]
    if files and url.scheme != "valkeys":
        raise _KeyedError(f"{key}.{files[0]}", "is for TLS, and url begins with valkey://; write valkeys:// there")
    if (tier.cert_file is None) != (tier.key_file is None):
        raise _KeyedError(key, "has one of cert_file and key_file; a certificate needs its key, so give both or none")
    if not 1 <= tier.connections <= MAX_CONNECTIONS:
        raise _KeyedError(f"{key}.connections", f"is {tier.connections}, which is not from 1 to {MAX_CONNECTIONS}")
    if tier.ttl < 1:
        raise _KeyedError(f"{key}.ttl", f"is {tier.ttl}, and a store counts whole seconds; give at least 1s")


def _check_mooncake(tier: MooncakeTier, key: str) -> None:
    if not _HA_MASTER.fullmatch(tier.master) and split_address(tier.master, MASTER_PORT) is None:
        raise _KeyedError(
            f"{key}.master",
            f"is {_quote(tier.master)}, which is not a master; write host:port, or etcd://host:port;host:port for "
            "masters of which one leads",
        )
    if tier.metadata != P2P_HANDSHAKE and not _METADATA.fullmatch(tier.metadata):
        raise _KeyedError(
            f"{key}.metadata",
            f"is {_quote(tier.metadata)}, where nodes cannot find each other; write {P2P_HANDSHAKE}, "
            "http://host:port/metadata or etcd://host:port",
        )
    if tier.address is not None and not re.fullmatch(r"[^\s:/]+", tier.address):
        raise _KeyedError(
            f"{key}.address",
            f"is {_quote(tier.address)}, which is not a name or an IPv4 address; write it without scheme and port",
        )
    if not re.fullmatch(r"[a-z_]+", tier.protocol):
        raise _KeyedError(f"{key}.protocol", f"is {_quote(tier.protocol)}, which is not a protocol; write tcp or rdma")
    if not MIN_NODE_TIMEOUT_S <= tier.timeout <= MAX_NODE_TIMEOUT_S:
        raise _KeyedError(f"{key}.timeout", f"is {tier.timeout}, which Mooncake cannot keep to; give it from 1s to 10s")
    if tier.replicas < 1:
        raise _KeyedError(f"{key}.replicas", f"is {tier.replicas}, and a page needs one copy at least; write 1")
    for name in ("eviction_high_watermark_ratio", "eviction_ratio"):
        if not 0 < getattr(tier, name) <= 1:
            raise _KeyedError(f"{key}.{name}", f"is {getattr(tier, name)}, which is not above 0 and up to 1")


_HOST_PORT = r"[^\s:/;,]+:[0-9]{1,5}"
_HA_MASTER = re.compile(rf"etcd://{_HOST_PORT}(;{_HOST_PORT})*")
_METADATA = re.compile(rf"(http://{_HOST_PORT}/\S+|etcd://{_HOST_PORT}(;{_HOST_PORT})*)")


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


def _decode(kind: type, value: Any) -> Any:
    if issubclass(kind, Nbytes):
        return kind(_decode_nbytes(value, least=0 if kind is NbytesOrNone else 1))
    assert kind is Seconds, kind
    return _decode_seconds(value)


def _decode_nbytes(value: Any, least: int) -> int:
    example = "write a whole number of bytes or a size such as 8GiB, 512MiB or 1.5GiB"
    if isinstance(value, str):
        number, unit = _split_quantity(value, _SIZE_UNITS, example)
        value = int(Decimal(number) * _SIZE_UNITS[unit])
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"is {_quote(value)}, which is not a size; {example}")
    if value < least:
        if least == 0:
            raise ValueError("is below 0; write a size such as 8GiB, or 0 for none")
        raise ValueError("is not above 0; write a size such as 8GiB (the host tier's may be left out)")
    return int(value)


def _decode_seconds(value: Any) -> Seconds:
    example = "write a number of seconds or a duration such as 500ms, 5s, 2m or 7d"
    if isinstance(value, str):
        number, unit = _split_quantity(value, _DURATION_UNITS, example)
        value = float(number) * _DURATION_UNITS[unit]
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {_quote(value)}, which is not a duration; {example}")
    if not (0 < value < _MAX_DURATION_S):
        raise ValueError(f"is {value}, which is not above 0 and below 10,000 days; {example}")
    return Seconds(value)


def _split_quantity(text: str, units: Collection[str], example: str) -> tuple[str, str]:
    """The number and its unit. Raises `ValueError` that proposes the unit that was meant, or else the example."""
    matched = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    if matched is None:
        raise ValueError(f"is {_quote(text)}, which cannot be read; {example}")
    number, unit = matched.groups()
    if unit not in units:
        near = [name for name in units if name.lower() == unit.lower()]
        near += [name for name in units if name.lower().startswith(unit.lower())]
        raise ValueError(f"is {_quote(text)}; " + (f"did you mean {number}{near[0]}? ({example})" if near else example))
    return number, unit


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _quote(value: object) -> str:
    return "empty" if value is None else f'"{value}"'


def _advise(name: object, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    possible = f"possible: {', '.join(known)}"
    return f"did you mean {nearest[0]}? ({possible})" if nearest else possible
