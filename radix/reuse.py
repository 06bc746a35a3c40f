"""What requests teach about reuse: how likely a page is to be asked for again, and when, given what is known of it.

Pages of one request that look alike are one chunk: they share a birth (when they were asked for) and a class. The class
says what a prefix tree knows and a flat cache does not:

    times     how often the page was asked for before
    context   does the request go on where an earlier one ended, as the next turn of a conversation does, or does it
              branch off; and how many of its pages are new
    gap       how long ago the place was used at which it goes on or branches off
    answer    how long the answer was, once it is known

For each class the *hazard* is learned: of pages that reached an age without being asked for, how many were asked for
before the next. Ages are told apart on a log scale, in units of the tier's size, so there is nothing to tune for a
machine or a page size. All pages count, those that were evicted too, as long as they are remembered; so what the policy
does has no influence on what it learns. Old observations fade.

There are hundreds of classes and few observations of each. So a class's hazard is drawn towards a model of it: the
hazard of all pages at that age, times an effect of each feature, fitted by iterative proportional scaling.

From the hazards follows what a page is worth: the *Gittins index*, the most that can be had, over all ways to stop, of
expected reuses for the time that the page is held. Holding the pages of the highest index is optimal for pages that do
not influence each other (Gittins, Glazebrook and Weber, "Multi-armed Bandit Allocation Indices", 2011; for caches:
Beckmann and Sanchez, "Maximizing cache performance under uncertainty", 2017).

Ranks of a server have to come to the same decisions, maybe on different processors. So nothing here is computed but by
the four operations of IEEE arithmetic, in one order.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from radix.columns import BYTES_T, ROWS_T, STAMPS_T, inlined, kernel
from radix.history import HISTORY_T, History

N_BINS: Final = 31
"""Ages told apart: three an octave, from 1/32 of the tier's size to 32 times it."""

OCTAVE: Final = (1.0, 1.2599210498948732, 1.5874010519681994)
"""2 ** 0, 2 ** (1 / 3) and 2 ** (2 / 3)."""

PER_EFFECT: Final = 6
"""Bins that share an effect: two octaves."""

PRIOR: Final = 0.1
"""The hazard of a bin before anything was seen. The same in all bins of a log scale: pages go in the order of `lru`."""

CLASS_WEIGHT: Final = 40.0
"""In requests: what a class has to have seen for its own hazard to count as much as the model's."""

EFFECT_WEIGHT: Final = 4.0
"""In requests: the same for an effect, against none."""

TIMES_EFFECT: Final = 0.5
"""What is taken for granted before anything was seen: with each level of `times` a page is likelier to come back, by so
much of the hazard of a new one."""

N_SWEEPS: Final = 2
HALF_LIFE_REQUESTS: Final = 2000.0
HALF_LIFE_SIZES: Final = 16.0
"""Observations count half after so many requests, or after pages of so many times the tier's size if that is more."""

LN_2: Final = 0.6931471805599453

MAX_CLASSES: Final = 1024
N_CHUNKS: Final = 1 << 17
"""Remembered; of those before, nothing more is learned."""

N_TIMES, N_CONTEXTS, N_GAPS, N_ANSWERS = 7, 18, 6, 6
LEVELS: Final = (N_TIMES, N_CONTEXTS, N_GAPS, N_ANSWERS)
_N_EFFECTS: Final = (N_BINS + PER_EFFECT - 1) // PER_EFFECT

# Fields of `Reuse.tally`.
HEAD: Final = 0
"""The number of the next chunk."""
N_CLASSES: Final = 1

_MAX_HAZARD = 0.95


class Reuse(NamedTuple):
    """The memory. Chunk c is at place c % N_CHUNKS of its columns while c is at least HEAD - N_CHUNKS."""

    chunk: NDArray[np.int64]
    """[places of the history]: the page's chunk + 1; 0: none."""
    n_next: NDArray[np.uint8]
    """[places of the history]: pages known to have come after this one, up to 255."""
    birth: NDArray[np.int64]
    class_: NDArray[np.int32]
    living: NDArray[np.int64]
    """[N_CHUNKS]: pages of it that were not asked for again, and are remembered."""
    reached: NDArray[np.int64]
    """[N_BINS]: the first chunk that has not reached this age."""
    class_of: NDArray[np.int32]
    """[all combinations of levels]: the class + 1; 0: none yet."""
    stand_in: NDArray[np.int32]
    """[N_TIMES * N_CONTEXTS]: the first class of these levels + 1."""
    features: NDArray[np.int32]
    """[MAX_CLASSES, 4]: its levels."""
    entered: NDArray[np.float64]
    reused: NDArray[np.float64]
    """[MAX_CLASSES, N_BINS]: pages that reached this age, and those of them asked for before the next."""
    worth: NDArray[np.float64]
    """[MAX_CLASSES, N_BINS]: what a page is worth, by class and age."""
    chance: NDArray[np.float64]
    """[MAX_CLASSES]: that a page is asked for again at all, as far as ages were reached; 0 before anything is known."""
    edges: NDArray[np.int64]
    """[N_BINS + 1]: where each age begins, and where the last ends."""
    gaps: NDArray[np.int64]
    """[N_GAPS - 2]: where the second and later levels of the gap end."""
    smooth: NDArray[np.float64]
    """[2, MAX_CLASSES, N_BINS]: for `learn` only, as are those below."""
    base: NDArray[np.float64]
    """[N_BINS]"""
    grouped: NDArray[np.float64]
    """[3, MAX_CLASSES, n_effects]: reuses expected and seen, and the effects' product."""
    effects: NDArray[np.float64]
    """[2, most levels, n_effects]: expected and seen, by level of one feature."""
    tally: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return sum(int(column.nbytes) for column in self)


