"""An authority for tests, and certificates that it has signed. Needs the command openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its key, as PEM."""

    certificate: str
    key: str


class Authority:
    """Signs certificates for the address 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.pair = Pair(str(folder / "ca.crt"), str(folder / "ca.key"))
        _openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={folder.name}"),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", self.pair.key, "-out", self.pair.certificate),
        )

    def sign(self, name: str, address: str = "127.0.0.1") -> Pair:
        pair, request = Pair(f"{self._folder}/{name}.crt", f"{self._folder}/{name}.key"), f"{self._folder}/{name}.csr"
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName=IP:{address}\n", encoding="utf-8")
        _openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", pair.key, "-out", request),
        )
        _openssl(
            *("x509", "-req", "-days", "2", "-in", request, "-out", pair.certificate, "-extfile", str(extensions)),
            *("-CA", self.pair.certificate, "-CAkey", self.pair.key, "-CAcreateserial"),
        )
        return pair


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
