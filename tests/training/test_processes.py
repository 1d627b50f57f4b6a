"""Two processes learn what one learns: the whole model in each (DDP), a part in each (FSDP2), on one machine and on two.

gloo on the CPU, through accelerate's launcher and the configuration files that `deploy/accelerate` has for cards. The one
process that they are compared with is the run that the other tests use.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate.commands import launch as launcher
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from appliance import artifacts, gpu
from appliance import recipe as recipes
from appliance.artifacts import Plan
from appliance.commands import train
from appliance.errors import ArtifactError, EnvironmentIncomplete, RecipeError, TrainingFailed
from appliance.gpu_access import Problem, TorchBuild
from appliance.training import loop, model, processes
from tests import tiny_recipe
from tests.running import WAIT_SECONDS, Trained, call, environment, kill_when
from tests.training.test_training_metrics import free_port

PROJECT = Path(__file__).parents[2]
CONFIGURATIONS = PROJECT / "deploy" / "accelerate"
ADAPTER = "adapter_model.safetensors"
PARTS = "tests.training.sharded_on_cpu"

# What two processes add up in another order differs in the last bits of float32 (1.2e-7 of a value); 38 steps of Adam carry
# that on. Seen: 5e-7 in the loss, 5e-6 in weights of up to 0.12. A row that is missing or comes twice changes 1e-2.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Launched:
    """What a run in several processes left."""

    root: Path
    stdout: str
    stderr: str

    def adapter(self, trained: Trained, phase: str) -> Path:
        return self.root / trained.made[phase].relative_to(trained.root)


def start(root: Path, module: str, configuration: str, flags: tuple[str, ...], *arguments: str | Path) -> Any:
    """Starts `accelerate launch … -m MODULE train ARGUMENTS`."""
    options = ["--config_file", str(CONFIGURATIONS / configuration), *flags]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", module, "train", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(root), cwd=PROJECT, text=True, **pipes)


def finished(root: Path, *launchers: Any) -> tuple[int, Launched]:
    """The exit code and output of all launchers of a run; none of them outlives it."""
    outputs = []
    with contextlib.ExitStack() as stack:
        for each in launchers:
            stack.enter_context(each)
            stack.callback(each.terminate)
        outputs = [each.communicate(timeout=WAIT_SECONDS) for each in launchers]
    code = max(abs(each.returncode) for each in launchers)
    return code, Launched(root, "".join(out for out, _ in outputs), "".join(err for _, err in outputs))


def on_one_machine(root: Path, module: str, configuration: str, *arguments: str | Path) -> tuple[int, Launched]:
    return finished(root, start(root, module, configuration, ("--main_process_port", "0"), *arguments))


def on_two_machines(root: Path, *arguments: str | Path) -> tuple[int, Launched]:
    """Two launchers, as on two machines; the model in two parts."""
    port = str(free_port())
    address = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    both = [start(root, PARTS, "two-machines.yaml", ("--machine_rank", rank, *address), *arguments) for rank in ("0", "1")]
    return finished(root, *both)


def worker(launcher_id: int, rank: int) -> int:
    """The id of the process that the launcher gave this rank."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            is_child = f"\nPPid:\t{launcher_id}\n" in status.read_text()
            if is_child and f"RANK={rank}".encode() in status.with_name("environ").read_bytes().split(b"\0"):
                return int(status.parent.name)
    raise AssertionError(f"no process of rank {rank}")


def killed(root: Path, trained: Trained, module: str, configuration: str, rank: int) -> Path:
    """Starts SFT in two processes and kills one of them after a checkpoint; returns what was left."""
    trained.copy(root, "data", "base")
    made = trained.made["sft"]
    folder = root / made.parent.name / f"{made.name}{artifacts.PARTIAL}"
    process = start(root, module, configuration, ("--main_process_port", "0"), trained.recipe, "--phase", "sft")

    def has_checkpoint() -> bool:
        if not any(folder.glob(f"{loop.CHECKPOINTS}/*/{loop.COMPLETE}")):
            return False
        os.kill(worker(process.pid, rank), signal.SIGKILL)
        return True

    assert kill_when(process, has_checkpoint, 0) != 0  # signal 0: the launcher ends by itself
    assert any(folder.glob(f"{loop.CHECKPOINTS}/*/{loop.COMPLETE}"))
    assert not (folder / artifacts.MANIFEST).exists()
    return folder


