"""Exporting encoders: what comes out computes what PyTorch computes, and what does not is refused and leaves nothing."""

import dataclasses
import json
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from appliance import artifacts, encoders
from appliance.errors import VerificationFailed
from convert import encoder_check, encoder_folder, onnx_environment
from tests import tiny_encoders
from tests.running import call
from tests.tiny_encoders import Exported

FILES = {"model.onnx", "model-int8.onnx", "tokenizer.json", "encoder.json"}


def convert(model: Path, *options: str) -> Result:
    return call("convert", "onnx", model, *options)


def nothing_is_left(root: Path) -> bool:
    return not [each for each in root.rglob("*") if each.suffix != ".lock" and each.name != "encoder"]


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("manifest.json")))


class TestExport:
    @pytest.mark.parametrize("name", tiny_encoders.MODELS)
    def test_agrees_with_pytorch_and_says_how_far_int8_is(self, exported: Exported, name: str) -> None:
        artifact = artifacts.load(exported.encoder(name))
        assert artifact.manifest["kind"] == "encoder"
        assert artifact.manifest["parents"] == [artifacts.identity(exported.model(name))]
        assert set(artifact.manifest["files"]) == FILES
        results = artifact.results
        assert results["fp32"]["largest_difference"] < 1e-4
        assert results["int8"]["largest_difference"] > results["fp32"]["largest_difference"]
        assert results["exported_by"]["transformers"].startswith("4.")
        assert results["texts"] != 2, "the exporter traces two texts of 16 tokens"
        figures = {
            "embedding": ("least_cosine", "same_nearest_ratio"),
            "reranker": ("largest_score_difference", "same_order_ratio"),
            "nli": ("largest_score_difference", "same_label_ratio"),
            "classifier": ("largest_score_difference", "same_label_ratio"),
        }[artifact.manifest["config"]["kind"]]
        for key in figures:
            assert 0 <= results["int8"][key] <= 1.00001, (key, results["int8"])

    def test_the_real_model_keeps_its_meaning_in_int8(self, exported: Exported) -> None:
        artifact = artifacts.load(exported.encoder("real"))
        results, files = artifact.results, artifact.manifest["files"]
        assert 200 < results["longest_tokens"] <= 256
        assert results["int8"]["least_cosine"] > 0.95
        assert results["int8"]["mean_cosine"] > 0.98
        assert files["model-int8.onnx"]["size_bytes"] < 0.3 * files["model.onnx"]["size_bytes"]

    def test_int8_weights_leave_a_bit_free(self, exported: Exported) -> None:
        """Or CPUs without VNNI, whose sums of two products have 16 bits, compute something else than this one."""
        program = """
import sys, onnx
from onnx import numpy_helper
tensors = {each.name: numpy_helper.to_array(each) for each in onnx.load(sys.argv[1]).graph.initializer}
print(*(abs(value.astype(int)).max() for value in tensors.values() if value.dtype.name == "int8" and value.ndim == 2))
"""
        command = [onnx_environment.python(), "-I", "-c", program, exported.encoder("embedding") / "model-int8.onnx"]
        largest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert len(largest) == 12, "two layers of six matrices"
        assert 60 <= max(map(int, largest)) <= 64

    def test_settings_are_those_of_the_model(self, exported: Exported) -> None:
        found = {name: encoders.read_settings(exported.encoder(name)) for name in tiny_encoders.MODELS}
        assert {name: settings.kind for name, settings in found.items()} == {
            **{"embedding": "embedding", "reranker": "reranker", "nli": "nli", "classifier": "classifier"},
            "real": "embedding",
        }
        assert found["embedding"].max_tokens == tiny_encoders.MAX_TOKENS
        assert (found["embedding"].query_prefix, found["embedding"].passage_prefix) == ("query: ", "passage: ")
        assert (found["real"].pooling, found["real"].normalize, found["real"].width) == ("mean", True, 384)
        assert found["real"].max_tokens == 256
        assert found["nli"].labels == ("entailment", "neutral", "contradiction")
        assert found["classifier"].labels == ("negative", "neutral", "positive")
        assert (found["reranker"].activation, found["nli"].activation) == ("sigmoid", "softmax")
        assert (found["reranker"].max_tokens, found["reranker"].pad_token_id) == (64, 1)

    def test_second_time_nothing_is_done(self, exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        made = exported.encoder("nli")
        monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(made.parents[1]))
        monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path))  # not even the environment is needed
        output = json.loads(convert(exported.model("nli"), "--name", "nli", "--json").stdout)
        assert (output["state"], output["kind"], Path(output["artifact"])) == ("unchanged", "nli", made)
        assert output["results"]["fp32"]["largest_difference"] < 1e-4
        other = json.loads(convert(exported.model("nli"), "--max-tokens", "40", "--dry-run", "--json").stdout)
        assert (other["state"], other["results"]) == ("to make", {})

    @pytest.mark.slow
    @pytest.mark.parametrize("architecture", encoder_folder.ARCHITECTURES)
    def test_every_architecture_that_is_named(self, tmp_path: Path, architecture: str) -> None:
        tiny_encoders.require_environment()
        for labels in ((), ("a", "b", "c")):
            model = tiny_encoders.save(tmp_path / f"{architecture}-{len(labels)}", architecture, labels)
            path = model / "config.json"
            facts = json.loads(path.read_text())
            if rope := facts.get("rope_parameters"):
                facts["global_rope_theta"] = rope["full_attention"]["rope_theta"]
                facts["local_rope_theta"] = rope["sliding_attention"]["rope_theta"]
                path.write_text(json.dumps(facts))
            done = convert(model, "--max-tokens", "60", *(() if labels else ("--pooling", "cls")))
            assert done.exit_code == 0, done.stderr


