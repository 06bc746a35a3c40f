"""SGLang warns while it is imported and compiles its hash extension; what our own calls warn of is an error."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash

    from tests.support import real_cache  # noqa: F401 - imports all of SGLang that these tests use

    get_native_hash([1], None, 1)
