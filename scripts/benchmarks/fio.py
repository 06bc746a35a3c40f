"""fio, as the measure of what a disk can do: sequential direct I/O on one file, at several queue depths."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Literal

DEPTHS = (1, 2, 4, 8, 16, 32)
BLOCK_NBYTES = 1 << 20
MISSING = "fio is not installed, so there is nothing to compare with (Debian: apt-get install fio)"

Direction = Literal["read", "write"]


class Fio:
    """The whole blocks of 1 MiB of a file that is there, and has been written. Raises FileNotFoundError without fio."""

    def __init__(self, file: Path) -> None:
        found = shutil.which("fio")
        if found is None:
            raise FileNotFoundError(MISSING)
        self._fio = found
        self._file = file
        self._nbytes = file.stat().st_size // BLOCK_NBYTES * BLOCK_NBYTES

    def command(self, direction: Direction, depth: int) -> list[str]:
        return [
            self._fio,
            "--name=ssd",
            f"--filename={self._file}",
            f"--size={self._nbytes}",
            f"--rw={direction}",
            f"--bs={BLOCK_NBYTES}",
            "--direct=1",
            "--ioengine=libaio",
            f"--iodepth={depth}",
            "--overwrite=1",
            "--output-format=json",
        ]

    def described(self, direction: Direction) -> str:
        """The command, as a person would type it."""
        depths = ",".join(map(str, DEPTHS))
        words = ["fio", *self.command(direction, 1)[1:], "--filename=FILE", "--iodepth=DEPTH"]
        kept = [word for word in words if word not in (f"--filename={self._file}", "--iodepth=1")]
        return f"{shlex.join(kept)}, DEPTH in {depths}"

    def gb_per_s(self, direction: Direction, depth: int) -> float:
        """One run, by fio's own clock, which does not count its start. Blocks. Raises CalledProcessError."""
        output = subprocess.run(self.command(direction, depth), capture_output=True, text=True, check=True).stdout
        report = json.loads(output[output.index("{") :])["jobs"][0][direction]
        return float(report["bw_bytes"]) / 1e9
