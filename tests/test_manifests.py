"""deploy/kubernetes: Kubernetes takes each manifest, and manifests, configuration, code and docs say the same.

A variant is put together here as kustomize does it, as far as these files need it; where kubectl is installed, the two
are compared.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from sgl_lmcache import config, config_file
from sgl_lmcache.mooncake_master import METRICS_PORT
from tests.test_docs import sglang_options

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "multi-node.md"
VARIANTS = ("tcp", "rdma")
RECENT = kubernetes_validate.latest_version()
OLDEST = "1.31"

GIB = 1 << 30
SGLANG_NBYTES = 16 * GIB
"""The least that a pod has to have left for SGLang itself."""

Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(path.read_text(encoding="utf-8")) if manifest]


def patched(whole: Any, patch: Any) -> Any:
    """A strategic merge: mappings key by key, lists of named things name by name, anything else replaced."""
    if isinstance(whole, dict) and isinstance(patch, dict):
        return {**whole, **{key: patched(whole.get(key), value) for key, value in patch.items()}}
    if isinstance(whole, list) and isinstance(patch, list) and all("name" in item for item in patch):
        by_name = {item["name"]: item for item in whole}
        return list({**by_name, **{item["name"]: patched(by_name.get(item["name"]), item) for item in patch}}.values())
    return patch


def assembled(folder: Path) -> list[Manifest]:
    """What a folder's kustomization leads to."""
    (kustomization,) = read(folder / "kustomization.yaml")
    found: list[Manifest] = []
    for resource in kustomization["resources"]:
        path = (folder / resource).resolve()
        found += assembled(path) if path.is_dir() else read(path)
    for patch in kustomization.get("patches", ()):
        for change in read(folder / patch["path"]):
            (at,) = (at for at, manifest in enumerate(found) if name_of(manifest) == name_of(change))
            found[at] = patched(found[at], change)
    for manifest in found:
        if "namespace" in kustomization and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = kustomization["namespace"]
            for subject in manifest.get("subjects", ()):
                subject["namespace"] = kustomization["namespace"]
        for container in containers(manifest):
            for image in kustomization.get("images", ()):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def name_of(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def containers(manifest: Manifest) -> list[Manifest]:
    found: list[Manifest] = manifest.get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])
    return found


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> list[Manifest]:
    return assembled(MANIFESTS / request.param)


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if name_of(manifest) == (kind, name))
    return found


def container_of(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = containers(one(manifests, kind, name))
    return found


def settings(manifests: list[Manifest]) -> config.Config:
    (text,) = one(manifests, "ConfigMap", "sgl-lmcache")["data"].values()
    return config_file.parse(yaml.safe_load(text), source="ConfigMap")


def port_of(container: Manifest, name: str) -> int:
    (found,) = (port["containerPort"] for port in container["ports"] if port["name"] == name)
    return int(found)


def nbytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi|Ti)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1 << 20, "Gi": GIB, "Ti": 1 << 40}[unit]


def test_every_file_is_part_of_a_variant() -> None:
    used = set()
    for kustomization in MANIFESTS.glob("*/kustomization.yaml"):
        (given,) = read(kustomization)
        used |= {kustomization, *(kustomization.parent / path for path in given["resources"])}
        used |= {kustomization.parent / patch["path"] for patch in given.get("patches", ())}
    assert {path for path in MANIFESTS.rglob("*") if path.is_file()} <= used


@pytest.mark.parametrize("version", [OLDEST, RECENT])
def test_kubernetes_takes_every_manifest(variant: list[Manifest], version: str) -> None:
    assert len(variant) > 8
    for manifest in variant:
        kubernetes_validate.validate(manifest, version, strict=True)


