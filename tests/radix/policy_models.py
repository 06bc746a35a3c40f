"""The eviction policies in dictionaries and lists, as slowly and plainly as they can be said.

All have one tier, the host, and one group. What requests teach about reuse has its model in `reuse_model.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from radix import HOST, State
from tests.radix.model import Model
from tests.radix.reuse_model import Chunk, ReuseModel


class LruModel(Model):
    """The model of the index, told what policies are told."""

    def __init__(self, capacity: int, n_pages: int = 0, page_tokens: int = 0) -> None:
        super().__init__(capacity, (HOST,))
        self.n_asked: Counter[bytes] = Counter()
        self.passing: set[bytes] = set()

    def asked(self, keys: list[bytes]) -> None:
        self.n_asked.update(keys)
        self.passing.difference_update(keys)
        self.used(self.known_prefix(keys))

    def used(self, keys: list[bytes]) -> None:
        self._to_newest([key for key in keys if key in self.order[HOST] + self.parked[HOST]], HOST)

    def touch(self, keys: list[bytes]) -> None:
        super().touch([key for key in keys if key not in self.passing])
        for key in keys:
            self.pages[key].last_use = self.now

    def _take_out(self, keys: list[bytes], tier: int) -> None:
        super()._take_out(keys, tier)
        self.passing.difference_update(keys)

    def answered(self, keys: list[bytes], n_tokens: int) -> None:
        pass

    def back(self, keys: list[bytes], is_backed: bool) -> None:
        pass

    def pass_by(self, keys: list[bytes]) -> None:
        """They have come for one request: those that were asked for once at most go first."""
        order = self.order[HOST]
        for key in [key for key in keys if self.n_asked[key] < 2]:
            self.passing.add(key)
            if key in order:
                order.remove(key)
                order.insert(0, key)

    def clear(self) -> None:
        self.pages.clear()
        self.passing.clear()
        self.order[HOST].clear()
        self.parked[HOST].clear()


class LinesModel(LruModel):
    """Pages in numbered lines, oldest first. Of the pages at the heads of the lines the one of the least score goes.

    A page that has a line and does not stand in it is parked.
    """

    def __init__(self, capacity: int, n_pages: int = 0, page_tokens: int = 0) -> None:
        super().__init__(capacity)
        self.lines: dict[int, list[bytes]] = defaultdict(list)
        self.line_of: dict[bytes, int] = {}
        self.chances: dict[bytes, int] = {}

    # ---- what differs ----

    def admit(self, keys: list[bytes]) -> None:
        raise NotImplementedError

    def score(self, line: int, key: bytes) -> float:
        raise NotImplementedError

    def n_spared(self, line: int) -> int:
        return 0

    def threshold(self, line: int) -> int:
        return 255

    def onward(self, line: int) -> int:
        return line

    def front(self, line: int) -> int:
        """Where a parent goes that was parked from this line, and has no child any more."""
        return line

    def has_evicted(self, victims: list[bytes]) -> None:
        """They have been chosen, and are still in line."""

    # ---- what is alike ----

    def place(self, key: bytes, line: int) -> None:
        self.take_from_line(key)
        self.chances.setdefault(key, 0)
        self.line_of[key] = line
        self.lines[line].append(key)

    def take_from_line(self, key: bytes) -> None:
        if self.is_in_line(key):
            self.lines[self.line_of[key]].remove(key)

    def is_in_line(self, key: bytes) -> bool:
        return key in self.line_of and key in self.lines[self.line_of[key]]

    def is_parked(self, key: bytes | None) -> bool:
        return key is not None and key in self.line_of and not self.is_in_line(key)

    def _to_newest(self, keys: list[bytes], tier: int) -> None:
        if keys:
            self.admit(keys)

    def _take_out(self, keys: list[bytes], tier: int) -> None:
        for key in keys:
            self.take_from_line(key)
            self.line_of.pop(key, None)
            self.chances.pop(key, None)
            parent = self.pages[key].parent
            if parent is not None and self.is_parked(parent) and not self._has_children(parent, tier, []):
                self.line_of[parent] = self.front(self.line_of[parent])
                self.lines[self.line_of[parent]].insert(0, parent)

    def pass_by(self, keys: list[bytes]) -> None:
        for key in keys:
            if self.n_asked[key] < 2 and self.is_in_line(key):
                self.take_from_line(key)
                self.lines[self.line_of[key]].insert(0, key)

    def clear(self) -> None:
        self.pages.clear()
        self.lines.clear()
        self.line_of.clear()
        self.chances.clear()

    # ---- eviction ----

    def evict(self, n: int, tier: int) -> tuple[list[bytes], list[int]]:
        self.ahead = {number: list(line) for number, line in self.lines.items()}
        self.met_leased: set[bytes] = set()
        victims: list[bytes] = []
        number: int | None = None
        while len(victims) < n:
            number = self.next_line(number, victims)
            if number is None:
                break
            key = self.ahead[number].pop(0)
            if self._has_children(key, tier, victims):
                self.take_from_line(key)
            elif self.pages[key].leases:
                if key not in self.met_leased:
                    self.met_leased.add(key)
                    self.go_onward(key)
            elif self.pages[key].last_use == self.now:
                continue
            elif self.has_chance(key):
                self.go_onward(key)
            else:
                self.take_up(key, n, victims)
        self.has_evicted(victims)
        return victims, self.change("drop", victims, tier)

    def next_line(self, current: int | None, victims: list[bytes]) -> int | None:
        """Where the least is at the head. Lines that are spared come last; of equals the one where the walk is."""
        turns = []
        for number, ahead in self.ahead.items():
            if ahead:
                n_left = len([key for key in self.lines[number] if key not in victims])
                is_spared = n_left <= self.n_spared(number)
                score = 0.0 if is_spared else self.score(number, ahead[0])
                turns.append((is_spared, score, number != current, number))
        return min(turns)[-1] if turns else None

    def take_up(self, key: bytes, n: int, victims: list[bytes]) -> None:
        """A page goes, and with it parked ones above it that nothing keeps now."""
        victims.append(key)
        above = self.pages[key].parent
        while above is not None and len(victims) < n and self.is_parked(above):
            page = self.pages[above]
            if page.leases or page.last_use == self.now or self._has_children(above, HOST, victims):
                return
            if self.has_chance(above):
                self.go_onward(above)
                return
            victims.append(above)
            above = page.parent

    def has_chance(self, key: bytes) -> bool:
        return self.chances[key] > self.threshold(self.line_of[key])

    def go_onward(self, key: bytes) -> None:
        line = self.line_of[key]
        onward = self.onward(line)
        if self.has_chance(key):
            self.chances[key] = self.chances[key] - 1 if onward == line else 0
        self.place(key, onward)
        self.ahead.setdefault(onward, []).append(key)


class PriorityModel(LinesModel):
    """`lfu` and `gdsf`: the line is the priority, which is the worth of a page and the level at its last use."""

    def __init__(self, capacity: int, n_pages: int = 0, page_tokens: int = 16) -> None:
        super().__init__(capacity)
        self.page_tokens = page_tokens
        self.backed: set[bytes] = set()
        self.level = 0

    def worth(self, key: bytes, n_uses: int) -> float:
        raise NotImplementedError

    def rank(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            n_uses = self.chances.get(key, 0) + 1
            self.place(key, self.level + max(1, round(self.worth(key, n_uses))))

    def admit(self, keys: list[bytes]) -> None:
        self.rank(keys)

    def used(self, keys: list[bytes]) -> None:
        members = [key for key in keys if key in self.line_of]
        for key in members:
            self.chances[key] += 1
        self.rank(members)

    def score(self, line: int, key: bytes) -> float:
        return line

    def onward(self, line: int) -> int:
        return line + 1

    def front(self, line: int) -> int:
        return self.level

    def has_evicted(self, victims: list[bytes]) -> None:
        """The level rises to the last of them, as far as nothing is left below: they are still in line themselves."""
        if victims:
            lowest = min(number for number, line in self.lines.items() if line)
            last = self.line_of[victims[-1]]
            self.level = lowest if last < self.level else min(lowest, last)

    def back(self, keys: list[bytes], is_backed: bool) -> None:
        for key in keys:
            (self.backed.add if is_backed else self.backed.discard)(key)

    def forget(self, keys: list[bytes]) -> None:
        super().forget(keys)
        self.backed &= self.pages.keys()

    def clear(self) -> None:
        super().clear()
        self.backed.clear()
        self.level = 0


class LfuModel(PriorityModel):
    """A page is worth the requests that have asked for it since it came."""

    def worth(self, key: bytes, n_uses: int) -> float:
        return min(n_uses, 63)


class GdsfModel(PriorityModel):
    """That times its cost: 1 at the root, 2 at a depth of 16,384 tokens, at most 4, and a quarter of it with a copy."""

    def worth(self, key: bytes, n_uses: int) -> float:
        depth = self.page_tokens * (len(self.path(key)) - 1)
        cost = (1 + min(depth / 16384, 3)) * (0.25 if key in self.backed else 1)
        return 254 / 60 * min(n_uses, 15) * cost


class S3FifoModel(LinesModel):
    """Line 0 is the small queue, line 1 the main one. `passed` remembers what left by the small one."""

    def __init__(self, capacity: int, n_pages: int = 0, page_tokens: int = 0) -> None:
        super().__init__(capacity)
        self.passed: dict[bytes, int] = {}
        self.n_passed = 0

    def admit(self, keys: list[bytes]) -> None:
        n_back = (1 - 0.1) * self.n_held()
        returned = [key for key in keys if key in self.passed and self.n_passed - self.passed[key] < n_back]
        for key in reversed(keys):
            self.place(key, int(key in returned))

    def used(self, keys: list[bytes]) -> None:
        for key in keys:
            if key in self.line_of:
                self.chances[key] = min(3, self.chances[key] + 1)

    def score(self, line: int, key: bytes) -> float:
        return line

    def n_spared(self, line: int) -> int:
        return self.small_size if line == 0 else 0

    def threshold(self, line: int) -> int:
        return 1 - line

    def onward(self, line: int) -> int:
        return 1

    def evict(self, n: int, tier: int) -> tuple[list[bytes], list[int]]:
        self.small_size = int(0.1 * self.n_held())
        return super().evict(n, tier)

    def n_held(self) -> int:
        return len([page for page in self.pages.values() if page.states[HOST] is not State.ABSENT])

    def has_evicted(self, victims: list[bytes]) -> None:
        passed = [key for key in victims if self.line_of[key] == 0]
        self.n_passed += len(passed)
        self.passed |= dict.fromkeys(passed, self.n_passed)

    def clear(self) -> None:
        super().clear()
        self.passed.clear()
        self.n_passed = 0


class GittinsModel(LinesModel):
    """A line for each class, those with a copy below apart; a page's score is what it is worth at its age."""

    def __init__(self, capacity: int, n_pages: int = 0, page_tokens: int = 0) -> None:
        super().__init__(capacity)
        self.reuse = ReuseModel(n_pages)
        self.chunk_of: dict[bytes, Chunk] = {}
        self.used_at: dict[bytes, int] = {}
        self.backed: set[bytes] = set()
        self.learned_at = 0

    def asked(self, keys: list[bytes]) -> None:
        super().asked(keys)
        chunks = self.reuse.ask(keys)
        known = self.known_prefix(keys)
        self.chunk_of |= dict(zip(known, chunks, strict=False))
        self.file([key for key in known if key in self.line_of])
        reuse = self.reuse
        request_pages = reuse.now / reuse.n_requests
        n_requests = min(100, 1 + reuse.n_requests / 4)
        n_pages = min(reuse.n_pages / 8, reuse.now / 4)
        if reuse.now - self.learned_at >= max(n_requests * request_pages, n_pages):
            half_life = max(2000 * request_pages, 16 * reuse.n_pages)
            reuse.learn(1 / (1 + 0.6931471805599453 * (reuse.now - self.learned_at) / half_life), request_pages)
            self.learned_at = reuse.now

    def answered(self, keys: list[bytes], n_tokens: int) -> None:
        chunks = self.reuse.answer(keys[-1], 1 + min(4, n_tokens.bit_length() // 3))
        self.file([key for key in keys if self.chunk_of.get(key) in chunks and key in self.line_of])

    def admit(self, keys: list[bytes]) -> None:
        for key in keys:
            parent = self.pages[key].parent
            if key in self.reuse.pages:
                self.chunk_of[key] = self.reuse.pages[key].chunk
            else:
                self.chunk_of[key] = self.chunk_of[parent] if parent is not None else self.reuse.first_chunk
        self.file(keys)

    def file(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            chunk = self.chunk_of[key]
            self.used_at[key] = chunk.birth
            self.place(key, 2 * self.reuse.class_of(chunk) + (key in self.backed))

    def pass_by(self, keys: list[bytes]) -> None:
        pass

    def back(self, keys: list[bytes], is_backed: bool) -> None:
        for key in keys:
            (self.backed.add if is_backed else self.backed.discard)(key)
        self.file([key for key in keys if key in self.line_of])

    def forget(self, keys: list[bytes]) -> None:
        super().forget(keys)
        self.backed &= self.pages.keys()

    def score(self, line: int, key: bytes) -> float:
        worth = self.reuse.worth(line // 2, self.reuse.now - self.used_at[key])
        return worth * 0.25 if line % 2 else worth

    def clear(self) -> None:
        super().clear()
        self.backed.clear()


MODELS: dict[str, type[LruModel]] = {
    "lru": LruModel,
    "lfu": LfuModel,
    "s3fifo": S3FifoModel,
    "gdsf": GdsfModel,
    "gittins": GittinsModel,
}
