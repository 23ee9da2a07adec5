"""Everything in deploy/ is what a cluster takes, to the last field, and its parts fit each other and the server."""

from __future__ import annotations

import copy
import functools
import ipaddress
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import InvalidSettings
from app.main import create_app
from app.settings import Settings
from app.settings_sources import load_settings
from deploy.generate import files
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    ROOT,
    RUNTIMES,
    SERVICES,
    Object,
    compose,
    examples,
    keys,
    kustomize,
    of_kind,
    problems,
    render,
)

COMPOSED = [
    *[(service, "keda") for service in ("services/flux", "services/sdxl-refiner", "services/sdxl-oci")],
    *[(service, "knative") for service in ("services/flux", "services/demo", "services/sdxl-8gb")],
    ("services/sdxl-hf", "keda", "network-policy"),
    ("storage", "fs-group"),
    ("services/sdxl", "fs-group"),
    ("services/sdxl", "knative", "fs-group"),
    ("runtime/base", "writable-root"),
    ("runtime/cluster", "writable-root"),
]

# --- Fields ----------------------------------------------------------------------------------------------------


def check(objects: list[Object]) -> None:
    assert objects
    for each in objects:
        assert problems(each) == [], f"{each['kind']} {each['metadata']['name']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_an_overlay_renders_is_valid(overlay: str) -> None:
    check(render(overlay))


@pytest.mark.parametrize("parts", COMPOSED, ids=" + ".join)
def test_components_fit_the_overlays(parts: tuple[str, ...], tmp_path: Path) -> None:
    check(compose(tmp_path, *parts))


def test_files_that_no_kustomization_includes_are_valid() -> None:
    check([read("services/sdxl-s3/secret.example.yaml")])
    template = read("runtime/openshift-ai/template.yaml")
    check([template, *template["objects"]])


@pytest.mark.parametrize("page", sorted(DEPLOY.glob("*.md")), ids=lambda page: page.name)
def test_examples_in_the_pages_are_valid(page: Path) -> None:
    found = [each for each in examples(page) if each["kind"] not in ("Kustomization", "Component")]
    if found:
        check(found)


# Maps from names that an author chooses: any key is right there.
FREE = ("labels", "annotations", "matchLabels", "limits", "requests", "data", "stringData")


@pytest.mark.parametrize(
    ("overlay", "kind"),
    [
        ("runtime/base", "ServingRuntime"),
        ("runtime/cluster", "ClusterServingRuntime"),
        ("services/sdxl-keda", "InferenceService"),
        ("services/sdxl-canary", "InferenceService"),
        ("monitoring", "PodMonitor"),
        ("monitoring", "PrometheusRule"),
        ("storage", "Job"),
    ],
)
def test_a_typo_in_any_field_name_is_found(overlay: str, kind: str) -> None:
    item = of_kind(render(overlay), kind)
    missed = []
    for path in keys(item):
        if path[0] in ("apiVersion", "kind") or any(each in FREE for each in path[:-1]):
            continue
        wrong = copy.deepcopy(item)
        parent = functools.reduce(lambda inner, key: inner[key], path[:-1], wrong)
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        if not problems(wrong):
            missed.append(path)
    assert missed == []


def test_generated_files_are_current() -> None:
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old; run: python -m deploy.generate"


# --- The server's flags ----------------------------------------------------------------------------------------