def broken(manifest: Manifest, path: str, value: Any) -> Manifest:
    copied: Any = copy.deepcopy(manifest)
    *folders, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    at = copied
    for part in folders:
        at = at[part]
    at[last] = value
    return dict(copied)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("StatefulSet", "sglang-server", "spec.replica", 2),
        ("StatefulSet", "sglang-server", "spec.replicas", "two"),
        ("StatefulSet", "sglang-server", "spec.template.spec.hostNetworks", True),
        ("StatefulSet", "sglang-server", "spec.template.spec.containers.0.ports.0.containerPort", "http"),
        ("StatefulSet", "sglang-server", "spec.template.spec.containers.0.securityContext.capability", {}),
        ("Deployment", "mooncake-master", "spec.template.spec.containers.0.readinessProbe.httpGet.ports", 9003),
        ("ConfigMap", "sgl-lmcache", "data", ["a"]),
        ("Service", "sglang", "spec.ports.0.port", None),
        ("Role", "sglang-router", "rules.0.verb", ["get"]),
    ],
)
def test_a_broken_manifest_is_refused(variant: list[Manifest], kind: str, name: str, path: str, value: Any) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken(one(variant, kind, name), path, value), RECENT, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", VARIANTS)
def test_kustomize_puts_them_together_in_the_same_way(folder: str) -> None:
    command = ["kubectl", "kustomize", str(MANIFESTS / folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs = {name_of(manifest): manifest for manifest in yaml.safe_load_all(built)}
    assert theirs == {name_of(manifest): manifest for manifest in assembled(MANIFESTS / folder)}


def test_the_configuration_is_one_and_names_the_master(variant: list[Manifest]) -> None:
    tier = settings(variant).mooncake
    assert tier is not None
    address = config.split_address(tier.master, config.MASTER_PORT)
    assert address is not None
    service = one(variant, "Service", address[0])
    master = container_of(variant, "Deployment", "mooncake-master")
    assert address[1] in [port["port"] for port in service["spec"]["ports"]]
    assert port_of(master, "rpc") == address[1] == config.MASTER_PORT
    assert port_of(master, "metrics") == METRICS_PORT
    assert master["command"] == ["sgl-lmcache", "mooncake-master"]


def test_the_variants_differ_in_how_bytes_move_only() -> None:
    tcp, rdma = (settings(assembled(MANIFESTS / name)) for name in VARIANTS)
    assert tcp.mooncake is not None
    assert rdma.mooncake is not None
    assert (tcp.mooncake.protocol, rdma.mooncake.protocol) == ("tcp", "rdma")
    assert (tcp.host, tcp.mooncake.segment) == (rdma.host, rdma.mooncake.segment)
    server = one(assembled(MANIFESTS / "rdma"), "StatefulSet", "sglang-server")["spec"]["template"]["spec"]
    assert (server["hostNetwork"], server["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert server["containers"][0]["securityContext"] == {
        **{"allowPrivilegeEscalation": False, "capabilities": {"add": ["IPC_LOCK"]}},
    }


def test_the_configuration_is_read_where_it_is_mounted(variant: list[Manifest]) -> None:
    readers = [("Deployment", "mooncake-master"), ("StatefulSet", "sglang-server")]
    for kind, name in readers:
        container = container_of(variant, kind, name)
        (path,) = (Path(entry["value"]) for entry in container["env"] if entry["name"] == config.VARIABLE)
        (volume,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == str(path.parent))
        volumes = one(variant, kind, name)["spec"]["template"]["spec"]["volumes"]
        (source,) = (entry["configMap"]["name"] for entry in volumes if entry["name"] == volume)
        assert path.name in one(variant, "ConfigMap", source)["data"]


def test_a_pod_has_the_memory_that_its_tiers_take(variant: list[Manifest]) -> None:
    given = settings(variant)
    assert given.host.capacity is not None
    assert given.mooncake is not None
    server = one(variant, "StatefulSet", "sglang-server")["spec"]["template"]["spec"]
    shared = sum(nbytes(v["emptyDir"]["sizeLimit"]) for v in server["volumes"] if "emptyDir" in v)
    resources = server["containers"][0]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert (
        nbytes(resources["limits"]["memory"]) >= given.host.capacity + given.mooncake.segment + shared + SGLANG_NBYTES
    )


def test_selectors_find_pods_and_ports_have_names(variant: list[Manifest]) -> None:
    pods = [manifest["spec"]["template"] for manifest in variant if containers(manifest)]
    for manifest in variant:
        kind, name = name_of(manifest)
        if kind == "Service":
            (pod,) = (pod for pod in pods if _selects(manifest["spec"]["selector"], pod))
            named = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in manifest["spec"]["ports"]} <= named, name
        elif kind in ("Deployment", "StatefulSet"):
            assert _selects(manifest["spec"]["selector"]["matchLabels"], manifest["spec"]["template"]), name
            for container in containers(manifest):
                named = {port["name"] for port in container["ports"]}
                assert set(_probed(container)) <= named, name
        elif kind == "NetworkPolicy":
            assert any(_selects(manifest["spec"]["podSelector"]["matchLabels"], pod) for pod in pods), name
    statefulset = one(variant, "StatefulSet", "sglang-server")
    assert one(variant, "Service", statefulset["spec"]["serviceName"])["spec"]["clusterIP"] == "None"


def _selects(labels: Mapping[str, str], pod: Manifest) -> bool:
    has: dict[str, str] = pod["metadata"]["labels"]
    return labels.items() <= has.items()


def _probed(container: Manifest) -> Iterator[str]:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("httpGet", "tcpSocket"):
            if how in container.get(probe, {}):
                yield container[probe][how]["port"]


def test_a_server_is_started_with_options_that_sglang_has(variant: list[Manifest]) -> None:
    container = container_of(variant, "StatefulSet", "sglang-server")
    given = dict(argument.partition("=")[::2] for argument in container["args"])
    assert set(given) <= sglang_options()
    assert given["--radix-cache-backend"] == "sgl_lmcache"
    assert int(given["--port"]) == port_of(container, "http")


def test_the_router_is_started_as_the_page_says_and_looks_for_the_servers(variant: list[Manifest]) -> None:
    container = container_of(variant, "Deployment", "sglang-router")
    given = dict(argument.partition("=")[::2] for argument in container["args"])
    (command,) = re.findall(r"^python -m sglang_router.launch_router (.*?)\n```", page(), re.MULTILINE | re.DOTALL)
    words = command.replace("\\\n", " ").split()
    for option in ("--host", "--port", "--policy", "--balance-abs-threshold", "--balance-rel-threshold"):
        assert given[option] == words[words.index(option) + 1]
    assert int(given["--port"]) == port_of(container, "http")
    server = one(variant, "StatefulSet", "sglang-server")
    label, _, value = container["args"][container["args"].index("--selector") + 1].partition("=")
    assert server["spec"]["template"]["metadata"]["labels"][label] == value
    assert int(given["--service-discovery-port"]) == port_of(containers(server)[0], "http")


def test_the_image_is_of_this_version(variant: list[Manifest]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for manifest in variant:
        for container in containers(manifest):
            assert container["image"].endswith(f"/sgl-lmcache:{version}")


def test_there_are_no_secrets(variant: list[Manifest]) -> None:
    assert not [manifest for manifest in variant if manifest["kind"] == "Secret"]
    assert "secret" not in json.dumps(variant).lower()


def test_the_page_has_the_ports_of_the_manifests(variant: list[Manifest]) -> None:
    table = page().split("## Ports\n")[1].split("\n## ")[0]
    for manifest in variant:
        for container in containers(manifest):
            for port in container["ports"]:
                assert str(port["containerPort"]) in table, (name_of(manifest), port)
        for rule in manifest["spec"]["ingress"] if manifest["kind"] == "NetworkPolicy" else ():
            for port in rule["ports"]:
                said = f"{port['port']}-{port['endPort']}" if "endPort" in port else str(port["port"])
                assert said in table, name_of(manifest)


def test_the_page_names_what_there_is() -> None:
    section = page().split("## Kubernetes\n")[1].split("\n## ")[0]
    for path in re.findall(r"`((?:base|tcp|rdma)[\w/.-]*)`", section):
        assert (MANIFESTS / path).exists(), path
    for path in re.findall(r"-k (\S+)", section):
        assert (ROOT / path / "kustomization.yaml").is_file(), path
    manifests = assembled(MANIFESTS / "tcp")
    named = re.findall(r"\b(statefulset|service|deployment)/([\w-]+)", section)
    assert named
    for kind, name in named:
        assert (kind, name) in [(name_of(manifest)[0].lower(), name_of(manifest)[1]) for manifest in manifests]
    assert set(re.findall(r"-n ([\w-]+)", section)) == {one(manifests, "Namespace", "sgl-lmcache")["metadata"]["name"]}


def page() -> str:
    return PAGE.read_text(encoding="utf-8")
