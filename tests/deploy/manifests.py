"""The manifests in deploy/ as a cluster would get them, and strict schemas to hold them against."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.33"

Object = dict[str, Any]

RUNTIMES = ["runtime/base", "runtime/cluster", "runtime/openshift-ai"]
SERVICES = sorted(
    f"services/{path.parent.name}"
    for path in DEPLOY.glob("services/*/kustomization.yaml")
    if path.parent.name != "base"
)
OVERLAYS = [*RUNTIMES, *SERVICES, "services/base", "monitoring", "storage"]


# --- Rendering -------------------------------------------------------------------------------------------------


def kustomize(folder: Path) -> list[Object]:
    """What `kubectl kustomize` makes of a folder."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build", str(folder)]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [each for each in yaml.safe_load_all(result.stdout) if each]


@functools.cache
def render(overlay: str) -> list[Object]:
    return kustomize(DEPLOY / overlay)


def compose(folder: Path, resource: str, *components: str) -> list[Object]:
    """What an operator's own kustomization makes of one of ours and some components; written into `folder`."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(DEPLOY / resource, folder)],
        "components": [os.path.relpath(DEPLOY / "components" / name, folder) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return kustomize(folder)


def of_kind(objects: list[Object], kind: str) -> Object:
    found = [each for each in objects if each["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects are a {kind}"
    return found[0]


def examples(document: Path) -> list[Object]:
    """The objects in the YAML blocks of a page."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [each for block in blocks for each in yaml.safe_load_all(block) if each]


# --- Schemas ---------------------------------------------------------------------------------------------------


def crd_folder() -> Path:
    folder = os.environ.get("CRD_DIR")
    if not folder:
        pytest.skip("CRD_DIR names no folder with the custom resource definitions of KServe and Prometheus Operator")
    return Path(folder)


@functools.cache
def custom_schemas(folder: Path) -> dict[tuple[str, str], Any]:
    """JSON schemas of all versions of all custom resource definitions in a folder, closed."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        for each in yaml.load_all(path.read_text(encoding="utf-8"), Loader=loader):
            if each and each["kind"] == "CustomResourceDefinition":
                spec = each["spec"]
                for version in spec["versions"]:
                    schema = closed(version["schema"]["openAPIV3Schema"])
                    schema["properties"]["metadata"] = METADATA
                    schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return schemas


METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 53},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def closed(schema: Any) -> Any:
    """An OpenAPI v3 schema as JSON schema in which an object has no fields but those that are named."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    # The names of properties may be those of keywords ("description"), so they are not looked at as such.
    result = {
        key: {name: closed(each) for name, each in value.items()} if key == "properties" else closed(value)
        for key, value in schema.items()
        if key not in ("description", "format", "default", "example")
    }
    if result.pop("x-kubernetes-int-or-string", False):
        result.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if result.pop("nullable", False) and "type" in result:
        result["type"] = [result["type"], "null"]
    preserves = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in result and not preserves:
        result.setdefault("additionalProperties", False)
    return result


def problems(item: Object) -> list[str]:
    """What is wrong with an object: unknown fields, missing ones, wrong types."""
    kind = (item["apiVersion"], item["kind"])
    if kind in STRUCTURES:
        schema = STRUCTURES[kind]
    elif "." not in item["apiVersion"].split("/")[0] or item["apiVersion"].split("/")[0].endswith("networking.k8s.io"):
        try:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [str(error.message)]
        return []
    else:
        schemas = custom_schemas(crd_folder())
        assert kind in schemas, f"CRD_DIR has no definition of {kind}"
        schema = schemas[kind]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(item)
    return [f"{error.json_path}: {error.message}" for error in errors]


def structure(**properties: Any) -> Any:
    """An object with these fields and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
RULE = structure(alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": TEXT}) | {"required": ["expr"]}
GROUP = structure(name=TEXT, rules={"type": "array", "items": RULE}) | {"required": ["name", "rules"]}
HEAD = {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA}

STRUCTURES: dict[tuple[str, str], Any] = {
    # No definitions of these are at hand; this is what ours consist of.
    ("monitoring.coreos.com/v1", "PrometheusRule"): structure(
        **HEAD, spec=structure(groups={"type": "array", "minItems": 1, "items": GROUP})
    ),
    ("template.openshift.io/v1", "Template"): structure(
        **HEAD, objects={"type": "array"}, parameters={"type": "array"}
    ),
}


def keys(item: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key of a nested object."""
    pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in pairs:
        if isinstance(item, dict):
            yield (*path, key)
        yield from keys(value, (*path, key))
