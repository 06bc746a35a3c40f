"""Switching a process, or the processes that it starts, to SGLang's CPU mode."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgl_lmcache.errors import StartError

ENGINE_ARGUMENTS: Mapping[str, str] = {"device": "cpu", "attention_backend": "torch_native"}
"""What `sglang.Engine(...)` has to be given in CPU mode; `cpu_arguments` gives the same to a server."""

STAND_IN = Path(__file__).parent / "stand_in"
"""The folder that makes our `sgl_kernel` visible when it comes first on the search path."""

_CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"
_GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_SCHEDULER_INIT = "sglang.srt.managers.scheduler.Scheduler.__init__"
_BACKEND_CLASS = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"


def has_gpu(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether a GPU driver's control file is there and the environment does not hide all devices.

    Neither loads a driver library nor starts a process: both can take seconds, or fail, on a machine without a GPU.
    """
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any((root / name.lstrip("/")).exists() for name in _GPU_DEVICE_FILES)


def cpu_environment(base: Mapping[str, str], *, n_ranks: int = 1, cpus: Sequence[int] | None = None) -> dict[str, str]:
    """`base` with what SGLang's processes need to run on the CPU. What `base` says on the tuning of threads stays.

    Several ranks share the cores out evenly, in order; `cpus` are the numbers of those that may be used, by default all
    that this process may.
    """
    environment = dict(base)
    environment[_CPU_ENGINE] = "1"
    # A GPU that is there all the same must not be seen: the stand-in has no kernels for it.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    # The CUDA build of torch brings NCCL. A library that does not load means gloo, which is what works on a CPU.
    environment["SGLANG_NCCL_SO_PATH"] = "/nonexistent/libnccl.so"
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", str(STAND_IN))]
    environment["PYTHONPATH"] = os.pathsep.join([str(STAND_IN), *paths])
    # Waiting threads sleep instead of spinning: the cores are shared with copies, I/O, tokenizers and other servers,
    # and a thread that spins at a barrier keeps from the core the very thread that it waits for.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if n_ranks > 1:
        shares = _share_out(sorted(os.sched_getaffinity(0)) if cpus is None else cpus, n_ranks)
        bind = "|".join(",".join(map(str, share)) for share in shares)
        environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", bind)
        environment.setdefault("OMP_NUM_THREADS", str(len(shares[0])))
    return environment


def _share_out(cpus: Sequence[int], n_ranks: int) -> list[Sequence[int]]:
    """One run of `cpus` for each rank, of equal length; ranks take turns on the cores when there are too few."""
    n_each = len(cpus) // n_ranks
    if n_each == 0:
        return [[cpus[rank % len(cpus)]] for rank in range(n_ranks)]
    return [cpus[rank * n_each : (rank + 1) * n_each] for rank in range(n_ranks)]


def cpu_arguments(argv: Sequence[str]) -> list[str]:
    """`argv` of `sglang.launch_server`, after what CPU mode needs and `argv` does not say."""
    added: list[str] = []
    for name, value in ENGINE_ARGUMENTS.items():
        flag = "--" + name.replace("_", "-")
        if find_option(argv, flag) is None:
            added += [flag, value]
    return [*added, *argv]


def find_option(argv: Sequence[str], *flags: str) -> str | None:
    """The value of the last `--flag value` or `--flag=value`; "" for a flag at the very end; None without any."""
    found = None
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in flags:
            found = value if equals else "".join(argv[position + 1 : position + 2])
    return found


def enable(*, n_ranks: int = 1) -> None:
    """Switch this process and its children to CPU mode, for an `sglang.Engine` inside it.

    Call it before SGLang is imported; a second call does nothing. Changes `os.environ` and `sys.path`. Raises
    `StartError` if SGLang has been imported in another mode.
    """
    if is_enabled(os.environ) and str(STAND_IN) in sys.path:
        return
    if "sglang" in sys.modules:
        raise StartError("sgl_lmcache.cpu.enable() has to be called before sglang is imported, and it already is.")
    os.environ.update(cpu_environment(os.environ, n_ranks=n_ranks))
    sys.path.insert(0, str(STAND_IN))


def is_enabled(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment is in our CPU mode: SGLang's own, with our stand-in on its search path.

    SGLang's CPU engine without the stand-in is somebody else's set-up (it needs other kernels), and left alone.
    """
    on_path = str(STAND_IN) in environment.get("PYTHONPATH", "").split(os.pathsep)
    return environment.get(_CPU_ENGINE) == "1" and on_path


def install() -> None:
    """In CPU mode, put our attention backend in the place of the torch-native one, and have schedulers enable features
    that a CPU lacks little for; otherwise do nothing.

    For SGLang's plug-in entry point, which runs in every process of it, before any backend is built.
    """
    if not is_enabled(os.environ):
        return
    # Both import torch, which a server with a GPU has no reason to do this early.
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sgl_lmcache.cpu.backend import NewRowBackend

    HookRegistry.register(_BACKEND_CLASS, NewRowBackend, HookType.REPLACE)
    HookRegistry.register(_SCHEDULER_INIT, _before_scheduler, HookType.BEFORE)


def _before_scheduler(*_arguments: object, **_options: object) -> None:
    # It imports SGLang's models, which no other process needs.
    from sgl_lmcache.cpu.features import enable_features

    enable_features()
