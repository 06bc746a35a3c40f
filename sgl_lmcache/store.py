"""What the store of a Valkey tier is like, asked as the tier would ask it: a reading for `sgl-lmcache doctor`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from sgl_lmcache.config import ValkeyTier, without_password
from sgl_lmcache.errors import StartError


@dataclass(frozen=True, slots=True)
class Store:
    """What the doctor sees of a store. refusal: why no server would start; trouble: why it would start without it."""

    url: str
    is_encrypted: bool = False
    is_local: bool = False
    refusal: str = ""
    trouble: str = ""


def read_store(tier: ValkeyTier, env: Mapping[str, str] = os.environ) -> Store:
    """Ask the store for all that the tier needs, on a key of its own. Blocks, for some timeouts at most."""
    from hicache.valkey import CertificateError, ClientMissingError, Nodes, check_rights
    from hicache.valkey.nodes import describe
    from sgl_lmcache.valkey import endpoint_of, is_loopback

    url = without_password(tier.url)
    try:
        endpoint = endpoint_of(tier, env)
        nodes = Nodes(endpoint, time.monotonic)
    except StartError as error:
        return Store(url, refusal=str(error).removeprefix("sgl_lmcache: ").rstrip("."))
    except CertificateError as error:
        return Store(url, refusal=str(error))
    except ClientMissingError as error:
        return Store(url, refusal=f"the client is not installed ({error})")
    trouble, node = "", nodes.home
    try:
        nodes.by_node([])  # which has a cluster asked for its nodes
        for node in nodes.all():
            check_rights(nodes, node, "doctor")
    except OSError as error:
        trouble = f"{node} {describe(error)}"
    finally:
        nodes.close()
    return Store(url, endpoint.tls is not None, is_loopback(endpoint.host), trouble=trouble)
