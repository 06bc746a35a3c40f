"""Two chats that take turns, with SGLang's engine inside this process.

    python examples/chat_engine.py [--model MODEL]

Each turn sends the chat so far. HBM has room for one chat, so each pushes the other out, and the next turn brings it
back from host memory. Without a GPU it runs in CPU mode, on a generated model.
"""

import argparse
import heapq
import inspect
import shlex
import textwrap
import time
from collections.abc import Callable

from sgl_lmcache import BACKEND, cpu
from sgl_lmcache.cpu.model import RECIPES, make_model

CHATS: dict[str, tuple[Callable[..., object], ...]] = {
    "Ada": (heapq.merge, heapq.nsmallest, heapq.nlargest),
    "Grace": (shlex.shlex.read_token, textwrap.dedent, textwrap.TextWrapper.wrap),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bench", help="a model's folder or name, or one to generate: bench, tiny")
    parser.add_argument("--max-total-tokens", type=int, default=2560, help="how many tokens HBM holds")
    parser.add_argument("--answer-tokens", type=int, default=32)
    arguments = parser.parse_args()

    on_cpu = not cpu.has_gpu()
    if on_cpu:
        cpu.enable()  # before sglang is imported
    import sglang

    recipe = RECIPES.get(arguments.model)
    engine = sglang.Engine(
        model_path=arguments.model if recipe is None else str(make_model(recipe)),
        radix_cache_backend=BACKEND,
        max_total_tokens=arguments.max_total_tokens,
        log_level="error",
        **(cpu.ENGINE_ARGUMENTS if on_cpu else {}),
    )
    sampling = {"temperature": 0, "max_new_tokens": arguments.answer_tokens}
    chats = dict.fromkeys(CHATS, "")
    try:
        for turn in range(3):
            for name, functions in CHATS.items():
                chats[name] += f"User: explain this function.\n\n{inspect.getsource(functions[turn])}\nAssistant:"
                started_s, ttft_s, answer = time.perf_counter(), 0.0, {}
                for chunk in engine.generate(chats[name], sampling, stream=True):
                    ttft_s = ttft_s or time.perf_counter() - started_s
                    answer = chunk  # each has all of the text so far
                chats[name] += answer["text"] + "\n\n"
                found = answer["meta_info"].get("cached_tokens_details") or {"device": 0, "host": 0}
                print(f"{name}, turn {turn + 1}: TTFT {ttft_s:.3f} s; {answer['text']!r}")
                print(f"  prompt tokens found in HBM {found['device']}, in host memory {found['host']}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # SGLang's processes import this file again
    main()
