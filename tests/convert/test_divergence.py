"""Divergence by language equals the same sums over whole arrays of logits; only answers count, and the worst come first."""

from typing import Any

import numpy as np
import pytest

from convert import divergence
from convert.divergence import Answer
from convert.gguf_model import GgufModel
from convert.pre_tokenizer import load as load_tokenizer
from tests.running import Trained

MESSAGES = [
    {"role": "user", "content": "Waar is de balie?"},
    {"role": "assistant", "content": "De balie is aan de Lindekade 3, naast de brug."},
    {"role": "user", "content": "Dank je."},
    {"role": "assistant", "content": "Graag gedaan."},
]


@pytest.fixture(scope="module")
def tokenizer(trained: Trained) -> Any:
    return load_tokenizer(trained.made["merge"])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return (
        wide
        - np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        - wide.max(axis=1, keepdims=True)
    )


def test_only_answers_are_measured_each_up_to_its_end(tokenizer: Any) -> None:
    found = divergence.answers(tokenizer, [MESSAGES], 1000)
    texts = [tokenizer.decode(each.tokens[each.start :]) for each in found]
    assert texts == [f"{MESSAGES[turn]['content']}<|im_end|>" for turn in (1, 3)]
    assert divergence.answers(tokenizer, [MESSAGES], len(found[0].tokens)) == found[:1]


def test_sums_are_those_of_whole_arrays(trained: Trained, tokenizer: Any) -> None:
    found = divergence.answers(tokenizer, [MESSAGES], 1000)
    (four,) = trained.made["Q4_K_M"].glob("*.gguf")
    with GgufModel(trained.full, context_tokens=256) as full, GgufModel(four, context_tokens=256) as quantized:
        results, worst = divergence.measure(full, quantized, {"nl": found, "en": found[:1]})
        kls, surprises, same = [], [], []
        for answer in found:
            inputs, first = list(answer.tokens[:-1]), answer.start - 1
            p, q = log_softmax(full.logits(inputs, first)), log_softmax(quantized.logits(inputs, first))
            kls += (np.exp(p) * (p - q)).sum(axis=1).tolist()
            surprises += [-q[row, token] for row, token in enumerate(answer.tokens[answer.start :])]
            same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    dutch = results["nl"]
    assert dutch["tokens"] == len(kls) == sum(len(each.tokens) - each.start for each in found)
    assert dutch["kl_mean"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert dutch["perplexity"] == pytest.approx(np.exp(np.mean(surprises)), rel=1e-4)
    assert dutch["same_top_ratio"] == pytest.approx(np.mean(same))
    assert dutch["kl_error"] == pytest.approx(np.std(kls, ddof=1) / np.sqrt(len(kls)), rel=1e-2)
    assert results["en"]["tokens"] == len(found[0].tokens) - found[0].start
    assert [each["kl"] for each in worst[:1]] == [pytest.approx(max(kls), abs=1e-3)]
    assert len(worst) == 10


def test_a_file_does_not_differ_from_itself(trained: Trained) -> None:
    answer = Answer(list(range(3, 100)), 5)
    with GgufModel(trained.full, context_tokens=256) as full, GgufModel(trained.full, context_tokens=256) as again:
        results, _ = divergence.measure(full, again, {"nl": [answer]})
    assert results["nl"]["kl_mean"] < 1e-6
    assert results["nl"]["same_top_ratio"] == 1.0
    assert results["nl"]["perplexity"] == pytest.approx(results["nl"]["perplexity_f16"], rel=1e-5)
