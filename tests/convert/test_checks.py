"""Each check of a 16-bit file, given one thing that is wrong: it is found, and named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.errors import VerificationFailed
from convert import checks, conversations
from convert.gguf_model import GgufVocabulary
from convert.mapped_model import MappedModel
from convert.pre_tokenizer import load as load_tokenizer
from tests.running import Trained


@pytest.fixture(scope="module")
def tokenizer(trained: Trained) -> Any:
    return load_tokenizer(trained.made["merge"])


def rows(trained: Trained) -> list[conversations.Messages]:
    return conversations.read(trained.made["data"] / "sft.jsonl")


class Changed:
    """A file's vocabulary in which one answer is another one."""

    def __init__(self, real: GgufVocabulary, **changes: Any) -> None:
        self._real, self._changes = real, changes

    def __getattr__(self, name: str) -> Any:
        return self._changes.get(name, getattr(self._real, name))


def test_what_is_right_passes_everything(trained: Trained, tokenizer: Any) -> None:
    expected = checks.renderings(tokenizer, rows(trained))
    with GgufVocabulary(trained.full) as gguf:
        assert checks.compare_vocabulary(gguf, tokenizer, gguf.token_count) == []
        assert checks.compare_tokens(gguf, expected) == []
        assert checks.compare_end_of_turn(gguf, tokenizer, expected) == []
        assert checks.compare_torture(gguf, tokenizer) == []


def test_each_wrong_answer_is_found(trained: Trained, tokenizer: Any) -> None:
    expected = checks.renderings(tokenizer, rows(trained))
    with GgufVocabulary(trained.full) as gguf:
        no_end = Changed(gguf, is_end=lambda _: False)
        (problem,) = checks.compare_end_of_turn(no_end, tokenizer, expected)  # type: ignore[arg-type]
        assert "it would write on and on" in problem
        deaf = Changed(gguf, tokenize=lambda text: gguf.tokenize(text.replace("  ", " ")))
        assert any("token ids against" in each for each in checks.compare_torture(deaf, tokenizer))  # type: ignore[arg-type]
        mute = Changed(gguf, detokenize=lambda ids: gguf.detokenize(ids).replace("ż", "z"))
        problems = checks.compare_torture(mute, tokenizer)  # type: ignore[arg-type]
        assert problems
        assert all("comes back as" in each for each in problems)
        wider = checks.compare_vocabulary(gguf, tokenizer, gguf.token_count + 1)
        assert wider == [f"the file has {gguf.token_count} tokens, the model {gguf.token_count + 1}"]


def test_the_same_ids_and_another_text_are_found(trained: Trained, tokenizer: Any) -> None:
    expected = checks.renderings(tokenizer, rows(trained))
    with GgufVocabulary(trained.full) as gguf:
        ids = {each.text: each.token_ids for each in expected}
        source = str(gguf.metadata("tokenizer.chat_template")).replace("assistant", "assist_nt")
        careless = Changed(
            gguf,
            metadata=lambda key: source if key == "tokenizer.chat_template" else gguf.metadata(key),
            tokenize=lambda text: ids.get(text.replace("assist_nt", "assistant"), []),
        )
        problems = checks.compare_tokens(careless, expected)  # type: ignore[arg-type]
    assert len(problems) == 6
    assert "the same ids, and another text from character" in problems[0]


