"""`sgl-lmcache serve`: SGLang's server with our cache, on whatever this machine has.

It adds one flag to SGLang's command line, and CPU mode where there is no GPU. Then it becomes that process (exec): no
parent stays behind that would have to pass on signals, the terminal or the exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sgl_lmcache import BACKEND
from sgl_lmcache.config import VARIABLE
from sgl_lmcache.config_file import from_environment
from sgl_lmcache.cpu import cpu_arguments, cpu_environment, find_option, has_gpu
from sgl_lmcache.errors import StartError

USAGE = """\
usage: sgl-lmcache serve [--cache-config FILE] --model-path MODEL [any option of SGLang's server]

Starts SGLang's server with the cache of sgl-lmcache; without a GPU, in CPU mode.

  --cache-config FILE  the cache's configuration (YAML); default: the file that SGL_LMCACHE_CONFIG names, or none

All other options go to SGLang as they are; `python -m sglang.launch_server --help` lists them.
"""

_BACKEND_FLAG = "--radix-cache-backend"
_RANK_FLAGS = (
    ("--tp", "--tp-size", "--tensor-parallel-size"),
    ("--pp", "--pp-size", "--pipeline-parallel-size"),
    ("--dp", "--dp-size", "--data-parallel-size"),
)

Execute = Callable[[str, list[str], dict[str, str]], object]


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to become: its command line, program first, and its whole environment."""

    command: list[str]
    environment: dict[str, str]


def main(argv: Sequence[str], *, execute: Execute = os.execve) -> int:
    """Become SGLang's server. Returns only instead of that: 0 after the help text, 2 for what cannot be started."""
    if "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return 0
    try:
        launch = plan(argv, os.environ, gpu=has_gpu())
    except StartError as error:
        print(f"sgl-lmcache serve: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    execute(launch.command[0], launch.command, launch.environment)
    return 0


def plan(argv: Sequence[str], environment: Mapping[str, str], *, gpu: bool) -> Launch:
    """What `argv` asks to be started. `--device cpu` asks for CPU mode also where there is a GPU.

    Raises `StartError` for another cache backend, and for a configuration that is not there or cannot be used.
    """
    arguments, config = _split_config(argv)
    launched = dict(environment)
    if config is not None:
        launched[VARIABLE] = str(config)
    from_environment(launched)

    backend = find_option(arguments, _BACKEND_FLAG)
    if backend is None:
        arguments = [_BACKEND_FLAG, BACKEND, *arguments]
    elif backend != BACKEND:
        raise StartError(f"{_BACKEND_FLAG} {backend} is another cache; leave it out, or start SGLang itself with it.")

    if not gpu or find_option(arguments, "--device") == "cpu":
        launched = cpu_environment(launched, n_ranks=_n_ranks(arguments))
        arguments = cpu_arguments(arguments)
    return Launch([sys.executable, "-m", "sglang.launch_server", *arguments], launched)


def _split_config(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """`argv` without `--cache-config`, and its file's absolute path; None if it was not given."""
    others: list[str] = []
    config: Path | None = None
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--cache-config":
            config = Path(value if equals else next(words, ""))
        else:
            others.append(word)
    if config is None:
        return others, None
    if not config.is_file():
        raise StartError(f"--cache-config needs a file, and there is none at '{config}'.")
    return others, config.absolute()


def _n_ranks(arguments: Sequence[str]) -> int:
    """How many SGLang processes compute. What is not a number counts as one: SGLang itself will refuse it."""
    sizes = (find_option(arguments, *flags) for flags in _RANK_FLAGS)
    return prod(int(size) for size in sizes if size is not None and size.isdecimal() and int(size) > 0)
