"""What the README and docs/ say can be done as they say it: examples are in form, names exist, quotes are real."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from sgl_lmcache import cli, config_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md")))
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"

START_ERRORS = {"StartError", "RefusedError", "ConfigError", "SlabError", "StoreError"}
START_SOURCES = (
    *(
        "sgl_lmcache/refusals.py",
        "sgl_lmcache/factory.py",
        "sgl_lmcache/pool.py",
        "sgl_lmcache/page_size.py",
        "sgl_lmcache/memory.py",
        "sgl_lmcache/tiers.py",
        "sgl_lmcache/valkey.py",
        "sgl_lmcache/mooncake.py",
        "sgl_lmcache/mooncake_master.py",
    ),
    *("hicache/ssd/directory.py", "hicache/ssd/locks.py", "hicache/ssd/opening.py", "hicache/ssd/tier.py"),
    *("sgl_lmcache/serve.py", "sgl_lmcache/record_cli.py", "sgl_lmcache/cpu/mode.py", "transfer/slab.py"),
)
"""Where a server's start can be refused. (config.py's sentences are listed in docs/configuration.md.)"""

OUR_BUGS = ("The slab is closed", "A slab needs at least 1 slot", "slot_nbytes must be")
"""What only a caller of ours can cause."""

PASSED_ON = [["sgl_lmcache: ", "."]]
"""What only passes another's sentence on."""

WARNINGS = {"logger.warning", "logger.error", "logger.exception"}
LOGS = (
    *("hicache", "transfer", "sgl_lmcache/tiers.py", "sgl_lmcache/valkey.py", "sgl_lmcache/mooncake.py"),
    "sgl_lmcache/record.py",
)
"""Whose warnings and errors have rows too: what a lower tier, or a recording, says while the server runs."""

SERVING = {"serve": {"--cache-config", "--help"}, "record": {"--cache-config", "--help", "--limit"}}
"""Commands that take SGLang's options, and their own."""

FOREIGN_OPTIONS = {"--ulimit", "--cache-config", "--limit"}
"""Docker's, and those of `SERVING`."""


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            indent, language, body = match.groups()
            if language in languages:
                body = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
                found.append(Block(page, text.count("\n", 0, match.start()) + 1, language, body))
    return found


def commands() -> list[str]:
    """Every command line in a shell block or between backticks, continuation lines joined."""
    shell = [line for block in blocks("bash") for line in block.text.replace("\\\n", " ").splitlines()]
    inline = [code for page in PAGES for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))]
    return [*shell, *inline]


