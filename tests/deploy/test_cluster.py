"""What lies in deploy/kubernetes and deploy/systemd, before the schemas and the judge that those have."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

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
    claim = resource("storage.yaml")["metadata"]["name"]
    assert claim in [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_unit_is_confined() -> None:
    command = ["systemd-analyze", "security", "--offline=true", str(FOLDER / "systemd/appliance.service")]
    result = subprocess.run(command, capture_output=True, text=True)
    judged = re.search(r"Overall exposure level for appliance.service: ([\d.]+)", result.stdout)
    assert judged is not None, result.stdout + result.stderr
    assert float(judged[1]) <= HIGHEST_EXPOSURE
    assert "ignoring" not in result.stderr
