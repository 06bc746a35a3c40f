"""Several questions about two documents, over the OpenAI-compatible endpoint of a running server.

    sgl-lmcache serve --model-path MODEL --max-total-tokens 8192
    python examples/rag_openai.py

Each document comes first in its prompt and the question last, so all questions about it share a prefix. Asked in turn,
the documents push each other out of a small HBM; from then on they come back from host memory.
"""

import argparse
import inspect
import shlex
import textwrap
import time
from typing import Any

from openai import OpenAI

DOCUMENTS = {"textwrap": inspect.getsource(textwrap), "shlex": inspect.getsource(shlex)}
QUESTIONS = ("What is this module for?", "Which errors can it raise?", "What would you test first?")


def ask(client: OpenAI, model: str, document: str, question: str, n_tokens: int) -> tuple[str, float, dict[str, int]]:
    """The answer, seconds to its first token, and the prompt tokens that were found in HBM and in host memory."""
    started_s = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": document}, {"role": "user", "content": question}],
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
    return answer, ttft_s, found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--document-chars", type=int, default=12_000, help="how much of each document to send")
    parser.add_argument("--answer-tokens", type=int, default=32)
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.base_url, api_key="none")
    model = client.models.list().data[0].id
    for question in QUESTIONS:
        for name, text in DOCUMENTS.items():
            document = text[: arguments.document_chars]
            answer, ttft_s, found = ask(client, model, document, question, arguments.answer_tokens)
            print(f"{name}: {question}\n  {answer!r}")
            print(f"  TTFT {ttft_s:.3f} s; tokens found in HBM {found['device']}, in host memory {found['host']}")


if __name__ == "__main__":
    main()