@pytest.fixture(scope="module")
def whole(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """SFT and DPO in two processes, each with the whole model."""
    root = tmp_path_factory.mktemp("whole") / "artifacts"
    trained.copy(root, "base")
    code, launched = on_one_machine(root, "appliance", "two-processes-cpu.yaml", trained.recipe)
    assert code == 0, launched.stderr
    return launched


@pytest.fixture(scope="module")
def parts(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """SFT and DPO in two processes, each with a part of the model: killed on one machine, resumed and ended on two."""
    root = tmp_path_factory.mktemp("parts") / "artifacts"
    folder = killed(root, trained, PARTS, "two-gpus.yaml", rank=1)
    assert any(folder.glob(f"{loop.CHECKPOINTS}/*/{loop.SHARDS}")), "the model was not sharded"
    code, launched = on_two_machines(root, trained.recipe, "--resume")
    assert code == 0, launched.stderr
    assert "sft: continuing after step" in launched.stderr
    return launched


@pytest.fixture(params=["whole", "parts"])
def launched(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def losses(folder: Path) -> list[tuple[int, float]]:
    points = [json.loads(line) for line in (folder / loop.LOSS).read_text().splitlines()]
    return [(point["step"], point["loss"]) for point in points]


def assert_learned_the_same(made: Path, expected: Path) -> None:
    from safetensors.torch import load_file

    for (step, loss), (expected_step, expected_loss) in zip(losses(made), losses(expected), strict=True):
        assert step == expected_step
        assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE), f"step {step}"
    weights, expected_weights = load_file(made / ADAPTER), load_file(expected / ADAPTER)
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        assert value.dtype == expected_weights[name].dtype
        assert (value - expected_weights[name]).abs().max() < WEIGHT_TOLERANCE, name


def assert_results_the_same(made: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Figures within the tolerance of sums in another order, words (how the model was laid out) as they are."""
    wanted = {**expected, "processes": 2, "repeated_rows": 0}
    words = {name for name, value in wanted.items() if isinstance(value, str)}
    assert made.keys() == wanted.keys()
    assert {name: made[name] for name in words} == {name: wanted[name] for name in words}
    assert {name: made[name] for name in wanted.keys() - words} == pytest.approx(
        {name: wanted[name] for name in wanted.keys() - words}, rel=LOSS_TOLERANCE
    )


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_two_processes_learn_what_one_learns(launched: Launched, trained: Trained, phase: str) -> None:
    made = launched.adapter(trained, phase)
    assert_learned_the_same(made, trained.made[phase])
    results, expected = artifacts.load(made).results, trained.manifest(phase)["results"]
    assert_results_the_same(results, expected)


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_one_whole_artifact_of_the_same_identity(launched: Launched, trained: Trained, phase: str) -> None:
    made = launched.adapter(trained, phase)
    artifact, expected = artifacts.load(made), trained.manifest(phase)
    artifacts.check_files(artifact)
    assert {key: artifact.manifest[key] for key in ("digest", "parents", "config")} == {
        key: expected[key] for key in ("digest", "parents", "config")
    }
    assert artifact.manifest["files"].keys() == expected["files"].keys()
    assert {each.name for each in made.parent.iterdir() if each.is_dir()} == {
        trained.made["sft"].name,
        trained.made["dpo"].name,
    }
    assert (made / "samples.json").read_bytes() == (trained.made[phase] / "samples.json").read_bytes()


def test_one_process_speaks(launched: Launched, trained: Trained) -> None:
    assert launched.stdout.splitlines() == [
        f"{phase}: {launched.adapter(trained, phase)} ({state})"
        for phase, state in (("base", "unchanged"), ("sft", "made"), ("dpo", "made"))
    ]
    for said in ("conversations,", "sft 30/30", "dpo 8/8", "chosen answer preferred"):
        assert launched.stderr.count(said) == 1, said


def test_one_process_continues_what_two_began(trained: Trained, root: Path) -> None:
    killed(root, trained, "appliance", "two-processes-cpu.yaml", rank=0)
    resumed = call("train", trained.recipe, "--phase", "sft", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "continuing after step" in resumed.stderr
    assert_learned_the_same(root / trained.made["sft"].relative_to(trained.root), trained.made["sft"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "sft.batch_rows=1"), "sft.batch_rows = 1 rows times sft.accumulate = 1"),
        ((), "run `appliance train RECIPE --phase base` first, without a launcher"),
        (("--set", "sft.epoch=1"), "unknown key"),
    ],
)
def test_refusal_is_said_once(tmp_path: Path, root: Path, arguments: tuple[str, ...], said: str) -> None:
    recipe = tiny_recipe.write(tmp_path / "recipe")
    code, launched = on_one_machine(root, "appliance", "two-processes-cpu.yaml", recipe, *arguments)
    assert code != 0
    (line,) = [line for line in launched.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not list(root.rglob(f"*{artifacts.PARTIAL}"))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process one of several, without any of the others."""

    def become(rank: int, count: int) -> None:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return become


@pytest.mark.parametrize(
    ("rows", "accumulate", "count", "share"),
    [(2, 4, 1, (2, 4)), (2, 4, 2, (2, 2)), (2, 4, 4, (2, 1)), (2, 4, 8, (1, 1)), (3, 2, 3, (1, 2)), (6, 4, 6, (2, 2))],
)
def test_every_process_has_its_share_of_a_step(
    two: Callable[[int, int], None], rows: int, accumulate: int, count: int, share: tuple[int, int]
) -> None:
    two(0, count)
    assert processes.share(rows, accumulate, "sft") == share
    assert share[0] * share[1] * count == rows * accumulate


def test_step_that_cannot_be_shared(two: Callable[[int, int], None]) -> None:
    two(0, 3)
    with pytest.raises(RecipeError, match=r"3 processes .*sft.batch_rows = 2 .*sft.accumulate = 4 .*start 2 or 4 or 8 of"):
        processes.share(2, 4, "sft")
    with pytest.raises(RecipeError, match="train without a launcher"):
        processes.share(1, 1, "sft")


def test_rows_that_come_twice(two: Callable[[int, int], None]) -> None:
    assert processes.repeated_rows(7, 2) == 0
    two(0, 2)
    assert [processes.repeated_rows(rows, 2) for rows in (4, 5, 6, 7)] == [0, 3, 2, 1]


def test_each_process_has_a_card_of_its_own(two: Callable[[int, int], None]) -> None:
    assert processes.local_index() == 0
    two(1, 2)
    assert processes.local_index() == 1
    assert not processes.is_first()


def test_divergence_is_said_by_the_first(two: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SENTENCE_SECONDS", 0.0)
    error = TrainingFailed("sft diverged")
    two(0, 2)
    with pytest.raises(TrainingFailed):
        processes.fail(error)
    two(1, 2)
    with pytest.raises(SystemExit, match="1"):
        processes.fail(error)


def test_starter_is_made_by_one_process(two: Callable[[int, int], None], tmp_path: Path, root: Path) -> None:
    recipe = recipes.load(tiny_recipe.write(tmp_path / "recipe"))
    assert train._found("base", recipe, root)[1] is None
    two(0, 2)
    with pytest.raises(ArtifactError, match="--phase base` first, without a launcher"):
        train._found("base", recipe, root)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_checkpoint_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, root: Path, is_sharded: bool) -> None:
    plan = Plan(kind="adapter", name="a", inputs={})
    folder = plan.partial(root) / loop.CHECKPOINTS / "checkpoint-3"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    (folder / loop.COMPLETE).touch()
    if is_sharded:
        (folder / "pytorch_model_fsdp_0").rmdir()
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    written = "without FSDP and cannot be continued with it" if is_sharded else "with FSDP and cannot be continued without"
    with pytest.raises(ArtifactError, match=written):
        loop.resume_point(plan, root, resume=True, restart=False)


def test_sharded_training_keeps_float32_where_a_whole_model_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    processes.settle(SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    with pytest.raises(EnvironmentIncomplete, match=r"two-processes-cpu\.yaml"):
        processes.settle(SimpleNamespace(is_fsdp_enabled=False))


@pytest.mark.parametrize(
    ("name", "machines", "is_sharded"),
    [("two-gpus.yaml", 1, True), ("two-machines.yaml", 2, True), ("two-processes-cpu.yaml", 1, False)],
)
def test_accelerate_accepts_the_configuration(
    monkeypatch: pytest.MonkeyPatch, name: str, machines: int, is_sharded: bool
) -> None:
    flags = ["--config_file", str(CONFIGURATIONS / name), "--main_process_port", "0", "-m", "appliance", "train"]
    read, _, _ = launcher._validate_launch_command(launcher.launch_command_parser().parse_args(flags))
    assert (read.num_processes, read.num_machines, bool(read.use_fsdp)) == (2, machines, is_sharded)
    assert read.use_fsdp or read.multi_gpu, "it would start one process"
    read.main_process_ip, read.machine_rank = "127.0.0.1", read.machine_rank or 0
    for variable, value in prepare_multi_gpu_env(read).items():
        if variable.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(variable, value)
    assert processes.is_sharded() == is_sharded
    if is_sharded:
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert "SHARDED" in str(plugin.state_dict_type)
        assert not plugin.cpu_ram_efficient_loading
        assert plugin.auto_wrap_policy is not None


def test_card_that_torch_finds_and_has_no_code_for_ends_training_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with …")

    monkeypatch.setenv("APPLIANCE_LEASES", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_70", "sm_80"])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (6, 1))
    monkeypatch.setattr("torch.ones", refuse)
    with pytest.raises(EnvironmentIncomplete, match=r"cuda:0 and cannot .* no kernel image .* sm_70, sm_80; take a build"):
        model.gpu_lease().__enter__()
    assert (tmp_path / "nvidia-2.lease").read_text() == "", "the card was let go"


def test_training_says_why_a_card_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[TorchBuild] = []

    def problems(*, torch: TorchBuild) -> list[Problem]:
        asked.append(torch)
        return [Problem(what="There is a card", remedy="use it")]

    monkeypatch.setattr(gpu, "problems", problems)
    monkeypatch.setattr(train, "_train", lambda *_, **__: None)
    train._make("sft", cast("Any", None), tmp_path, {}, resume=False, restart=False)
    assert "warning: There is a card; use it." in capsys.readouterr().err
    assert asked[0].backend in ("cpu", "cuda", "rocm")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train._make("sft", cast("Any", None), tmp_path, {}, resume=False, restart=False)
    assert capsys.readouterr().err == ""


def test_one_process_is_not_spread_over_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(EnvironmentIncomplete, match=r"2 cards are visible.*CUDA_VISIBLE_DEVICES=0"):
        model.gpu_lease()