VARIED = (
    "{% if messages[0]['role'] == 'system' %}{{ 'Rules: ' + messages[0]['content'] + '\n' }}{% endif %}"
    "{% if tools %}{{ 'Tools: ' + tools[0]['function']['name'] + '\n' }}{% endif %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("branch", "said"), [("Rules", "with a system message"), ("Tools", "with tools")])
def test_wrong_branch_of_the_template_is_named(trained: Trained, branch: str, said: str) -> None:
    """What only a system message, or tools, would show."""
    tokenizer = load_tokenizer(trained.made["merge"])
    tokenizer.chat_template = VARIED
    expected = checks.renderings(tokenizer, rows(trained)[:1])
    with GgufVocabulary(trained.full) as gguf:
        for source, problems in ((VARIED, []), (VARIED.replace(branch, "Rulez"), [f"conversation 1 {said}: "])):
            served = Changed(gguf, metadata=lambda _, source=source: source)
            found = checks.compare_tokens(served, expected)  # type: ignore[arg-type]
            assert [each[: len(start)] for each, start in zip(found, problems, strict=True)] == problems


def test_text_that_comes_back_otherwise_is_found(trained: Trained, tokenizer: Any) -> None:
    expected = checks.renderings(tokenizer, rows(trained)[:2])
    with GgufVocabulary(trained.full) as gguf:
        assert checks.compare_texts(gguf, tokenizer, expected) == []
        mute = Changed(gguf, detokenize=lambda ids: gguf.detokenize(ids).replace("brug", "BRUG"))
        (problem,) = checks.compare_texts(mute, tokenizer, expected)  # type: ignore[arg-type]
    assert problem.startswith("conversation 1 comes back as")
    assert "BRUG" in problem


def test_only_logits_of_the_answer_are_computed(trained: Trained) -> None:
    """Of a prompt of 600 tokens and a vocabulary of 152,000 they would take 365 MB."""
    model = MappedModel(trained.made["merge"])
    path = checks.AnswerPath(list(range(3, 40)), 30)
    head, seen = model.module.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    found = checks.expected_logits(model, path)
    assert seen == [7]
    np.testing.assert_allclose(found, model.logits(path.tokens[:-1])[29:], rtol=1e-4, atol=1e-5)


def test_norms_that_converters_change(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 1 is added the values are compared with it; what is changed in another way is not compared, and counted."""
    model = MappedModel(trained.made["merge"])
    problems, counts = checks.compare_weights(trained.full, model)
    assert (problems, counts) == ([], {"matrices": 15, "vectors": 9, "not_compared": 0})
    monkeypatch.setattr(checks, "ONE_MORE", {"Qwen3ForCausalLM"})
    problems, _ = checks.compare_weights(trained.full, model)
    assert len(problems) == 9
    assert all("is not the model's: its values from" in each for each in problems)
    monkeypatch.setattr(checks, "CHANGED_NORMS", {"Qwen3ForCausalLM"})
    problems, counts = checks.compare_weights(trained.full, model)
    assert (problems, counts) == ([], {"matrices": 15, "vectors": 0, "not_compared": 9})
    monkeypatch.setattr(checks, "SCALING", {"Qwen3ForCausalLM"})
    assert checks.compare_weights(trained.full, model)[1] == {"matrices": 0, "vectors": 0, "not_compared": 25}


def test_logits_are_judged() -> None:
    generator = np.random.default_rng(1)
    right = generator.normal(size=(9, 50)).astype(np.float32)
    near = right + generator.normal(size=right.shape, scale=1e-4).astype(np.float32)
    assert checks.judge_paths(checks.compare_paths([near], [right], 1e-3)) == []
    off = near.copy()
    off += generator.normal(size=off.shape, scale=0.01).astype(np.float32)
    off[np.arange(9), right.argmax(axis=1)] += 0.5
    assert "of their spread" in checks.judge_paths(checks.compare_paths([off], [right], 1e-3))[0]
    other = near.copy()
    other[2, right[2].argmin()] = right[2].max() + 1
    assert "top token differs" in checks.judge_paths(checks.compare_paths([other], [right], 1e-3))[0]
    flat = np.zeros_like(right)
    assert "no step could be judged" in checks.judge_paths(checks.compare_paths([flat], [flat], 1e-3))[0]
    broken = near.copy()
    broken[0, 0] = np.nan
    with pytest.raises(VerificationFailed, match="no numbers"):
        checks.compare_paths([broken], [right], 1e-3)


def test_greedy_path_is_the_text_that_both_write(trained: Trained, tokenizer: Any) -> None:
    """Where top tokens agree along the file's path, transformers' own greedy text is that path."""
    import torch
    from transformers import AutoModelForCausalLM

    from convert.gguf_model import GgufModel

    prompt = next(each.token_ids for each in checks.renderings(tokenizer, rows(trained)) if each.is_prompt)
    with GgufModel(trained.full, context_tokens=256) as gguf:
        (path,) = checks.greedy_paths(gguf, [prompt], 24)
    model = AutoModelForCausalLM.from_pretrained(trained.made["merge"], dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert written[0].tolist() == list(path.tokens)
    assert path.prompt_tokens == len(prompt)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    from appliance.errors import ModelFileError

    with pytest.raises(ModelFileError, match="no tokenizer"):
        load_tokenizer(tmp_path)
