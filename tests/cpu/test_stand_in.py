"""The stand-in for `sgl_kernel`, in processes of its own: it must be seen there, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_lmcache.cpu import cpu_environment
from sgl_lmcache.cpu.mode import STAND_IN


def python(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def in_cpu_mode(code: str) -> str:
    result = python(code, cpu_environment(os.environ))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_name_can_be_imported_from_every_submodule() -> None:
    code = """
import sgl_kernel
import sgl_kernel.allreduce as allreduce
import sgl_kernel.a.b.c
from sgl_kernel import silu_and_mul, anything_at_all
from sgl_kernel.flash_attn import flash_attn_varlen_func
from sgl_kernel.scalar_type import ScalarType, scalar_types
print(sgl_kernel.__file__, repr(scalar_types.uint4b8), allreduce.__name__)
"""
    file, *rest = in_cpu_mode(code).split(" ", 1)
    assert Path(file).is_relative_to(STAND_IN)
    assert rest == ["<sgl_kernel.scalar_type.scalar_types.uint4b8, missing in CPU mode> sgl_kernel.allreduce\n"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from sgl_kernel import silu_and_mul as f", "sgl_kernel.silu_and_mul"),
        ("from sgl_kernel.kvcacheio import transfer_kv_direct as f", "sgl_kernel.kvcacheio.transfer_kv_direct"),
        ("from sgl_kernel.scalar_type import ScalarType; f = ScalarType.of", "sgl_kernel.scalar_type.ScalarType.of"),
    ],
)
def test_a_call_names_what_was_called(source: str, name: str) -> None:
    result = python(f"{source}\nf(1, out=2)", cpu_environment(os.environ))
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"NotImplementedError: {name} was called in SGLang's CPU mode, which has no sgl_kernel."


def test_python_s_own_questions_get_no_made_up_answer() -> None:
    code = "import sgl_kernel, sgl_kernel.x as x\nprint(hasattr(sgl_kernel, '__wrapped__'), hasattr(x, '__all__'))"
    assert in_cpu_mode(code) == "False False\n"


def test_without_the_folder_on_the_path_it_is_not_there() -> None:
    code = """
import sgl_lmcache.cpu, sys
from importlib.util import find_spec
spec = find_spec("sgl_kernel")
print(spec and spec.origin, *sys.path, sep="\\n")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    origin, *path = python(code, environment).stdout.splitlines()
    assert str(STAND_IN) not in path
    assert not Path(origin).is_relative_to(STAND_IN)