@cache
def sglang_options() -> frozenset[str]:
    """SGLang's server options, from the list of fields in its source: importing SGLang takes many seconds."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "srt" / "arg_groups" / "field_order.py"
    names = re.findall(r'^\s*"(\w+)",$', source.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset("--" + name.replace("_", "-") for name in names)


def subcommands() -> dict[str, argparse.ArgumentParser]:
    return _commands_below(cli._parser())


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_valid_configuration(block: Block) -> None:
    config_file.parse(yaml.safe_load(block.text), source=str(block))


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", blocks("bash", "shell", "sh"), ids=str)
def test_shell_parses(block: Block) -> None:
    assert block.language == "bash", "one name for shell blocks, so that none escapes the checks"
    result = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_all_kinds_of_blocks_were_found() -> None:
    assert {block.language for block in blocks("yaml", "python", "bash")} == {"yaml", "python", "bash"}


def test_our_commands_and_their_options_exist() -> None:
    called = set()
    for command in commands():
        for name, rest in re.findall(r"(?<![\w/.-])sgl-lmcache +([a-z-]+)([^#|;]*)", command):
            called.add(name)
            if name.startswith("-"):
                assert name == "--version", command
                continue
            assert name in subcommands(), command
            known = sglang_options() | SERVING[name] if name in SERVING else _options(subcommands()[name])
            assert set(_long_options(rest)) <= known, command
            below = _commands_below(subcommands()[name])
            assert not below or rest.split()[0] in below, command
    assert {"serve", "doctor", "config", "ssd"} <= called


def test_options_of_sglang_exist() -> None:
    called = [command for command in commands() if "launch_server" in command]
    assert called
    for command in called:
        assert set(_long_options(command)) <= sglang_options(), command


def test_options_named_alone_exist() -> None:
    """`--page-size` and its like, outside of a command."""
    sources = (path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix in ("", ".py"))
    ours = "".join(path.read_text(encoding="utf-8") for path in sources)
    for command in commands():
        for option in _long_options(command) if command.startswith("--") else ():
            known = sglang_options() | FOREIGN_OPTIONS | _options(cli._parser())
            assert option in known or option in ours, command


def test_scripts_and_their_options_exist() -> None:
    called = set()
    for command in commands():
        match = re.match(r"(?:\./|python )((?:scripts|examples)/[\w/.]+)(.*)", command)
        if match is None:
            continue
        script = ROOT / match[1]
        assert script.is_file(), command
        called.add(match[1])
        source = "".join(path.read_text(encoding="utf-8") for path in (script, *_wrapped(script)) if path.exists())
        assert all(option in source for option in _long_options(match[2]) if option != "--help"), command
    assert {"scripts/demo", "scripts/test"} <= called


def _wrapped(script: Path) -> Iterator[Path]:
    """A shell wrapper hands its options to the Python file beside it, or to a package."""
    yield script.with_suffix(".py")
    for module in re.findall(r"python -m ([\w.]+) \"\$@\"", script.read_text(encoding="utf-8")):
        yield ROOT / "scripts" / module.replace(".", "/") / "__main__.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"(?<!!)\[[^]]*\]\(([^)\s]+)\)", _without_blocks(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in _anchors(linked), target


def test_every_page_is_linked_from_the_readme_or_another_page() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^):\s]+)\)", _without_blocks(page))
    }
    assert not [page for page in PAGES if page.name != "README.md" and not linked & {page, page.parent}]


def test_troubleshooting_quotes_sentences_that_exist() -> None:
    known = [part for path in _sources() for template in _templates(ast.parse(path.read_text())) for part in template]
    assert quotes()
    for quote in quotes():
        for fragment in _fragments(quote):
            assert any(fragment in part for part in known), quote


def test_troubleshooting_knows_every_start_error() -> None:
    raised = [(path, template) for path in START_SOURCES for template in _start_errors(ROOT / path)]
    assert len(raised) > 25
    for path, template in raised:
        if not template[0].startswith(OUR_BUGS) and template not in PASSED_ON:
            assert _is_quoted(template), f"{path}: no row of {TROUBLESHOOTING.name} quotes: {'...'.join(template)}"


def test_troubleshooting_knows_every_log_line_of_the_tiers() -> None:
    logged = [(path, line) for path in _sources() if _is_in(path, LOGS) for line in _log_lines(path)]
    assert len(logged) > 10
    for path, line in logged:
        assert _is_quoted(line.split("%s")), f"{path}: no row of {TROUBLESHOOTING.name} quotes: {line}"


def _is_quoted(template: list[str]) -> bool:
    return any(all(any(f in part for part in template) for f in _fragments(quote)) for quote in quotes())


def _is_in(path: Path, places: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(ROOT / place) for place in places)


def _log_lines(path: Path) -> Iterator[str]:
    """The formats of a source's warnings and errors."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in WARNINGS:
            (template,) = _templates(node.args[0])
            yield template[0]


def quotes() -> list[str]:
    """What stands between backticks in the first column of the tables of messages."""
    found: list[str] = []
    in_messages = False
    for line in TROUBLESHOOTING.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            in_messages = False
        elif line.startswith(("| the log says", "| it says")):
            in_messages = True
        elif in_messages and not line.startswith("|---"):
            found += re.findall(r"`([^`]+)`", line.split("|")[1])
    return found


def _fragments(quote: str) -> list[str]:
    return [fragment.strip() for fragment in quote.split("...") if fragment.strip()]


def _sources() -> Iterator[Path]:
    for room in ("sgl_lmcache", "hicache", "radix", "transfer"):
        yield from (ROOT / room).rglob("*.py")


def _templates(tree: ast.AST) -> Iterator[list[str]]:
    """Every string in a source: its constant parts, with what varies left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield [str(value.value) for value in node.values if isinstance(value, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [node.value]


def _start_errors(path: Path) -> Iterator[list[str]]:
    """The sentences of the errors that a source makes, and of the rows of a list of refusals."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        if call.func.id in START_ERRORS:
            yield from list(_templates(call.args[0]))[:1]
        elif call.func.id == "Refusal":
            yield from list(_templates(call.args[1]))[:1]


def _long_options(text: str) -> list[str]:
    return re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Those of a command, and of the commands below it."""
    options = {option for action in parser._actions for option in action.option_strings}
    return options.union(*(_options(below) for below in _commands_below(parser).values()))


def _commands_below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices[0]) if choices else {}


def _without_blocks(page: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