def perturb(folder: Path, model: Path) -> None:
    """Changes one number of one word, by a little, where it lies in the ONNX file."""
    from safetensors.numpy import load_file

    (weights,) = [value for name, value in load_file(model / "model.safetensors").items() if "word_embeddings" in name]
    changed = weights.copy()
    changed[6, 0] += 0.01
    data = (folder / "model.onnx").read_bytes()
    assert data.count(weights.tobytes()) == 1
    (folder / "model.onnx").write_bytes(data.replace(weights.tobytes(), changed.tobytes()))


def bind_to_one_shape(folder: Path, _: Path) -> None:
    """What an export without dynamic axes gives: two texts of 16 tokens."""
    program = """
import sys, onnx
model = onnx.load(sys.argv[1])
for each in model.graph.input:
    for dimension, size in zip(each.type.tensor_type.shape.dim, (2, 16)):
        dimension.dim_value = size
onnx.save(model, sys.argv[1])
"""
    subprocess.run([onnx_environment.python(), "-I", "-c", program, folder / "model.onnx"], check=True)


def take_another(folder: Path, _: Path) -> None:
    shutil.copyfile(folder / "model-int8.onnx", folder / "model.onnx")


class TestRefusedAfterComparison:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (perturb, "does not compute what"),
            (bind_to_one_shape, "The export does not run"),
            (take_another, "does not compute what"),
        ],
    )
    @pytest.mark.parametrize("name", ["embedding", "nli"])
    def test_a_wrong_file_is_refused_and_nothing_stays(
        self,
        exported: Exported,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        change: Callable[[Path, Path], None],
        said: str,
        name: str,
    ) -> None:
        good, model = exported.encoder(name), exported.model(name)

        def export(_: Path, target: Path, __: str) -> dict[str, str]:
            for file in ("model.onnx", "model-int8.onnx"):
                shutil.copyfile(good / file, target / file)
            change(target, model)
            return {"transformers": "4"}

        monkeypatch.setattr(onnx_environment, "export", export)
        done = convert(model)
        assert done.exit_code == VerificationFailed.exit_code, done.stderr
        assert said in done.stderr
        assert nothing_is_left(root)

    def test_a_checkpoint_that_the_versions_read_differently_is_found(self, root: Path, tmp_path: Path) -> None:
        tiny_encoders.require_environment()
        model = tiny_encoders.save(tmp_path / "model", "modernbert", ("a", "b"))
        facts = json.loads((model / "config.json").read_text())
        assert "rope_parameters" in facts, "transformers 5 is not what it was"
        refused = convert(model)
        assert refused.exit_code == 1
        assert "rope_parameters" in refused.stderr
        assert "Add global_rope_theta and local_rope_theta" in refused.stderr
        (model / "config.json").write_text(json.dumps({**facts, "global_rope_theta": 20.0, "local_rope_theta": 20.0}))
        found = convert(model)
        assert found.exit_code == VerificationFailed.exit_code, found.stderr
        assert "reads the checkpoint wrongly" in found.stderr
        assert nothing_is_left(root)

    def test_other_tokens_are_found(self, exported: Exported) -> None:
        encoder = encoders.Encoder.load(exported.encoder("nli"))
        expected = encoder_check.reference(exported.model("nli"), encoder.settings)
        assert encoder_check.compare(expected, encoder)["same_label_ratio"] > 0
        ids = [*expected.token_ids[:-1], [*expected.token_ids[-1][:-1], 5]]
        with pytest.raises(VerificationFailed, match="other tokens than transformers for 1 of"):
            encoder_check.compare(dataclasses.replace(expected, token_ids=ids), encoder)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, **changes}))

    return apply


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: [None, (folder / name).write_text(text)][0]


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def dense(folder: Path) -> None:
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    path.write_text(json.dumps([*modules, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]))


