"""`sgl-lmcache record`: `sgl-lmcache serve`, with a recording.

Who calls it wants the trace more than the server. So what a server would only log, that the file cannot be made, is
refused here, before anything is started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgl_lmcache import serve
from sgl_lmcache.config import RECORD_LIMIT_VARIABLE, RECORD_VARIABLE
from sgl_lmcache.config_file import from_environment
from sgl_lmcache.errors import StartError

USAGE = """\
usage: sgl-lmcache record FILE [--limit SIZE] [what `sgl-lmcache serve` takes]

Starts SGLang's server as `sgl-lmcache serve` does, and writes a trace of its requests to FILE, which must not exist:
arrival times, lengths, and hashes of the prompts' blocks; no text and no tokens. `sgl-lmcache simulate` replays it.

  --limit SIZE         the recording ends before the file gets larger; right behind FILE; default: 256MiB
"""


def main(argv: Sequence[str]) -> int:
    """Become SGLang's server, as `serve.main` does. 0 after the help text, 2 for what cannot be started."""
    if argv[:1] in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    try:
        variables, arguments = _split(argv)
        from_environment(variables)
        _check_place(Path(variables[RECORD_VARIABLE]))
    except StartError as error:
        print(f"sgl-lmcache record: {error}", file=sys.stderr)
        return 2
    os.environ.update(variables)
    return serve.main(arguments)


def _split(argv: Sequence[str]) -> tuple[Mapping[str, str], list[str]]:
    """The variables that turn the recording on, and what is left for `serve`."""
    if not argv or argv[0].startswith("-"):
        raise StartError("name the file first: sgl-lmcache record FILE [--limit SIZE] ...")
    variables, arguments = {RECORD_VARIABLE: str(Path(argv[0]).absolute())}, list(argv[1:])
    flag, equals, value = arguments[0].partition("=") if arguments else ("", "", "")
    if flag == "--limit":
        if not equals and len(arguments) < 2:
            raise StartError("--limit needs a size, such as 256MiB.")
        variables[RECORD_LIMIT_VARIABLE] = value if equals else arguments[1]
        arguments = arguments[1 if equals else 2 :]
    return variables, arguments


def _check_place(path: Path) -> None:
    if path.exists():
        raise StartError(f"{path} exists, and a trace is always a new file; move it away, or name another.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StartError(f"{path.parent} is not a folder that can be written; name a file in one that is.")
