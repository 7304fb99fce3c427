"""Makes schema.json from a KubeRay release: its RayJob resource definition, without the schema of pods.

    curl -sLO https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/\
helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml
    python reduce.py ray.io_rayjobs.yaml v1.7.0 > schema.json

A RayJob contains a whole RayCluster, so one file covers both. Nearly all of the definition's megabyte is Kubernetes'
own schema of a pod, repeated for each kind of pod; kubernetes-validate checks pods instead. Descriptions and whatever
our manifests do not use are removed. An unknown field, which the API server would silently drop, becomes an error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

PODS = {"template", "submitterPodTemplate"}
UNUSED = {
    "gcsFaultToleranceOptions",
    "headService",
    "historyServerOptions",
    "networkPolicy",
    "status",
    "tlsOptions",
}


def reduced(schema: Any, name: str = "") -> Any:
    """Return a schema, closed, without descriptions, unused properties and the insides of pods."""
    if isinstance(schema, list):
        return [reduced(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if name in PODS:
        return {"type": "object"}
    kept = {key: reduced(value, key) for key, value in schema.items() if key not in ("description", "properties")}
    if "properties" in schema:
        used = {key: value for key, value in schema["properties"].items() if key not in UNUSED}
        kept["properties"] = {key: reduced(value, key) for key, value in used.items()}
        kept.setdefault("additionalProperties", False)
    return kept


def main() -> None:
    """Write the reduced schema of version v1 on stdout."""
    path, release = sys.argv[1:]
    definition = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    schema = reduced(version["schema"]["openAPIV3Schema"])
    schema["$comment"] = (
        f"From KubeRay {release}, {definition['metadata']['name']}, Apache-2.0 "
        "(https://github.com/ray-project/kuberay); reduced by reduce.py."
    )
    # `metadata` is described elsewhere in Kubernetes, and checked by nobody here but for the name.
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    print(json.dumps(schema, separators=(",", ":"), sort_keys=True))


if __name__ == "__main__":
    main()
