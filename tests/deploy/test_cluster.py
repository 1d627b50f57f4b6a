"""What lies in deploy/kubernetes and deploy/systemd, before the schemas and the judge that those have."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from appliance.recipe import Serve

FOLDER = Path(__file__).resolve().parents[2] / "deploy"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kubernetes/kustomization.yaml").read_text())
HIGHEST_EXPOSURE = 1.5  # of 10, as `systemd-analyze security` counts


def resource(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "kubernetes" / name).read_text())
    return found


@pytest.mark.parametrize("name", KUSTOMIZATION["resources"])
def test_resource_keeps_to_the_schema(name: str) -> None:
    kubernetes_validate.validate(resource(name), "1.33", strict=True)


def test_schema_is_strict() -> None:
    broken = resource("deployment.yaml")
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def test_parts_fit_together() -> None:
    deployment = resource("deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    names = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= names
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["image"] == KUSTOMIZATION["images"][0]["name"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert resource("service.yaml")["spec"]["selector"] == labels
    assert resource("disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert resource("autoscaling.yaml")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    environ = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert environ["APPLIANCE_MAKE_KEYS"] == "", "a pod has no place for keys of its own"
    mounted = {each["mountPath"]: each["name"] for each in pod["containers"][0]["volumeMounts"]}
    cache = mounted[environ["APPLIANCE_CACHE"] or ""]
    (size,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == cache)
    assert int(size.removesuffix("Gi")) * 1024 > Serve().snapshot_mib, "a pod whose folder is too full is ended"
    claim = resource("storage.yaml")["metadata"]["name"]
    assert claim in [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]]


def test_affinity_goes_to_our_pods_by_the_header_that_clients_compute() -> None:
    found = list(yaml.safe_load_all((FOLDER / "kubernetes/affinity-envoy-gateway.yaml").read_text()))
    gateway, route, policy = found
    assert [each["kind"] for each in found] == ["Gateway", "HTTPRoute", "BackendTrafficPolicy"]
    assert {each["metadata"]["namespace"] for each in found} == {KUSTOMIZATION["namespace"]}
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
    service = resource("service.yaml")
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert backend == {"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}
    assert policy["spec"]["targetRefs"][0]["name"] == route["metadata"]["name"]
    header = policy["spec"]["loadBalancer"]["consistentHash"]["header"]["name"]
    scaling = (FOLDER.parent / "docs/scaling.md").read_text()
    assert f"$http_{header.replace('-', '_')} " in scaling
    (line,) = re.findall(r"```python\n(headers\[.*)\n```", scaling)
    system, first, other = ({"role": "user", "content": text} for text in ("Be kind.", "Where?", "When?"))
    values = []
    for messages in ([system, first], [system, first, other, first], [system, other]):
        headers: dict[str, str] = {}
        exec(line, {"hashlib": hashlib, "json": json, "headers": headers, "messages": messages})  # as a client would
        values.append(headers[header])
    assert values[0] == values[1] != values[2]


def test_autoscaler_gets_its_metric() -> None:
    (rule,) = resource("prometheus-adapter.yaml")["rules"]["custom"]
    wanted = resource("autoscaling.yaml")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    series, _, labels = rule["seriesQuery"].partition("{")
    assert rule["name"] == {"matches": f"^{series}$", "as": wanted}
    assert f'_gauge("{series.removeprefix("appliance_")}"' in (FOLDER.parent / "appliance/serving/metrics.py").read_text()
    (job,) = resource("prometheus-scrape.yml")["scrape_configs"]
    written = {each["target_label"] for each in job["relabel_configs"] if "target_label" in each}
    assert written == rule["resources"]["overrides"].keys() == set(re.findall(r"(\w+)!=", labels))
    deployment = resource("deployment.yaml")["spec"]["template"]
    kept = next(each["regex"] for each in job["relabel_configs"] if each.get("action") == "keep")
    port = deployment["spec"]["containers"][0]["ports"][0]["name"]
    assert kept == f"{deployment['metadata']['labels']['app.kubernetes.io/name']};{port}"
    assert job["kubernetes_sd_configs"][0]["namespaces"]["names"] == [KUSTOMIZATION["namespace"]]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_pods_are_scraped_under_their_names(tmp_path: Path) -> None:
    """Debian's promtool knows no clusters: what one would tell of a pod is given to it."""
    (job,) = resource("prometheus-scrape.yml")["scrape_configs"]
    del job["kubernetes_sd_configs"]
    told = {"pod_label_app_kubernetes_io_name": "appliance", "namespace": "appliance", "pod_name": "appliance-1"}
    meta = {f"__meta_kubernetes_{name}": value for name, value in told.items()}
    ports = {"10.0.0.1:8080": "http", "10.0.0.1:9": "other"}
    port_name = "__meta_kubernetes_pod_container_port_name"
    job["static_configs"] = [{"targets": [each], "labels": {**meta, port_name: name}} for each, name in ports.items()]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    command = ["promtool", "check", "service-discovery", "--timeout=3s", tmp_path / "prometheus.yml", job["job_name"]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {each["labels"].get("instance"): each["labels"] for each in json.loads(result.stdout) if each.get("labels")}
    assert found.keys() == {"10.0.0.1:8080"}
    assert {name: found["10.0.0.1:8080"][name] for name in ("job", "namespace", "pod")} == {
        "job": "appliance",
        "namespace": "appliance",
        "pod": "appliance-1",
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_adapters_query_is_one(tmp_path: Path) -> None:
    (rule,) = resource("prometheus-adapter.yaml")["rules"]["custom"]
    query = rule["metricsQuery"]
    for placeholder, value in (
        ("GroupBy", "pod"),
        ("LabelMatchers", 'namespace="appliance"'),
        ("Series", rule["name"]["as"]),
    ):
        query = query.replace(f"<<.{placeholder}>>", value)
    rules = {"groups": [{"name": "adapter", "rules": [{"record": "waiting", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    result = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_documented_costs_are_those_of_the_manifests() -> None:
    (container,) = resource("deployment.yaml")["spec"]["template"]["spec"]["containers"]
    wanted, scaling = container["resources"]["requests"], resource("autoscaling.yaml")["spec"]
    cores, memory = int(wanted["cpu"]), int(wanted["memory"].removesuffix("Gi"))
    pods = [scaling["minReplicas"], scaling["maxReplicas"]]
    sums = [f"{cores * each} and {memory * each} for the {each}" for each in pods]
    text = (FOLDER.parent / "docs/scaling.md").read_text()
    assert f"{cores} cores and {memory} GiB reserved for each pod: {sums[0]} that always run, {sums[1]} at most" in text
    storage = resource("storage.yaml")["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")
    assert f"the claim's {storage} GiB once" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_unit_is_confined() -> None:
    command = ["systemd-analyze", "security", "--offline=true", str(FOLDER / "systemd/appliance.service")]
    result = subprocess.run(command, capture_output=True, text=True)
    judged = re.search(r"Overall exposure level for appliance.service: ([\d.]+)", result.stdout)
    assert judged is not None, result.stdout + result.stderr
    assert float(judged[1]) <= HIGHEST_EXPOSURE
    assert "ignoring" not in result.stderr
