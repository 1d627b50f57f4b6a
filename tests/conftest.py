"""For every test: artifacts in a folder of its own, and no network. For those that ask: one trained tiny assistant."""

import json
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from appliance import config
from tests import tiny_recipe
from tests.running import Trained, run
from tests.tiny_encoders import Exported

config.apply_quiet_environment()  # before any test imports torch, whose threads read it once
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would our children

# No test asserts a time, and the first example pays for imports.
settings.register_profile("appliance", deadline=None)
settings.load_profile("appliance")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts folder of this test."""
    for name, value in config.quiet_environment().items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "artifacts"
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(folder))
    monkeypatch.setenv("APPLIANCE_KEY_FILE", str(tmp_path / "store.key"))  # never the one of whoever runs the tests
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The tiny recipe run to its end by `appliance run`, as a person would; nobody may change it."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe.write(folder / "recipe")
    result = run(folder / "artifacts", "run", recipe, "--json")
    assert result.returncode == 0, result.stderr
    output = json.loads(result.stdout)
    made = {step["step"]: Path(step["artifact"]) for step in output["steps"]}
    return Trained(folder / "artifacts", recipe, made, output)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Encoders exported to ONNX, by the environment that `make onnx-env` builds."""
    return Exported(tmp_path_factory.mktemp("encoders"))
