"""Whether a server lets us do what the tier does: at the start, after a failure, and for `sgl-lmcache doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hicache.valkey.nodes import Node, Nodes
from hicache.valkey.wire import ProtocolError, Wire, refusal
from hicache.values import PREFIX

_READING: Final = ("EXISTS", "GETEX", "CLUSTER SLOTS")


class RefusedError(OSError):
    """A server refuses one of the commands that the tier needs: the sentence says which, and how."""

    def __init__(self, command: str, text: str) -> None:
        super().__init__(f"refuses {command}: {text}")
        self.is_of_writing = command not in _READING

    def __str__(self) -> str:
        return str(self.args[0])


def check_rights(nodes: Nodes, node: Node, namespace: str) -> None:
    """Try each command on a key of its own, which is gone a second later.

    Blocks. Raises OSError, of which `RefusedError` is a kind; a refused reading goes before a refused writing. A
    cluster's node that does not serve this key says so instead, which is as good.
    """
    name = f"{PREFIX}{namespace}:probe".encode()
    commands = (
        (b"EXISTS", name),
        (b"SET", name, b"1", b"EX", b"1"),
        (b"EXPIRE", name, b"1"),
        (b"GETEX", name, b"EX", b"1"),
        (b"UNLINK", name),
    )
    refused = node.talk(lambda wire: _refused(wire, nodes.endpoint.is_cluster, node.address[0], commands))
    for error in sorted(refused, key=lambda error: error.is_of_writing):
        raise error


def _refused(wire: Wire, is_cluster: bool, host: str, commands: Sequence[tuple[bytes, ...]]) -> list[RefusedError]:
    refused = []
    if is_cluster:
        try:
            wire.cluster_slots(host)
        except ProtocolError as error:
            raise RefusedError("CLUSTER SLOTS", str(error)) from error
    for command in commands:
        line = wire.one(command)
        why = refusal(line)
        if line.startswith(b"-") and not why.is_redirection:
            refused.append(RefusedError(command[0].decode(), why.text))
    return refused
