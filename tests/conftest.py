"""Before any test imports SGLang: on a machine without a GPU it has to be in CPU mode from its first import on."""

from sgl_lmcache import cpu

if not cpu.has_gpu():
    cpu.enable()
