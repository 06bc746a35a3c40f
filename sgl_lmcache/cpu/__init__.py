"""Running stock SGLang on a machine without a GPU: to try, to test and to judge the cache, not to serve people.

SGLang can run on a CPU by itself, but for two things that this package supplies:

- it imports names from `sgl_kernel` whose real package needs libcuda. The folder `stand_in` holds a package of that
  name with every name and no function; it is seen only by processes whose search path was led there;
- its torch-native attention recomputes the prefix of every cache hit. `NewRowBackend` computes the new rows.

There is no switch of ours: the mode is SGLang's own `SGLANG_USE_CPU_ENGINE=1` with our stand-in on the search path, set
by `cpu_environment` or `enable` before SGLang is imported, and read by `install` in each of SGLang's processes. With a
GPU, and in a CPU engine that somebody else has set up, nothing here acts.

Importing this package imports neither torch nor SGLang.
"""

from sgl_lmcache.cpu.mode import (
    ENGINE_ARGUMENTS,
    cpu_arguments,
    cpu_environment,
    enable,
    find_option,
    has_gpu,
    install,
)

__all__ = [
    "ENGINE_ARGUMENTS",
    "cpu_arguments",
    "cpu_environment",
    "enable",
    "find_option",
    "has_gpu",
    "install",
]
