"""The register of eviction policies. To add one: a class that extends `radix.policy.Policy`, and a line here."""

from collections.abc import Callable, Mapping
from typing import Final

from radix.columns import Columns
from radix.gdsf import Gdsf
from radix.gittins import Gittins
from radix.lfu import Lfu
from radix.lru import Lru
from radix.policy import Policy, Setting
from radix.s3fifo import S3Fifo

POLICIES: Final[Mapping[str, Callable[[Columns, Setting], Policy]]] = {
    "lru": Lru,
    "lfu": Lfu,
    "s3fifo": S3Fifo,
    "gdsf": Gdsf,
    "gittins": Gittins,
}
"""By the name in the configuration."""


def make_policy(name: str, columns: Columns, setting: Setting) -> Policy:
    """Raises ValueError, naming the known policies, for any other."""
    if name not in POLICIES:
        raise ValueError(f"unknown eviction policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](columns, setting)
