"""Reads the configuration: one YAML file, named by the environment variable `SGL_LMCACHE_CONFIG`.

What a file says is taken strictly: an unknown key is an error, never ignored, because a misspelt `capcity` would
silently run with another size. Each error is one sentence that names the file, the key as a path (`tiers[0].capacity`),
what is wrong and what would be right, because it is read by somebody whose server has just refused to start.

Reading takes four steps, and each can fail only in its own way: YAML to a tree of plain values (`read`), the tree
against the names that the structs know (`_check_names`, which guesses what was meant), the tree to frozen structs
(msgspec; `quantities` reads sizes and durations), and the structs against each other (`config_checks`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import inspect

from sgl_lmcache.config import RECORD_LIMIT_VARIABLE, RECORD_VARIABLE, VARIABLE, Config, ConfigError, Record
from sgl_lmcache.config_checks import KeyedError, check
from sgl_lmcache.quantities import decode, quote


def from_environment(env: Mapping[str, str] = os.environ) -> Config:
    """The configuration of the file that `SGL_LMCACHE_CONFIG` names, or the defaults. Raises `ConfigError`.

    Another variable may name a recording (`RECORD_VARIABLE`).
    """
    config = load(path_in(env))
    record = _record_in(env)
    return config if record is None else msgspec.structs.replace(config, record=record)


def _record_in(env: Mapping[str, str]) -> Record | None:
    path, limit = env.get(RECORD_VARIABLE), env.get(RECORD_LIMIT_VARIABLE)
    if not path:
        return None
    record: dict[str, str | int] = {"path": path}
    if limit:
        record["limit"] = int(limit) if limit.isdecimal() else limit
    return parse({"record": record}, source=RECORD_VARIABLE).record


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
        check(config)
    except KeyedError as error:
        raise ConfigError(f"{source}: {error}.") from error
    return config


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
                    raise KeyedError(_join(key, name), f"is not a known key; {_advise(name, known)}")
                _check_names(item, fields[name], _join(key, name))
    elif isinstance(expected, inspect.VarTupleType) and isinstance(value, list):
        for position, item in enumerate(value):
            _check_names(item, expected.item_type, f"{key}[{position}]")
    elif isinstance(expected, inspect.UnionType) and value is not None:
        structs = [member for member in expected.types if isinstance(member, inspect.StructType)]
        tagged = [struct for struct in structs if struct.tag_field]
        members = [_tier_of(value, tagged, key)] if tagged and isinstance(value, dict) else expected.types
        for member in members:
            _check_names(value, member, key)
    elif isinstance(expected, inspect.LiteralType) and value not in expected.values:
        known_words = tuple(str(word) for word in expected.values)
        raise KeyedError(key, f"is {quote(value)}, which is not a choice; {_advise(value, known_words)}")


def _tier_of(value: Mapping[Any, Any], tiers: Sequence[inspect.StructType], key: str) -> inspect.StructType:
    """The tier that a mapping says it is, of those there are. Raises if it says none or another."""
    by_name = {str(tier.tag): tier for tier in tiers}
    tag_field = str(tiers[0].tag_field)
    available = f"available: {', '.join(by_name)}"
    if tag_field not in value:
        raise KeyedError(key, f"does not say which tier it is; give it a {tag_field} ({available})")
    named = value[tag_field]
    if not isinstance(named, str) or named not in by_name:
        raise KeyedError(_join(key, tag_field), f"is {quote(named)}, which is not a tier; {available}")
    return by_name[named]


def _convert(tree: Any) -> Config:
    try:
        return msgspec.convert(tree, Config, dec_hook=decode)
    except msgspec.ValidationError as error:
        matched = _MSGSPEC_ERROR.fullmatch(str(error))
        assert matched is not None
        what, key = matched.groups(default="")
        missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
        if missing is not None:
            example = _EXAMPLES.get(_join(key, missing[1])) or _EXAMPLES[missing[1]]
            what = f"has no {missing[1]}, which has no default; give it one such as {example}"
        mismatch = re.fullmatch(r"Expected `(\w+).*`, got `(\w+)`", what)
        if mismatch is not None:
            wanted, got = (_SHAPES.get(word, word) for word in mismatch.groups())
            quotable = wanted == "text" and got not in ("a list", "a mapping", "nothing")
            what = f"is {got} where {wanted} is expected{'; put it in quotes' if quotable else ''}"
        raise KeyedError(key, what) from error


_MSGSPEC_ERROR = re.compile(r"(.*?)(?: - at `\$\.?([^`]*)`)?", re.DOTALL)
"""What is wrong, and the key at which it is, if that is not the whole file."""

_EXAMPLES = {
    "record.path": "/var/log/sgl-lmcache/trace.jsonl",
    "metrics.listen": "127.0.0.1:9401",
    "tokens": "/etc/sgl-lmcache/system-prompt.json",
    "path": "/var/lib/sgl-lmcache",
    "capacity": "200GiB",
    "url": "valkey://127.0.0.1:6379/0",
    "master": "10.0.0.1:50051",
}
"""Values of the keys that have no default."""

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


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _advise(name: object, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1)
    possible = f"possible: {', '.join(known)}"
    return f"did you mean {nearest[0]}? ({possible})" if nearest else possible