def read(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def runtime_container() -> Object:
    containers = read("runtime/base/servingruntime.yaml")["spec"]["containers"]
    assert [each["name"] for each in containers] == ["kserve-container"], "KServe looks for this name"
    container: Object = containers[0]
    return container


def settings_of(service: Object, model: Object) -> Settings:
    """What the server of a service runs with: the runtime's arguments, then the service's own."""
    arguments = [*runtime_container()["args"], *model.get("args", [])]
    arguments = [each.replace("{{.Name}}", service["metadata"]["name"]) for each in arguments]
    assert not any("{{" in each or "$(" in each for each in arguments)
    environment = {each["name"]: each.get("value", "") for each in model.get("env", [])}
    return load_settings(arguments, environment, Path("/nonexistent"))


def service_of(overlay: str) -> Object:
    return of_kind(render(overlay), "InferenceService")


def models(service: Object) -> list[tuple[Object, Object]]:
    """Predictors of a service with their models, the canaries' too."""
    predictors = [service["spec"]["predictor"], *[each["predictor"] for each in service["spec"].get("canary", [])]]
    return [(predictor, predictor["model"]) for predictor in predictors]


@pytest.mark.parametrize("overlay", SERVICES)
def test_the_server_takes_its_arguments(overlay: str) -> None:
    service = service_of(overlay)
    for _, model in models(service):
        settings = settings_of(service, model)
        assert settings.model_name == service["metadata"]["name"]
        assert settings.ignored() == [], "flags that do nothing"


def test_a_wrong_argument_would_be_found() -> None:
    service = service_of("services/sdxl-8gb")
    model = service["spec"]["predictor"]["model"]
    with pytest.raises(InvalidSettings, match="--device"):
        settings_of(service, {**model, "args": ["--device=enable_model_offload"]})


@pytest.mark.parametrize("overlay", SERVICES)
def test_the_times_fit_each_other(overlay: str) -> None:
    service = service_of(overlay)
    for predictor, model in models(service):
        settings = settings_of(service, model)
        assert settings.request_timeout < predictor["timeout"], "the gateway would give up before the server"
        assert predictor["timeout"] <= 600, "Knative's default for max-revision-timeout-seconds"
        if "terminationGracePeriodSeconds" in predictor:
            pause = int(model["lifecycle"]["preStop"]["exec"]["command"][1])
            assert predictor["terminationGracePeriodSeconds"] > pause + settings.grace_period
            assert settings.grace_period >= settings.request_timeout, "an accepted request may take its full time"
        else:
            assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative"
            assert "lifecycle" not in model


@pytest.mark.parametrize("overlay", SERVICES)
def test_the_service_asks_for_our_runtime_and_a_format_that_it_has(overlay: str) -> None:
    runtime = read("runtime/base/servingruntime.yaml")
    formats = {each["name"] for each in runtime["spec"]["supportedModelFormats"]}
    for _, model in models(service_of(overlay)):
        assert model["runtime"] == runtime["metadata"]["name"]
        assert model["modelFormat"]["name"] in formats
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]


@pytest.mark.parametrize("overlay", SERVICES)
def test_a_service_with_a_gpu_needs_no_spare_one_for_a_rollout(overlay: str) -> None:
    service = service_of(overlay)
    for predictor, model in models(service):
        gpus = model["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == model["resources"]["requests"].get("nvidia.com/gpu")
        if gpus and service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard":
            assert predictor["deploymentStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
        if settings_of(service, model).device == "cpu":
            assert gpus is None


def test_autoscaling_asks_about_the_service_that_it_scales(tmp_path: Path) -> None:
    service = of_kind(compose(tmp_path, "services/flux", "keda"), "InferenceService")
    for metric in service["spec"]["predictor"]["autoScaling"]["metrics"]:
        query = metric["external"]["metric"]["query"]
        assert set(re.findall(r'model_name="(.*?)"', query)) == {"flux"}, query


def test_autoscaling_asks_only_about_the_namespace_of_the_service(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "namespace": "pictures",
                "resources": [os.path.relpath(DEPLOY / "services/sdxl-keda", tmp_path)],
                "transformers": [os.path.relpath(DEPLOY / "components/keda/namespace", tmp_path)],
            }
        ),
        encoding="utf-8",
    )
    service = of_kind(kustomize(tmp_path), "InferenceService")
    for metric in service["spec"]["predictor"]["autoScaling"]["metrics"]:
        query = metric["external"]["metric"]["query"]
        selectors = re.findall(r"\{.*?\}", query)
        assert selectors and all('namespace=~"pictures"' in each for each in selectors), query
        assert all('model_name="sdxl"' in each for each in selectors), query
    check([service])


def test_every_storage_is_shown() -> None:
    uris = [model.get("storageUri", "") for overlay in SERVICES for _, model in models(service_of(overlay))]
    assert {uri.split("://")[0] for uri in uris if uri} == {"pvc", "s3", "hf", "oci"}


def downloaded(script: str, folder: Path) -> set[Path]:
    """The folders that the job's script fills, by a program in place of the hub's that says how it was called."""
    (folder / "hf").write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    (folder / "hf").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    calls = subprocess.run(["sh", "-euc", script], env=environment, capture_output=True, text=True, check=True).stdout
    return {Path(each) for each in re.findall(r"--local-dir (\S+)", calls)}


