"""Switching to CPU mode: what is set, what is left alone, and when it is too late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_lmcache.cpu import cpu_arguments, cpu_environment, find_option, has_gpu
from sgl_lmcache.cpu.mode import STAND_IN


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_environment_leads_to_the_stand_in_and_away_from_cuda() -> None:
    base = {"HOME": "/home/a", "PYTHONPATH": f"/x{os.pathsep}/y"}
    environment = cpu_environment(base)
    assert environment == {
        "HOME": "/home/a",
        "PYTHONPATH": os.pathsep.join([str(STAND_IN), "/x", "/y"]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_NCCL_SO_PATH": "/nonexistent/libnccl.so",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    assert base["PYTHONPATH"] == f"/x{os.pathsep}/y"
    assert cpu_environment(environment) == environment
    assert cpu_environment({})["PYTHONPATH"] == str(STAND_IN)


@pytest.mark.parametrize(
    ("n_ranks", "n_cpus", "bind", "n_threads"),
    [(2, 2, "0|1", "1"), (2, 5, "0,1|2,3", "2"), (4, 2, "0|1|0|1", "1"), (3, 1, "0|0|0", "1")],
)
def test_ranks_share_the_cores_out(n_ranks: int, n_cpus: int, bind: str, n_threads: str) -> None:
    environment = cpu_environment({}, n_ranks=n_ranks, cpus=range(n_cpus))
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == bind
    assert environment["OMP_NUM_THREADS"] == n_threads


def test_what_the_user_says_of_threads_stays() -> None:
    base = {"SGLANG_CPU_OMP_THREADS_BIND": "4|5", "OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    assert cpu_environment(base, n_ranks=2).items() >= base.items()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["--device", "cpu", "--attention-backend", "torch_native"]),
        (["--tp", "2"], ["--device", "cpu", "--attention-backend", "torch_native", "--tp", "2"]),
        (["--device", "cpu"], ["--attention-backend", "torch_native", "--device", "cpu"]),
        (["--device=cpu", "--attention-backend=x"], ["--device=cpu", "--attention-backend=x"]),
    ],
)
def test_only_missing_arguments_are_added(argv: list[str], expected: list[str]) -> None:
    assert cpu_arguments(argv) == expected


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], None),
        (["--tp-size", "2"], None),
        (["--tp", "2"], "2"),
        (["--tp=2"], "2"),
        (["--tp=2", "x", "--tp", "3"], "3"),
        (["--tensor=4"], "4"),
        (["--tp="], ""),
        (["--tp"], ""),
    ],
)
def test_the_last_value_of_an_option_counts(argv: list[str], value: str | None) -> None:
    assert find_option(argv, "--tp", "--tensor") == value


@pytest.mark.parametrize("device", ["nvidiactl", "dxg", "kfd"])
def test_a_gpu_is_a_driver_s_file_that_is_not_hidden(tmp_path: Path, device: str) -> None:
    assert not has_gpu({}, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "null").touch()
    assert not has_gpu({}, tmp_path)
    (tmp_path / "dev" / device).touch()
    assert has_gpu({}, tmp_path)
    assert has_gpu({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path)
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": ""}, tmp_path)
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, sgl_lmcache.cpu, sgl_lmcache.serve; print({'torch', 'sglang', 'numpy'} & set(sys.modules))"
    assert python(code).stdout == "set()\n"


def test_enable_switches_this_process_and_its_children() -> None:
    code = """
import os, subprocess, sys
from sgl_lmcache import cpu
cpu.enable()
cpu.enable()
import sgl_kernel
child = "import os, sgl_kernel; print(sgl_kernel.__file__, os.environ['SGLANG_USE_CPU_ENGINE'])"
print(sgl_kernel.__file__, sys.path.count(cpu.mode.STAND_IN.as_posix()))
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout, end="")
"""
    file = STAND_IN / "sgl_kernel" / "__init__.py"
    result = python(code)
    assert result.stdout == f"{file} 1\n{file} 1\n", result.stderr


def test_enable_after_sglang_is_refused_in_one_sentence() -> None:
    result = python(
        "import sys, types; sys.modules['sglang'] = types.ModuleType('sglang')\n"
        "from sgl_lmcache import cpu\ncpu.enable()"
    )
    assert result.stderr.strip().splitlines()[-1] == (
        "sgl_lmcache.errors.StartError: "
        "sgl_lmcache.cpu.enable() has to be called before sglang is imported, and it already is."
    )