_FLOATS_1, _FLOATS_2 = types.Array(types.float64, 1, "C"), types.Array(types.float64, 2, "C")
_FLOATS_3 = types.Array(types.float64, 3, "C")
REUSE_T: Final = types.NamedTuple(
    (
        STAMPS_T,
        BYTES_T,
        STAMPS_T,
        ROWS_T,
        STAMPS_T,
        STAMPS_T,
        ROWS_T,
        ROWS_T,
        types.Array(types.int32, 2, "C"),
        _FLOATS_2,
        _FLOATS_2,
        _FLOATS_2,
        _FLOATS_1,
        STAMPS_T,
        STAMPS_T,
        _FLOATS_3,
        _FLOATS_1,
        _FLOATS_3,
        _FLOATS_3,
        STAMPS_T,
    ),
    Reuse,
)


def allocate(n_places: int, n_pages: int) -> Reuse:
    """Nothing has been seen. n_places: of the history. n_pages: the tier's size, the unit of ages."""
    edges = [0]
    for k in range(N_BINS):
        edges.append(max(edges[-1] + 1, round(n_pages / 32 * 2 ** (k // 3) * OCTAVE[k % 3])))
    reuse = Reuse(
        chunk=np.zeros(n_places, np.int64),
        n_next=np.zeros(n_places, np.uint8),
        birth=np.zeros(N_CHUNKS, np.int64),
        class_=np.zeros(N_CHUNKS, np.int32),
        living=np.zeros(N_CHUNKS, np.int64),
        reached=np.zeros(N_BINS, np.int64),
        class_of=np.zeros(int(np.prod(LEVELS)), np.int32),
        stand_in=np.zeros(N_TIMES * N_CONTEXTS, np.int32),
        features=np.zeros((MAX_CLASSES, len(LEVELS)), np.int32),
        entered=np.zeros((MAX_CLASSES, N_BINS)),
        reused=np.zeros((MAX_CLASSES, N_BINS)),
        worth=np.zeros((MAX_CLASSES, N_BINS)),
        chance=np.zeros(MAX_CLASSES),
        edges=np.array(edges, np.int64),
        gaps=np.array([max(1, n_pages // 4), n_pages, 4 * n_pages, 16 * n_pages], np.int64),
        smooth=np.zeros((2, MAX_CLASSES, N_BINS)),
        base=np.zeros(N_BINS),
        grouped=np.zeros((3, MAX_CLASSES, _N_EFFECTS)),
        effects=np.zeros((2, max(LEVELS), _N_EFFECTS)),
        tally=np.zeros(2, np.int64),
    )
    reuse.worth[:] = PRIOR
    _index_all(reuse)
    return reuse


@inlined
def _n_bits(number: int) -> int:
    n = 0
    while number > 0:
        number >>= 1
        n += 1
    return n


@inlined
def _is_remembered(reuse: Reuse, chunk: int) -> bool:
    return bool(chunk >= 0 and chunk >= reuse.tally[HEAD] - N_CHUNKS)


@inlined
def _bin_of(reuse: Reuse, age: int) -> int:
    low, high = 0, N_BINS - 1
    while low < high:
        middle = (low + high + 1) // 2
        if age >= reuse.edges[middle]:
            low = middle
        else:
            high = middle - 1
    return low


@inlined
def _class(reuse: Reuse, times: int, context: int, gap: int, answer: int) -> int:
    """The class of these levels. When there are `MAX_CLASSES`, one that differs in gap and answer stands in."""
    at = ((times * N_CONTEXTS + context) * N_GAPS + gap) * N_ANSWERS + answer
    if reuse.class_of[at] == 0:
        alike = times * N_CONTEXTS + context
        if reuse.tally[N_CLASSES] == MAX_CLASSES:
            return int(max(0, reuse.stand_in[alike] - 1))
        new = reuse.tally[N_CLASSES]
        reuse.tally[N_CLASSES] += 1
        features = reuse.features[new]
        features[0], features[1], features[2], features[3] = times, context, gap, answer
        reuse.class_of[at] = new + 1
        if reuse.stand_in[alike] == 0:
            reuse.stand_in[alike] = new + 1
    return int(reuse.class_of[at]) - 1


@kernel(types.void, REUSE_T, types.int64)
def grow_older(reuse: Reuse, now: int) -> None:
    """It is `now`, in pages asked for: count the pages that have reached an age."""
    head, size = reuse.tally[HEAD], len(reuse.birth)
    for k in range(len(reuse.reached)):
        chunk = max(reuse.reached[k], head - size)
        while chunk < head and now - reuse.birth[chunk % size] >= max(1, reuse.edges[k]):
            reuse.entered[reuse.class_[chunk % size], k] += reuse.living[chunk % size]
            chunk += 1
        reuse.reached[k] = chunk


@inlined
def _context(reuse: Reuse, places: NDArray[np.int64], n_seen: int) -> int:
    """Whether the request goes on, and how many of its pages are new: 0, 1 to 3, 4 to 15, and so on."""
    n_new = min(8, (_n_bits(len(places) - n_seen) + 1) // 2)
    goes_on = n_seen > 0 and (n_seen == len(places) or reuse.n_next[places[n_seen - 1]] <= 1)
    return 9 + n_new if goes_on else n_new


@inlined
def _gap(reuse: Reuse, places: NDArray[np.int64], n_seen: int, now: int) -> int:
    if n_seen == 0:
        return 0
    chunk = reuse.chunk[places[n_seen - 1]] - 1
    if not _is_remembered(reuse, chunk):
        return N_GAPS - 1
    age, gap = now - reuse.birth[chunk % len(reuse.birth)], 1
    while gap < N_GAPS - 1 and age >= reuse.gaps[gap - 1]:
        gap += 1
    return gap


@kernel(types.void, HISTORY_T, REUSE_T, STAMPS_T, BYTES_T, types.int64, STAMPS_T)
def ask(
    history: History,
    reuse: Reuse,
    places: NDArray[np.int64],
    is_known: NDArray[np.uint8],
    now: int,
    chunks: NDArray[np.int64],
) -> None:
    """A request asks for a path of pages, just noted in the history. Writes the chunk of each into `chunks`."""
    n_seen, size = 0, len(reuse.birth)
    while n_seen < len(places) and is_known[n_seen] != 0:
        n_seen += 1
    context, gap = _context(reuse, places, n_seen), _gap(reuse, places, n_seen, now)
    last_class = -1
    for i in range(len(places)):
        place = places[i]
        old = reuse.chunk[place] - 1
        if _is_remembered(reuse, old):
            at = old % size
            reuse.living[at] -= 1
            if is_known[i] != 0:
                reuse.reused[reuse.class_[at], _bin_of(reuse, now - reuse.birth[at])] += 1.0
        if is_known[i] == 0:
            reuse.n_next[place] = 0
            if i > 0 and reuse.n_next[places[i - 1]] < 255:
                reuse.n_next[places[i - 1]] += 1
        times = min(N_TIMES - 1, _n_bits(int(history.n_times[place]) - 1))
        class_ = _class(reuse, times, context, gap, 0)
        if class_ != last_class:
            last_class = class_
            at = reuse.tally[HEAD] % size
            reuse.birth[at], reuse.class_[at], reuse.living[at] = now, class_, 0
            reuse.tally[HEAD] += 1
        chunk = reuse.tally[HEAD] - 1
        reuse.living[chunk % size] += 1
        reuse.chunk[place] = chunk + 1
        chunks[i] = chunk


@kernel(types.int64, REUSE_T, types.int64, types.int64)
def answered(reuse: Reuse, place: int, answer: int) -> int:
    """The request whose last page is at `place` has an answer of this level: its chunks are of other classes now.

    Returns the first of its chunks; the last is that of the page. -1: it is not remembered.
    """
    last, size = reuse.chunk[place] - 1, len(reuse.birth)
    if not _is_remembered(reuse, last):
        return -1
    first, birth = last, reuse.birth[last % size]
    while _is_remembered(reuse, first) and reuse.birth[first % size] == birth:
        features = reuse.features[reuse.class_[first % size]]
        reuse.class_[first % size] = _class(reuse, features[0], features[1], features[2], answer)
        first -= 1
    return int(first + 1)


# ---- from counts to hazards to what a page is worth ----


@inlined
def _smooth_counts(reuse: Reuse) -> None:
    """Over neighbouring bins: the index looks for a maximum, and would find noise."""
    n_bins = len(reuse.base)
    for c in range(reuse.tally[N_CLASSES]):
        for k in range(n_bins):
            low, high = max(0, k - 1), min(n_bins - 1, k + 1)
            reuse.smooth[0, c, k] = (reuse.entered[c, low] + reuse.entered[c, k] + reuse.entered[c, high]) / 3.0
            reuse.smooth[1, c, k] = (reuse.reused[c, low] + reuse.reused[c, k] + reuse.reused[c, high]) / 3.0


@inlined
def _pool(reuse: Reuse, weight: float) -> None:
    """The hazard of all pages, and what each class would have seen by it, by groups of bins."""
    entered, reused, n_classes = reuse.smooth[0], reuse.smooth[1], reuse.tally[N_CLASSES]
    for k in range(len(reuse.base)):
        n_entered, n_reused = 0.0, 0.0
        for c in range(n_classes):
            n_entered += entered[c, k]
            n_reused += reused[c, k]
        reuse.base[k] = (n_reused + weight * PRIOR) / (n_entered + weight)
    for c in range(n_classes):
        for g in range(reuse.grouped.shape[2]):
            reuse.grouped[0, c, g], reuse.grouped[1, c, g] = 0.0, 0.0
            reuse.grouped[2, c, g] = 1.0 + TIMES_EFFECT * reuse.features[c, 0]
        for k in range(len(reuse.base)):
            reuse.grouped[0, c, k // PER_EFFECT] += entered[c, k] * reuse.base[k]
            reuse.grouped[1, c, k // PER_EFFECT] += reused[c, k]


@inlined
def _fit_effects(reuse: Reuse, weight: float) -> None:
    """Scale the model, one feature after the other, to what was seen of each of its levels."""
    expected, seen, product = reuse.grouped[0], reuse.grouped[1], reuse.grouped[2]
    n_classes, n_groups = reuse.tally[N_CLASSES], reuse.grouped.shape[2]
    for _ in range(N_SWEEPS):
        for f in range(reuse.features.shape[1]):
            reuse.effects[:] = weight
            for c in range(n_classes):
                level = reuse.features[c, f]
                for g in range(n_groups):
                    reuse.effects[0, level, g] += expected[c, g] * product[c, g]
                    reuse.effects[1, level, g] += seen[c, g]
            for c in range(n_classes):
                level = reuse.features[c, f]
                for g in range(n_groups):
                    product[c, g] *= reuse.effects[1, level, g] / reuse.effects[0, level, g]


@inlined
def _index_of(reuse: Reuse, c: int) -> None:
    """Turn the hazards in a row of the index into what a page is worth at each age."""
    hazard, n_bins = reuse.worth[c], len(reuse.base)
    for k in range(n_bins):
        alive, hits, held, best = 1.0, 0.0, 0.0, 0.0
        for j in range(k, n_bins):
            p = hazard[j]
            width = float(reuse.edges[j + 1] - reuse.edges[j])
            hits += alive * p
            held += alive * width * (1.0 - 0.5 * p)
            alive *= 1.0 - p
            best = max(best, hits / held)
        hazard[k] = best


@kernel(types.void, REUSE_T)
def _index_all(reuse: Reuse) -> None:
    for c in range(len(reuse.worth)):
        _index_of(reuse, c)


@kernel(types.void, REUSE_T, types.float64, types.float64)
def learn(reuse: Reuse, keep: float, request_pages: float) -> None:
    """Draw the conclusions from what was seen. keep: the share that old observations still count. Some 500 us.

    request_pages: of a mean request. Pages of a request share their fate, so it is about one observation.
    """
    weight = CLASS_WEIGHT * request_pages
    for c in range(reuse.tally[N_CLASSES]):
        for k in range(len(reuse.base)):
            reuse.entered[c, k] *= keep
            reuse.reused[c, k] *= keep
    _smooth_counts(reuse)
    _pool(reuse, weight)
    _fit_effects(reuse, EFFECT_WEIGHT * request_pages)
    for c in range(reuse.tally[N_CLASSES]):
        missed = 1.0
        for k in range(len(reuse.base)):
            model = min(0.9, reuse.base[k] * reuse.grouped[2, c, k // PER_EFFECT])
            entered, reused = reuse.smooth[0, c, k], reuse.smooth[1, c, k]
            hazard = min(_MAX_HAZARD, (reused + weight * model) / (entered + weight))
            reuse.worth[c, k] = hazard
            if entered > 0:
                missed *= 1.0 - hazard
        reuse.chance[c] = 1.0 - missed
        _index_of(reuse, c)
