"""From the configuration of a Valkey tier to the store that it names.

Everything that can be known without asking the store is looked at here, and wrong input is a `StartError`: a server
that cannot use its own files has been set up wrongly. What the store says later never stops a server.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hicache.logs import get_logger
from hicache.valkey import Endpoint, Tls
from sgl_lmcache.config import ValkeyTier
from sgl_lmcache.errors import StartError

logger = get_logger(__name__)


def endpoint_of(tier: ValkeyTier, env: Mapping[str, str] = os.environ) -> Endpoint:
    """The store, with the password wherever it is kept. Raises `StartError`. `tier.url` has been checked."""
    url = urlsplit(tier.url)
    assert url.hostname is not None
    return Endpoint(
        host=url.hostname,
        port=url.port or 6379,
        db=int(url.path.strip("/") or 0),
        username=unquote(url.username) if url.username else None,
        password=_password(tier, url.password, env),
        tls=_tls(tier) if url.scheme == "valkeys" else None,
        is_cluster=tier.cluster,
        connect_timeout_s=tier.connect_timeout,
        timeout_s=tier.timeout,
    )


def _password(tier: ValkeyTier, in_url: str | None, env: Mapping[str, str]) -> str | None:
    if tier.password_file is not None:
        return _read(tier.password_file, "password_file").rstrip("\r\n")
    if tier.password_env is not None:
        password = env.get(tier.password_env)
        if password is None:
            raise StartError(
                f"sgl_lmcache: the environment variable {tier.password_env}, which password_env of the valkey tier "
                "names, is not set; set it for the server."
            )
        return password
    return unquote(in_url) if in_url else None


def _tls(tier: ValkeyTier) -> Tls:
    for key in ("ca_file", "cert_file", "key_file"):
        path = getattr(tier, key)
        if path is not None:
            _read(path, key)
    return Tls(tier.ca_file, tier.cert_file, tier.key_file)


def _read(path: str, key: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise StartError(
            f"sgl_lmcache: {path}, which {key} of the valkey tier names, cannot be read ({reason}); "
            "name a file that the server can read."
        ) from error


def warn_of_plain_text(endpoint: Endpoint) -> None:
    """One line if KV, which is as good as the prompts themselves, would cross a network unencrypted."""
    if endpoint.tls is None and not is_loopback(endpoint.host):
        logger.warning(
            "sgl_lmcache: %s is another machine and the connection is not encrypted: whoever sees the network sees the "
            "prompts' KV and the password; use valkeys://",
            endpoint,
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