@pytest.mark.parametrize("overlay", SERVICES)
def test_the_claim_is_filled_with_what_the_services_read(overlay: str, tmp_path: Path) -> None:
    """Not with what a canary reads, which is a model of its owner's."""
    claim = of_kind(render("storage"), "PersistentVolumeClaim")["metadata"]["name"]
    job = of_kind(render("storage"), "Job")["spec"]["template"]["spec"]
    assert job["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    assert job["containers"][0]["image"] == runtime_container()["image"]
    there = downloaded(job["containers"][0]["command"][-1], tmp_path)
    assert there
    service = service_of(overlay)
    model = service["spec"]["predictor"]["model"]
    scheme, _, place = model.get("storageUri", "").partition("://")
    if scheme != "pvc":
        return
    name, _, folder = place.partition("/")
    assert name == claim
    settings = settings_of(service, model)
    weights = (settings.model_id, settings.single_file_model, settings.config_dir)
    refiner = (settings.refiner_id, settings.refiner_single_file_model, settings.refiner_config_dir)
    for path in (*weights, *refiner):
        if path is not None:
            # KServe mounts the folder that storageUri names, in its place.
            assert Path("/mnt/models", folder, Path(path).relative_to("/mnt/models")) in there, path


def test_the_canary_differs_only_in_its_model() -> None:
    (stable, stable_model), (canary, canary_model) = models(copy.deepcopy(service_of("services/sdxl-canary")))
    assert canary_model.pop("storageUri") != stable_model.pop("storageUri")
    assert canary_model.pop("name") == "", "KServe refuses a model's own name"
    assert canary.pop("name") not in (None, stable.get("name"))
    assert canary == stable


# --- The pod ---------------------------------------------------------------------------------------------------


def test_probes_ask_paths_that_the_server_has() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    container = runtime_container()
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    port = load_settings(container["args"], {}, Path("/nonexistent")).http_port
    for probe in probes.values():
        assert "get" in paths[probe["httpGet"]["path"]]
        assert probe["httpGet"]["port"] == port
    assert probes["readiness"]["httpGet"]["path"] == "/v2/health/ready"
    assert probes["liveness"]["httpGet"]["path"] == "/v2/health/live"
    assert probes["startup"]["failureThreshold"] * probes["startup"]["periodSeconds"] >= 1800


def test_metrics_are_announced_where_they_are() -> None:
    spec = read("runtime/base/servingruntime.yaml")["spec"]
    port = spec["containers"][0]["ports"][0]
    for prefix in ("prometheus.io", "prometheus.kserve.io"):
        assert spec["annotations"][f"{prefix}/port"] == str(port["containerPort"])
        assert spec["annotations"][f"{prefix}/path"] == "/metrics"
    monitor = of_kind(render("monitoring"), "PodMonitor")["spec"]
    assert monitor["podMetricsEndpoints"][0]["port"] == port["name"]
    # Knative takes the container's port, but calls it so.
    assert monitor["podMetricsEndpoints"][1]["port"] == "user-port"
    assert {each["path"] for each in monitor["podMetricsEndpoints"]} == {"/metrics"}


@pytest.mark.parametrize("overlay", RUNTIMES)
def test_monitor_and_network_policy_find_the_pods(overlay: str, tmp_path: Path) -> None:
    labels = render(overlay)[0]["spec"]["labels"]
    policy = of_kind(compose(tmp_path, "services/demo", "network-policy"), "NetworkPolicy")
    for selector in (of_kind(render("monitoring"), "PodMonitor")["spec"]["selector"], policy["spec"]["podSelector"]):
        assert selector["matchLabels"].items() <= labels.items()
    assert runtime_container()["ports"][0]["containerPort"] in ports(policy, "ingress")


def ports(policy: Object, direction: str) -> set[int]:
    return {each["port"] for rule in policy["spec"][direction] for each in rule["ports"]}


def test_what_stands_beside_the_server_is_let_through() -> None:
    policy = read("components/network-policy/networkpolicy.yaml")
    # Knative's queue-proxy: requests, and what the autoscaler and Prometheus read.
    assert {8012, 9090, 9091} <= ports(policy, "ingress")
    # The proxy of OpenShift AI's token authentication, and the API server that it asks.
    assert 8443 in ports(policy, "ingress") and 6443 in ports(policy, "egress")
    (names,) = [
        expression["values"]
        for each in policy["spec"]["ingress"][0]["from"]
        for expression in each.get("namespaceSelector", {}).get("matchExpressions", [])
    ]
    assert {"kourier-system", "knative-serving-ingress"} <= set(names) and names == sorted(names)


def test_a_router_on_the_host_network_is_let_through() -> None:
    """OVN-Kubernetes knows the host network by its namespace, and no longer where a podSelector stands beside it.

    Source: useNamespaceAddrSet in its go-controller/pkg/ovn/base_network_controller_policy.go.
    """
    policy = read("components/network-policy/networkpolicy.yaml")
    label = {"policy-group.network.openshift.io/host-network": ""}
    assert {"namespaceSelector": {"matchLabels": label}} in policy["spec"]["ingress"][0]["from"]


def test_what_is_let_out_is_let_out_over_ipv6_too_but_never_to_the_clouds_metadata() -> None:
    """Source: the clouds' documentation of their instance metadata services."""
    metadata = ["169.254.169.254", "fe80::a9fe:a9fe", "fd00:c1::a9fe:a9fe", "fd00:ec2::254", "fd20:ce::254"]
    policy = read("components/network-policy/networkpolicy.yaml")
    rules = [rule for rule in policy["spec"]["egress"] if any("ipBlock" in each for each in rule["to"])]
    assert {each["port"] for rule in rules for each in rule["ports"]} == {443, 6443}
    for rule in rules:
        blocks = {
            ipaddress.ip_network(each["ipBlock"]["cidr"]): [
                ipaddress.ip_network(excluded) for excluded in each["ipBlock"]["except"]
            ]
            for each in rule["to"]
        }
        assert [str(each) for each in blocks] == ["0.0.0.0/0", "::/0"]
        for block, excluded in blocks.items():
            # A cluster refuses an exception from what is not in the block.
            assert {each.version for each in excluded} == {block.version}
        for address in map(ipaddress.ip_address, metadata):
            assert any(address in each for excluded in blocks.values() for each in excluded), address


def test_a_monitor_with_the_servers_key_is_valid() -> None:
    """With the lines that are comments for a server without one."""
    text = (DEPLOY / "monitoring/podmonitor.yaml").read_text(encoding="utf-8")
    monitor = yaml.safe_load(re.sub(r"^      # (?=authorization:|  )", "      ", text, flags=re.MULTILINE))
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    assert [each["authorization"]["credentials"]["name"] for each in endpoints] == ["sdxl-api-key"] * 2
    check([monitor])


def restricted(container: Object) -> bool:
    """Does a container meet the restricted Pod Security Standard on its own, and cannot write but to its volumes?"""
    context = container["securityContext"]
    return (
        context["allowPrivilegeEscalation"] is False
        and context["capabilities"] == {"drop": ["ALL"]}
        and context["readOnlyRootFilesystem"] is True
        and not context.get("privileged")
        and "runAsUser" not in context  # OpenShift chooses one
    )


def test_the_pod_is_restricted_and_writes_only_to_its_volumes() -> None:
    spec = read("runtime/base/servingruntime.yaml")["spec"]
    container = spec["containers"][0]
    assert restricted(container)
    assert container["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert set(mounts) == {"/tmp", "/dev/shm"}
    volumes = {each["name"]: each["emptyDir"] for each in spec["volumes"]}
    assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"
    assert all("sizeLimit" in volume for volume in volumes.values())
    assert "env" not in container or all(each["name"] != "PYTHONPATH" for each in container["env"])
    job = of_kind(render("storage"), "Job")["spec"]["template"]["spec"]
    assert restricted(job["containers"][0]) and job["securityContext"]["runAsNonRoot"] is True


def test_writable_root_changes_nothing_else(tmp_path: Path) -> None:
    (changed,) = compose(tmp_path, "runtime/base", "writable-root")
    context = changed["spec"]["containers"][0]["securityContext"]
    assert context["readOnlyRootFilesystem"] is False
    context["readOnlyRootFilesystem"] = True
    assert changed == render("runtime/base")[0]


def test_a_volume_is_given_to_a_group_only_where_the_component_says_so(tmp_path: Path) -> None:
    """OpenShift chooses the group, and refuses another."""
    for overlay in OVERLAYS:
        assert not any(path[-1] == "fsGroup" for each in render(overlay) for path in keys(each)), overlay
    for overlay, kind, where in (
        ("storage", "Job", ("spec", "template", "spec")),
        ("services/sdxl", "InferenceService", ("spec", "predictor")),
    ):
        changed = compose(tmp_path, overlay, "fs-group")
        pod = functools.reduce(lambda inner, key: inner[key], where, of_kind(changed, kind))
        # With the group of the image's user, whose own group 0 some clusters' policies do not let volumes have.
        assert pod["securityContext"].pop("fsGroup") == 1001
        assert pod["securityContext"].pop("fsGroupChangePolicy") == "OnRootMismatch"
        assert changed == render(overlay)


def test_an_image_of_one_own_is_one_line(tmp_path: Path) -> None:
    compose(tmp_path, "runtime/base")
    path = tmp_path / "kustomization.yaml"
    images = {"images": [{"name": "sdxl-runtime", "newName": "registry.example.com/sdxl", "newTag": "1"}]}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")) | images), encoding="utf-8")
    (runtime,) = kustomize(tmp_path)
    assert runtime["spec"]["containers"][0]["image"] == "registry.example.com/sdxl:1"


def test_the_image_is_tagged_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert runtime_container()["image"] == f"sdxl-runtime:{version}"
