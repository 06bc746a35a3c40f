"""What the demo's server reads: text that is at hand on every machine, so that nothing is downloaded."""

from __future__ import annotations

import heapq
import inspect
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHAT_TURNS = (
    f"What does this function do?\n\n{inspect.getsource(textwrap.dedent)}",
    f"How does this one differ from it?\n\n{inspect.getsource(heapq.merge)}",
    f"And which of the two would you use beside this one?\n\n{inspect.getsource(shlex.join)}",
    "Write a test for the first one.",
)


QUESTIONS_A = ("What is kept, and where?", "What has to be configured?", "When is it of no use?")
QUESTIONS_B = ("What is this code for?", "Which errors can it raise?", "What would you test first?")


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    text: str
    n_tokens: int
    questions: tuple[str, str, str]


def documents(count_tokens: Callable[[str], int], n_tokens: int) -> tuple[Document, Document]:
    """Two documents of at most, and nearly, `n_tokens` tokens each: this project's own pages, and Python sources."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "adr").glob("*.md"))]
    project = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    library = "\n\n".join(inspect.getsource(module) for module in (textwrap, heapq, shlex))
    return (
        Document("A", *fit(project, count_tokens, n_tokens), QUESTIONS_A),
        Document("B", *fit(library, count_tokens, n_tokens), QUESTIONS_B),
    )


def fit(text: str, count_tokens: Callable[[str], int], n_tokens: int) -> tuple[str, int]:
    """The head of `text` that has at most `n_tokens` tokens, and how many it has."""
    while (count := count_tokens(text)) > n_tokens:
        text = text[: len(text) * n_tokens // count - 8]
    return text, count
