"""What lies in deploy/ is what its generators make and what its readers accept."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from appliance import containers
from appliance.commands.train import train
from deploy import generate
from deploy.dashboards import DASHBOARDS

FOLDER = Path(generate.__file__).parent
PROMTOOL = shutil.which("promtool")
COMPOSE = ("compose.yaml", "compose.cuda.yaml", "compose.rocm.yaml")


def test_generated_files_are_in_step() -> None:
    for path, content in generate.files().items():
        assert path.read_text() == content, f"{path.name} differs; run `python -m deploy.generate`"


def test_dashboards_hold_every_expression_and_no_other_source() -> None:
    for name, board in DASHBOARDS.items():
        panels = json.loads((FOLDER / f"grafana/dashboards/{name}.json").read_text())["panels"]
        found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
        assert found == [query.expr for panel in board.panels for query in panel.queries]
        assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {"prometheus"}
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["uid"] == "prometheus"


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_file_is_one(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, FOLDER / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    broken = (FOLDER / name).read_text().replace("image:", "imaeg:")
    result = subprocess.run([*command, "-"], input=broken, capture_output=True, text=True)
    assert result.returncode != 0


def test_compose_publishes_on_loopback_only_pins_images_and_mounts_what_exists() -> None:
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert re.search(r":(v?\d+\.\d+\.\d+|cpu(-train)?})$", service["image"]), service["image"]
        assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)}", r"\1", volume).partition(":")[0]
            assert not source.startswith(".") or (FOLDER / source).is_dir(), volume


def test_prometheus_looks_where_something_answers() -> None:
    config = yaml.safe_load((FOLDER / "prometheus/prometheus.yml").read_text())
    found = [*config["scrape_configs"], *config["alerting"]["alertmanagers"]]
    hosts = {target.partition(":")[0] for each in found for target in each["static_configs"][0]["targets"]}
    assert hosts - {"localhost"} <= services().keys()
    networks = set(services()["prometheus"]["networks"])
    for host in hosts - {"localhost"}:
        assert networks & set(services()[host]["networks"]), host


def test_training_is_watched_and_reaches_nobody() -> None:
    training = services()["training"]
    assert training["image"].endswith(f"{containers.image('cpu', 'train')}}}")
    verb, recipe = training["command"]
    assert verb == containers.COMMANDS["train"]
    assert f"{recipe.rpartition('/')[0]}:ro" in training["volumes"][1]
    # What `appliance run` hands to each `appliance train` that it starts.
    assert training["environment"].keys() == {each.envvar for each in train.params if each.envvar}
    config = yaml.safe_load((FOLDER / "prometheus/prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets["training"] == [f"training:{training['environment']['APPLIANCE_METRICS_PORT']}"]
    networks = yaml.safe_load((FOLDER / "compose.yaml").read_text())["networks"]
    assert all(networks[name] == {"internal": True} for name in training["networks"])


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_overlay_gives_cards_to_what_computes(backend: str) -> None:
    ours = {name for name, service in services().items() if "edge-appliance" in service["image"]}
    changed = services(f"compose.{backend}.yaml")
    assert changed.keys() == ours
    for name, service in changed.items():
        target = "train" if name == "training" else "serve"
        assert service["image"].endswith(f":-{containers.image(backend, target)}}}")
        if backend == "rocm":
            assert service["devices"] == ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"]
            assert [each.partition(":")[0] for each in service["group_add"]] == ["${RENDER_GROUP"]
        else:
            cards = service["deploy"]["resources"]["reservations"]["devices"]
            assert cards == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def services(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())["services"]
    return found


def test_alerts_have_words_and_a_section_in_the_runbook() -> None:
    runbook = (FOLDER.parent / "docs/runbook.md").read_text()
    groups = yaml.safe_load((FOLDER / "prometheus/alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 10
    for rule in rules:
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert f"\n## {rule['alert']}\n" in runbook
    assert runbook.count("\n## Appliance") == len(rules)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian package prometheus)")
def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    assert PROMTOOL is not None
    tests = Path(__file__).with_name("alerts_test.yml")
    result = subprocess.run([PROMTOOL, "test", "rules", tests], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    named = {rule["alertname"] for test in yaml.safe_load(tests.read_text())["tests"] for rule in test["alert_rule_test"]}
    groups = yaml.safe_load((FOLDER / "prometheus/alerts.yml").read_text())["groups"]
    assert named == {rule["alert"] for group in groups for rule in group["rules"]}


def test_expressions_name_what_is_counted() -> None:
    """Those too that are empty on the machine that tests."""
    sources = [
        FOLDER.parent / "appliance" / name for name in ("machine_metrics.py", "serving/metrics.py", "training/metrics.py")
    ]
    written = {name for path in sources for name in re.findall(r'"([a-z_]+)"', path.read_text())}
    known = {f"appliance_{name}" for name in written} | {f"appliance_training_{name}" for name in written} | written
    boards = [board for name, board in DASHBOARDS.items() if name != "truth"]
    expressions = [query.expr for board in boards for panel in board.panels for query in panel.queries]
    rules = [path.read_text() for path in (FOLDER / "prometheus").glob("*.yml")]
    for name in re.findall(r"(?<![:\w])appliance_\w+", "".join([*expressions, *rules])):
        assert name in known or re.sub(r"_(total|bucket|count|sum)$", "", name) in known, name
