"""LMCache's environment: its own package and what it pins, over everything else of this project's environment.

LMCache pins versions that SGLang's other parts do not go together with, so it cannot be installed beside them. Its
environment is a folder with LMCache and its pins, and a `.pth` file that puts this environment's packages behind them:
SGLang, PyTorch and the CPU run mode are the very same files for all systems that are compared.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.compare.systems import CannotRunError

VERSION = "0.5.6"
BELOW = "of_the_project.pth"


def folder() -> Path:
    """Beside this environment, so that what a machine keeps of one it keeps of the other."""
    here = Path(sys.prefix)
    return here.with_name(f"{here.name}-lmcache")


def python() -> Path:
    return folder() / "bin" / "python"


def install() -> None:
    """Make it if it is not there: half a minute, 500 MB. Raises `CannotRunError` with pip's last words."""
    stamp = folder() / f"has-lmcache-{VERSION}"
    if stamp.exists():
        return
    _run([sys.executable, "-m", "venv", "--clear", str(folder())])
    packages = folder() / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (packages / BELOW).write_text(sysconfig.get_path("purelib") + "\n")
    _run([str(python()), "-m", "pip", "install", "--quiet", f"lmcache=={VERSION}"])
    stamp.touch()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotRunError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
