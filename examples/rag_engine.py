"""Several questions about two documents, with SGLang's engine inside this process.

    python examples/rag_engine.py [--model MODEL]

The same as `rag_openai.py` without a server. HBM has room for one of the documents, so each pushes the other out, and
from its second question on it comes back from host memory. Without a GPU it runs in CPU mode, on a generated model.
"""

import argparse
import inspect
import shlex
import textwrap
import time
from typing import Any

from sgl_lmcache import BACKEND, cpu
from sgl_lmcache.cpu.model import RECIPES, make_model

DOCUMENTS = {"textwrap": inspect.getsource(textwrap), "shlex": inspect.getsource(shlex)}
QUESTIONS = ("What is this module for?", "Which errors can it raise?", "What would you test first?")


def ask(engine: Any, prompt: str, n_tokens: int) -> tuple[str, float, dict[str, int]]:
    """The answer, seconds to its first token, and the prompt tokens that were found in HBM and in host memory."""
    started_s, ttft_s, answer = time.perf_counter(), 0.0, {}
    for chunk in engine.generate(prompt, {"temperature": 0, "max_new_tokens": n_tokens}, stream=True):
        ttft_s = ttft_s or time.perf_counter() - started_s
        answer = chunk  # each has all of the text so far
    return answer["text"], ttft_s, answer["meta_info"].get("cached_tokens_details") or {"device": 0, "host": 0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bench", help="a model's folder or name, or one to generate: bench, tiny")
    parser.add_argument("--document-chars", type=int, default=8_000, help="how much of each document to send")
    parser.add_argument("--max-total-tokens", type=int, default=4096, help="how many tokens HBM holds")
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
    try:
        for question in QUESTIONS:
            for name, text in DOCUMENTS.items():
                prompt = f"{text[: arguments.document_chars]}\n\nQuestion: {question}\nAnswer:"
                answer, ttft_s, found = ask(engine, prompt, arguments.answer_tokens)
                print(f"{name}: {question}\n  {answer!r}")
                print(f"  TTFT {ttft_s:.3f} s; tokens found in HBM {found['device']}, in host memory {found['host']}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # SGLang's processes import this file again
    main()
