"""What requests teach about reuse, page by page and in numpy, from the definition in `radix.reuse`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radix.reuse import N_BINS, TIMES_EFFECT

LEVELS = (7, 18, 6, 6)
GROUP_SIZE = 6


@dataclass(eq=False)
class Chunk:
    """Pages of one request that look alike."""

    birth: int
    levels: tuple[int, int, int, int]


@dataclass
class Page:
    """A page that was asked for."""

    chunk: Chunk
    n_times: int
    n_ages: int
    """So many bins it has been counted in since."""
    following: set[bytes]


class ReuseModel:
    """Nothing is ever forgotten here: compare it where the history has room for all."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.now = 0
        self.n_requests = 0
        self.pages: dict[bytes, Page] = {}
        self.requests: list[list[Chunk]] = []
        self.first_chunk = Chunk(0, (0, 0, 0, 0))
        self.classes: list[tuple[int, int, int, int]] = []
        self.entered = np.zeros((0, N_BINS))
        self.reused = np.zeros((0, N_BINS))
        edges = [0]
        for k in range(N_BINS):
            edges.append(max(edges[-1] + 1, round(n_pages / 32 * 2 ** (k / 3))))
        self.edges = np.array(edges)
        self.unknown = gittins_index(np.full((1, N_BINS), 0.1), self.edges)
        self.table = self.unknown[:0]
        self.chance = np.zeros(0)

    def number(self, levels: tuple[int, int, int, int]) -> int:
        if levels not in self.classes:
            self.classes.append(levels)
            self.entered = np.vstack([self.entered, np.zeros(N_BINS)])
            self.reused = np.vstack([self.reused, np.zeros(N_BINS)])
            self.table = np.vstack([self.table, self.unknown])
        return self.classes.index(levels)

    def class_of(self, chunk: Chunk) -> int:
        return self.number(chunk.levels) if self.classes else 0

    def worth(self, class_: int, age: int) -> float:
        table = self.table if len(self.table) else self.unknown
        return float(table[class_, self.age_bin(age)])

    def age_bin(self, age: int) -> int:
        return int(np.searchsorted(self.edges[:N_BINS], age, side="right")) - 1

    def ask(self, keys: list[bytes]) -> list[Chunk]:
        """A request, now. Returns the chunk of each page."""
        self.grow_older()
        n_seen = next((i for i, key in enumerate(keys) if key not in self.pages), len(keys))
        context, gap = self.context(keys, n_seen), self.gap(keys, n_seen)
        chunks: list[Chunk] = []
        for i, key in enumerate(keys):
            known = self.pages.get(key)
            if known is not None:
                age_bin = self.age_bin(self.now - known.chunk.birth)
                self.reused[self.number(known.chunk.levels), age_bin] += 1
            elif i > 0:
                self.pages[keys[i - 1]].following.add(key)
            n_times = known.n_times + 1 if known is not None else 1
            levels = (min(6, (n_times - 1).bit_length()), context, gap, 0)
            self.number(levels)
            if not chunks or chunks[-1].levels != levels:
                chunks.append(Chunk(self.now, levels))
                if not self.requests and len(chunks) == 1:
                    self.first_chunk = chunks[0]
            else:
                chunks.append(chunks[-1])
            self.pages[key] = Page(chunks[-1], n_times, 0, set() if known is None else known.following)
        self.requests.append(chunks)
        self.now += len(keys)
        self.n_requests += 1
        return chunks

    def grow_older(self) -> None:
        for page in self.pages.values():
            age = self.now - page.chunk.birth
            while page.n_ages < N_BINS and age >= max(1, self.edges[page.n_ages]):
                self.entered[self.number(page.chunk.levels), page.n_ages] += 1
                page.n_ages += 1

    def context(self, keys: list[bytes], n_seen: int) -> int:
        n_new = min(8, ((len(keys) - n_seen).bit_length() + 1) // 2)
        goes_on = n_seen > 0 and (n_seen == len(keys) or len(self.pages[keys[n_seen - 1]].following) <= 1)
        return 9 + n_new if goes_on else n_new

    def gap(self, keys: list[bytes], n_seen: int) -> int:
        if n_seen == 0:
            return 0
        age = self.now - self.pages[keys[n_seen - 1]].chunk.birth
        ends = (max(1, self.n_pages // 4), self.n_pages, 4 * self.n_pages, 16 * self.n_pages)
        return 1 + sum(age >= end for end in ends)

    def answer(self, key: bytes, level: int) -> list[Chunk]:
        """The last request that asked for this page has an answer. Returns the chunks of its pages down to it."""
        if key not in self.pages:
            return []
        last = self.pages[key].chunk
        request = next(chunks for chunks in self.requests if last in chunks)
        mine = request[: len(request) - request[::-1].index(last)]
        for chunk in dict.fromkeys(mine):
            chunk.levels = (*chunk.levels[:3], level)
        for chunk in reversed(list(dict.fromkeys(mine))):
            self.number(chunk.levels)
        return mine

    def learn(self, keep: float, request_pages: float) -> None:
        self.entered *= keep
        self.reused *= keep
        entered, reused = smooth(self.entered), smooth(self.reused)
        weight, effect_weight = 40 * request_pages, 4 * request_pages
        base = (reused.sum(0) + weight * 0.1) / (entered.sum(0) + weight)
        groups = range(0, N_BINS, GROUP_SIZE)
        expected = np.array([(entered * base)[:, g : g + GROUP_SIZE].sum(1) for g in groups]).T
        seen = np.array([reused[:, g : g + GROUP_SIZE].sum(1) for g in groups]).T
        levels = np.array(self.classes)
        product = np.ones_like(seen) * (1.0 + TIMES_EFFECT * levels[:, :1])
        for _ in range(2):
            for feature, n_levels in enumerate(LEVELS):
                for level in range(n_levels):
                    mine = levels[:, feature] == level
                    has = (expected * product)[mine].sum(0) + effect_weight
                    product[mine] *= (seen[mine].sum(0) + effect_weight) / has
        model = np.minimum(0.9, base * product.repeat(GROUP_SIZE, axis=1)[:, :N_BINS])
        hazard = np.minimum(0.95, (reused + weight * model) / (entered + weight))
        self.table = gittins_index(hazard, self.edges)
        self.chance = 1 - np.where(entered > 0, 1 - hazard, 1).prod(axis=1)


def smooth(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each bin and its neighbours; at the ends it counts twice."""
    wide = np.pad(counts, ((0, 0), (1, 1)), mode="edge")
    mean: NDArray[np.float64] = (wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]) / 3
    return mean


def gittins_index(hazard: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """The most reuses for the time held, over all ages at which to let go."""
    worth = np.zeros_like(hazard)
    for c, row in enumerate(hazard):
        for k in range(N_BINS):
            alive, hits, held = 1.0, 0.0, 0.0
            for j in range(k, N_BINS):
                width = int(edges[j + 1] - edges[j])
                hits += alive * row[j]
                held += alive * width * (1 - 0.5 * row[j])
                alive *= 1 - row[j]
                worth[c, k] = max(worth[c, k], hits / held)
    return worth
