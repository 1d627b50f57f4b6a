"""Each check of a 16-bit file, given one thing that is wrong: it is found, and named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.errors import VerificationFailed
from convert import checks, conversations
from convert.gguf_model import GgufVocabulary
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
