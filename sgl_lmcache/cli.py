"""The command `sgl-lmcache`. Exit codes: 0 all is well, 1 something was found or failed, 2 the command line is wrong.

Each command imports what it needs when it runs, and none of them imports SGLang or torch into this process (`serve`
becomes SGLang's, `mooncake-master` Mooncake's): `--help`, `--version` and `config` answer at once. What is done to an
SSD tier is in `ssd_cli`, what is asked about a prompt in `explain_cli`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_lmcache import __version__, explain_cli, ssd_cli
from sgl_lmcache.errors import StartError
from sgl_lmcache.simulate import command as simulate

if TYPE_CHECKING:
    from sgl_lmcache.config import Config, HostTier, LowerTier, MooncakeTier, ValkeyTier


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` None: the process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        # Not argparse: what follows is SGLang's, to the letter, `--help` and `--` included.
        from sgl_lmcache.serve import main as serve

        return serve(arguments[1:])
    if arguments[:1] == ["record"]:
        from sgl_lmcache.record_cli import main as record

        return record(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sgl-lmcache", description="Keeps SGLang's KV cache alive below HBM.")
    parser.add_argument("--version", action="version", version=f"sgl-lmcache {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    # Listed for --help only; `main` has taken these two before.
    commands.add_parser("serve", help="start SGLang's server with the cache; arguments go to SGLang as they are")
    commands.add_parser("record", help="the same, and write a trace of its requests to a file: no text, no tokens")

    doctor = commands.add_parser("doctor", help="check this machine, and say what to do where something is wrong")
    doctor.add_argument("--port", type=_port, default=None, help="the port that the server will use (default 30000)")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)

    status = commands.add_parser("status", help="what a running server's cache holds and finds, from its metrics")
    status.add_argument("--url", type=_url, default="http://127.0.0.1:30000", help="the server (default: %(default)s)")
    how = status.add_mutually_exclusive_group()
    how.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="look again and again (default: every 5)",
    )
    how.add_argument("--json", action="store_true", help="print one look as JSON")
    status.set_defaults(run=_status)

    explain_cli.add_command(commands, _url)

    config = commands.add_parser("config", help="print the effective configuration, and where each value comes from")
    config.add_argument("--check", type=Path, metavar="FILE", help="only check this file instead of the one in use")
    config.set_defaults(run=_config)

    master = commands.add_parser("mooncake-master", help="start the master of the Mooncake tier that is configured")
    master.add_argument("--config", type=Path, metavar="FILE", help="the configuration (default: the one in use)")
    master.add_argument(
        "--address",
        metavar="HOST[:PORT]",
        help="listen there, and not on every address of this machine; needed where masters take turns (etcd)",
    )
    master.add_argument("--metrics-port", type=_port, default=None, help="for metrics over HTTP (default 9003)")
    master.add_argument("--print", action="store_true", help="print the command, and do not run it")
    master.set_defaults(run=_mooncake_master)

    ssd_cli.add_commands(commands)
    simulate.add_command(commands)
    return parser


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 65535")
    return int(text)


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text} is not an address such as http://127.0.0.1:30000")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 1 to 3600")
    return seconds


def _status(options: argparse.Namespace) -> int:
    from sgl_lmcache.status import command

    return command(options.url, watch_s=options.watch, as_json=options.json)


def _doctor(options: argparse.Namespace) -> int:
    from sgl_lmcache.doctor import DEFAULT_PORT, Level, examine, print_findings

    findings = examine(os.environ, port=options.port or DEFAULT_PORT)
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print_findings(findings)
    return int(any(finding.level is Level.FAIL for finding in findings))


def _mooncake_master(options: argparse.Namespace) -> int:
    from sgl_lmcache.mooncake_master import METRICS_PORT, run

    port = options.metrics_port or METRICS_PORT
    return run(options.config, address=options.address, metrics_port=port, print_only=options.print)


def _config(options: argparse.Namespace) -> int:
    from sgl_lmcache.config_file import load, path_in

    if options.check is not None:
        load(options.check)
        print(f"{options.check}: valid")
        return 0
    print("\n".join(_effective(path_in(os.environ))))
    return 0


def _effective(path: Path | None) -> Iterator[str]:
    """The configuration as YAML that can be used as it stands, each value with a comment that says where it is from."""
    from sgl_lmcache.config import RECORD_VARIABLE, VARIABLE
    from sgl_lmcache.config_file import from_environment, parse, read

    tree: dict[str, Any] = {} if path is None else read(path)
    config = parse(tree, source=str(path))
    prefetch: dict[str, Any] = tree.get("prefetch", {})
    yield f"# {VARIABLE}={path}" if path else f"# {VARIABLE} is not set"
    yield _line("namespace", _quote(config.namespace), given="namespace" in tree)
    yield _line("eviction", config.eviction, given="eviction" in tree)
    yield "tiers:"
    for position, tier in enumerate(config.tiers):
        given: dict[str, Any] = tree["tiers"][position] if "tiers" in tree else {}
        yield from _effective_tier(config, tier, given)
    if config.pins:
        yield "pins:"
    for pin in config.pins:
        yield _line("  - tokens", _quote(pin.tokens), given=True)
        yield _line("    ttl", pin.ttl, given=True)
        yield _line("    salt", _quote(pin.salt), given=True)
    yield "prefetch:"
    yield _line("  policy", config.prefetch.policy, given="policy" in prefetch)
    yield _line("  timeout", config.prefetch.timeout, given="timeout" in prefetch)
    record = from_environment().record
    if record is not None:
        given = tree.get("record", {}) if record == config.record else {}
        yield "record:"
        yield _line("  path", _quote(record.path), given="path" in given, otherwise=f"from {RECORD_VARIABLE}")
        yield _line("  limit", record.limit, given="limit" in given)


def _effective_tier(config: Config, tier: HostTier | LowerTier, given: Mapping[str, Any]) -> Iterator[str]:
    from sgl_lmcache.config import MooncakeTier, SsdTier, ValkeyTier

    yield _line("  - type", tier.__struct_config__.tag, given="type" in given)
    if isinstance(tier, ValkeyTier | MooncakeTier):
        yield from _effective_shared(tier, given)
        return
    if isinstance(tier, SsdTier):
        yield _line("    path", _quote(tier.path), given=True)
    if tier.capacity is None:
        yield f"    # capacity: {_capacity_from_free_memory()}"
    else:
        yield _line("    capacity", tier.capacity, given=True)
    if isinstance(tier, SsdTier):
        yield _line("    write", tier.write, given="write" in given)
        if tier.endurance is not None:
            yield _line("    endurance", tier.endurance, given=True)
    if tier.quotas:
        quotas = ", ".join(f"{_quote(tenant)}: {quota}" for tenant, quota in tier.quotas.items())
        yield _line("    quotas", f"{{{quotas}}}", given=True)
    own = given.get("eviction") is not None
    yield _line("    eviction", config.eviction_of(tier), given=own, otherwise="as for every tier")


def _effective_shared(tier: ValkeyTier | MooncakeTier, given: Mapping[str, Any]) -> Iterator[str]:
    """All keys that have a value; a password in the URL is not shown."""
    from sgl_lmcache.config import without_password

    for key in tier.__struct_fields__:
        value = getattr(tier, key)
        if key == "url":
            value = without_password(value)
        if value is None:
            continue
        if isinstance(value, str):
            value = _quote(value)
        elif isinstance(value, bool):
            value = "true" if value else "false"
        yield _line(f"    {key}", value, given=key in given)


def _line(key: str, value: object, *, given: bool, otherwise: str = "default") -> str:
    return f"{f'{key}: {value}':<40}  # {'from the file' if given else otherwise}"


def _quote(text: str) -> str:
    """`text` as YAML on one line, whatever is in it."""
    import yaml

    quoted: str = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf"))
    return quoted.strip()


def _capacity_from_free_memory() -> str:
    from sgl_lmcache.config import Config
    from sgl_lmcache.memory import format_nbytes, host_capacity

    try:
        nbytes = host_capacity(Config(), n_local_ranks=1)
    except StartError as error:
        return f"sized from free memory at the start, but: {error}"
    return (
        f"sized from free memory at the start, now {format_nbytes(nbytes)} (less where the KV pool is in host memory)"
    )
