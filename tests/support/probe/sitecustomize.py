"""Read by Python at its start: servers under test start sooner if the garbage collector looks less often.

SGLang imports some ten thousand modules in each of its processes, and by default the collector looks through what there
is of them again and again, which is a quarter of that time. `sgl_lmcache_probe.register`, which SGLang calls when its
modules are there, puts it back.
"""

import gc

gc.set_threshold(100_000, 50, 50)
