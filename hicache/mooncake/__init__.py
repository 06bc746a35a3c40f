"""A tier in a Mooncake Store: the memory of many nodes, over TCP or RDMA, shared by many servers."""

from hicache.mooncake.messages import Geometry, Pool
from hicache.mooncake.process import ProcessError, UnusableError
from hicache.mooncake.tier import MooncakeTier

__all__ = ["Geometry", "MooncakeTier", "Pool", "ProcessError", "UnusableError"]
