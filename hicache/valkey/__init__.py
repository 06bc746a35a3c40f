"""A tier in Valkey or Redis, one server or a cluster, shared by many servers."""

from hicache.valkey.nodes import CertificateError, ClientMissingError, ConnectError, Endpoint, Nodes, Tls
from hicache.valkey.rights import RefusedError, check_rights
from hicache.valkey.tier import ValkeyTier

__all__ = [
    "CertificateError",
    "ClientMissingError",
    "ConnectError",
    "Endpoint",
    "Nodes",
    "RefusedError",
    "Tls",
    "ValkeyTier",
    "check_rights",
]
