"""SGLang plug-in that keeps KV cache alive below HBM. Importing this package imports neither torch nor SGLang."""

from importlib.metadata import version

BACKEND = "sgl_lmcache"
"""The name given to SGLang: `--radix-cache-backend sgl_lmcache`."""

SGLANG_VERSION = "0.5.23"
"""The one release of SGLang whose internal seams this version was written against."""

__version__ = version("sgl-lmcache")
