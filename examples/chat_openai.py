"""Two chats that take turns, over the OpenAI-compatible endpoint of a running server.

    sgl-lmcache serve --model-path MODEL --max-total-tokens 2560
    python examples/chat_openai.py

Each turn sends the chat so far, so all but the newest words have been computed before. While one chat thinks, the other
may push it out of a small HBM; its next turn then brings it back from host memory.
"""

import argparse
import heapq
import inspect
import shlex
import textwrap
import time
from collections.abc import Callable
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

CHATS: dict[str, tuple[Callable[..., object], ...]] = {
    "Ada": (heapq.merge, heapq.nsmallest, heapq.nlargest),
    "Grace": (shlex.shlex.read_token, textwrap.dedent, textwrap.TextWrapper.wrap),
}


def say(client: OpenAI, model: str, chat: list[ChatCompletionMessageParam], text: str, n_tokens: int) -> str:
    """Add a turn and its answer to `chat`. Returns a line on how long it took and where the chat's KV was found."""
    chat.append({"role": "user", "content": text})
    started_s = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=chat,
        temperature=0,
        max_tokens=n_tokens,
        stream=True,
        extra_body={"return_cached_tokens_details": True},
    )
    ttft_s, answer, found = 0.0, "", {"device": 0, "host": 0}
    for chunk in stream:
        ttft_s = ttft_s or time.perf_counter() - started_s
        answer += "".join(choice.delta.content or "" for choice in chunk.choices)
        extension: dict[str, Any] = (chunk.model_extra or {}).get("sglext") or {}
        found = extension.get("cached_tokens_details") or found
    chat.append({"role": "assistant", "content": answer})
    return f"TTFT {ttft_s:.3f} s; prompt tokens found in HBM {found['device']}, in host memory {found['host']}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--answer-tokens", type=int, default=32)
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.base_url, api_key="none")
    model = client.models.list().data[0].id
    chats: dict[str, list[ChatCompletionMessageParam]] = {name: [] for name in CHATS}
    for turn in range(3):
        for name, functions in CHATS.items():
            text = f"Explain this function.\n\n{inspect.getsource(functions[turn])}"
            line = say(client, model, chats[name], text, arguments.answer_tokens)
            print(f"{name}, turn {turn + 1}: {line}\n  {chats[name][-1].get('content')!r}")


if __name__ == "__main__":
    main()