class TestRefusedBeforehand:
    @pytest.mark.parametrize(
        ("name", "change", "said", "code"),
        [
            ("nli", removed("config.json"), "has no config.json", 1),
            ("nli", written("config.json", "{"), "cannot be read", 1),
            ("nli", written("config.json", "[]"), "holds no JSON object", 1),
            ("nli", truncated, "model.safetensors is damaged", 1),
            ("nli", removed("model.safetensors"), "has no .safetensors file", 1),
            ("nli", pickled, "pytorch_model.bin could carry code", 1),
            (
                "nli",
                written("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
                "b.safetensors is missing",
                1,
            ),
            ("nli", removed("tokenizer.json"), "has no tokenizer.json", 1),
            ("nli", edit("config.json", id2label=["a"]), "say something unheard of", 1),
            ("nli", edit("config.json", max_position_embeddings="many"), "say something unheard of", 1),
            ("embedding", written("modules.json", "[1]"), "say something unheard of", 1),
            ("nli", edit("config.json", model_type="mamba"), "the architecture 'mamba' is not one", 1),
            ("nli", edit("config.json", architectures=["BertLMHeadModel"]), "generative model (BertLMHeadModel)", 1),
            (
                "nli",
                edit("config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"]),
                "`appliance convert gguf`",
                1,
            ),
            ("nli", edit("config.json", architectures=["BertForTokenClassification"]), "is a BertForTokenClassification", 1),
            ("nli", edit("config.json", rope_parameters={"rope_theta": 9.0}), "rope_parameters", 1),
            ("reranker", edit("config.json", sentence_transformers={"activation_fn": "torch.nn.Tanh"}), "not Tanh", 1),
            ("embedding", dense, "ends in a Dense layer", 1),
            ("embedding", removed("1_Pooling/config.json"), "add --pooling", 1),
            ("embedding", edit("1_Pooling/config.json", pooling_mode_cls_token=True), "pooling by cls and mean", 1),
            ("embedding", written("1_Pooling/config.json", '{"pooling_mode": "lasttoken"}'), "pooling by lasttoken", 1),
            ("embedding", edit("1_Pooling/config.json", include_prompt=False), "include_prompt", 1),
            ("embedding", edit("sentence_bert_config.json", do_lower_case=True), "do_lower_case", 1),
            ("embedding", removed("modules.json"), "--pooling mean, cls or max", 2),
        ],
    )
    def test_with_the_reason_and_nothing_is_left(
        self, exported: Exported, root: Path, tmp_path: Path, name: str, change: Callable[[Path], None], said: str, code: int
    ) -> None:
        model = copied(exported.model(name), tmp_path / "model")
        change(model)
        done = convert(model)
        assert (done.exit_code, said in done.stderr) == (code, True), done.stderr
        assert not root.exists()

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("nli", ["--kind", "embedding"], "is a BertForSequenceClassification, which is nli"),
            ("nli", ["--kind", "reranker"], "has 3 labels"),
            ("reranker", ["--kind", "nli"], "has 1 labels"),
            ("nli", ["--labels", "yes,no"], "2 given"),
            ("nli", ["--labels", "a,b,c", "--kind", "nli"], "which of a, b, c means what?"),
            ("nli", ["--labels", "a,,c"], "a label is empty"),
            ("embedding", ["--labels", "a"], "has no classifier"),
            ("embedding", ["--kind", "reranker"], "which is embedding"),
            ("reranker", ["--max-tokens", "65"], "has 64 positions"),
            ("reranker", ["--kind", "other"], "Invalid value"),
        ],
    )
    def test_a_wish_that_does_not_fit_is_a_usage_error(
        self, exported: Exported, root: Path, name: str, options: list[str], said: str
    ) -> None:
        done = convert(exported.model(name), *options)
        assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
        assert not root.exists()

    def test_what_is_no_folder(self, tmp_path: Path) -> None:
        assert "has no config.json" in convert(tmp_path / "nowhere").stderr

    def test_weights_that_are_missing_are_not_made_up(self, exported: Exported, root: Path, tmp_path: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tiny_encoders.require_environment()
        model = copied(exported.model("nli"), tmp_path / "model")
        kept = {name: value for name, value in load_file(model / "model.safetensors").items() if "classifier" not in name}
        save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
        done = convert(model)
        assert done.exit_code == 1
        assert "lacks 2 weights (classifier.bias, classifier.weight)" in done.stderr
        assert not root.exists()

    def test_without_space_nothing_begins(self, exported: Exported, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny_encoders.require_environment()
        model = exported.model("nli")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(free=1000))
        done = convert(model)
        assert done.exit_code == 3
        assert "The export needs" in done.stderr
        assert nothing_is_left(root)


class TestWishes:
    @pytest.mark.parametrize(
        ("name", "wishes", "expected"),
        [
            ("embedding", {"pooling": "cls", "query_prefix": "zoek: "}, {"pooling": "cls", "query_prefix": "zoek: "}),
            ("embedding", {"max_tokens": 20}, {"max_tokens": 20, "passage_prefix": "passage: "}),
            ("nli", {"kind": "classifier"}, {"kind": "classifier", "labels": ("ENTAILMENT", "neutral", "contradiction")}),
            (
                "nli",
                {"labels": ("neutral", "Entailment", "contradiction")},
                {"labels": ("neutral", "entailment", "contradiction")},
            ),
            ("nli", {"labels": ("a", "b", "c")}, {"kind": "classifier", "labels": ("a", "b", "c")}),
        ],
    )
    def test_go_before_files(self, exported: Exported, name: str, wishes: dict[str, Any], expected: dict[str, Any]) -> None:
        settings = encoder_folder.describe(exported.model(name), encoder_folder.Wishes(**wishes))
        assert {key: getattr(settings, key) for key in expected} == expected

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (edit("config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}), "identity"),
            (edit("config.json", sbert_ce_default_activation_function="torch.nn.modules.linear.Identity"), "identity"),
            (edit("config.json", sbert_ce_default_activation_function="torch.nn.modules.activation.Sigmoid"), "sigmoid"),
        ],
    )
    def test_a_rerankers_activation(
        self, exported: Exported, tmp_path: Path, change: Callable[[Path], None], expected: str
    ) -> None:
        model = copied(exported.model("reranker"), tmp_path / "model")
        change(model)
        assert encoder_folder.describe(model, encoder_folder.Wishes()).activation == expected

    def test_several_labels_may_hold_at_once(self, exported: Exported, tmp_path: Path) -> None:
        model = copied(exported.model("nli"), tmp_path / "model")
        edit("config.json", problem_type="multi_label_classification")(model)
        assert encoder_folder.describe(model, encoder_folder.Wishes()).activation == "sigmoid"
