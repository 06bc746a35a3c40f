"""A program that runs `sglang.Engine` with our cache in its own process, and prints what it saw as one line of JSON.

The guard below is needed: SGLang spawns its scheduler, and a spawned process imports this file again.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(model_path: str) -> None:
    from sgl_lmcache import cpu

    cpu.enable()
    import sglang

    engine = sglang.Engine(
        model_path=model_path,
        radix_cache_backend="sgl_lmcache",
        page_size=16,
        max_total_tokens=2048,
        log_level="info",
        **cpu.ENGINE_ARGUMENTS,
    )
    try:
        prompts = [[1000 * number + token for token in range(100, 900)] for number in range(5)]
        answers = [_generate(engine, tokens) for tokens in [*prompts, prompts[0]]]
        salted = [_generate(engine, tokens, cache_salt="a") for tokens in [prompts[0], *prompts[1:], prompts[0]]]
    finally:
        engine.shutdown()
    print(json.dumps({"answers": answers, "salted": salted}))


def _generate(engine: Any, tokens: list[int], **fields: str) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answer = engine.generate(input_ids=tokens, sampling_params=sampling, **fields)
    return {"tokens": answer["output_ids"], "details": answer["meta_info"].get("cached_tokens_details")}


if __name__ == "__main__":
    main(sys.argv[1])
