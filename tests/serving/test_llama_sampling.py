"""Sampling settings and grammars at work in the real llama.cpp, with a tiny random model."""

import json
import math
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as c

from appliance.errors import EngineFailed, RequestError
from appliance.serving.decoder import IDLE_CHUNK_TOKENS, Feed
from appliance.serving.llama import Context, sampler
from appliance.serving.llama.sampler import Candidates, SlotSampler
from appliance.serving.requests import Grammar, GrammarKind, SamplingSettings
from appliance.serving.sampling import Penalties, without_hopeless
from tests import tiny_gguf
from tests.serving.llama_decoding import ALL, GREEDY, PROMPT, decode, generate, logprobs, open_context, text_of

HOT = SamplingSettings(temperature=1.0, seed=3)
END = tiny_gguf.vocabulary().index("<|im_end|>")
COMPACT = {"x-guidance": {"whitespace_flexible": False}}  # white space without end is valid JSON too


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    context = open_context(tiny_gguf.write(tmp_path_factory.mktemp("llama") / "tiny.gguf"), context_tokens=1024)
    yield context
    context.close()


def tokens_of(context: Context, sampling: SamplingSettings, **how: Any) -> list[int]:
    return [each.token for each in generate(context, sampling, **how)]


def test_settings_reach_llama(context: Context) -> None:
    greedy, hot = tokens_of(context, GREEDY), tokens_of(context, HOT)
    assert tokens_of(context, HOT) == hot != tokens_of(context, SamplingSettings(temperature=1.0, seed=4))
    for changes in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tokens_of(context, SamplingSettings(temperature=2.0, seed=1, **changes)) == greedy
    for changes in ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, {"repeat_penalty": 5.0}):
        penalized = tokens_of(context, SamplingSettings(**changes))
        assert len(set(penalized)) == len(penalized), "with so much against it no token comes twice"
    assert len(set(greedy)) < len(greedy)
    assert len({tuple(tokens_of(context, SamplingSettings(temperature=1.0), tokens=8)) for _ in range(5)}) > 1


@pytest.mark.parametrize("temperature", [1e-5, 1e-37, 1e-40, 1e-45, 1e-300])
def test_almost_no_temperature_is_none(context: Context, temperature: float) -> None:
    assert tokens_of(context, SamplingSettings(temperature=temperature, seed=1)) == tokens_of(context, GREEDY)


@pytest.mark.parametrize("penalty", [1e-39, 1e-300])
@pytest.mark.filterwarnings("error")
def test_reward_for_repeating_stays_a_number(context: Context, penalty: float) -> None:
    told = tokens_of(context, SamplingSettings(repeat_penalty=penalty))
    assert len(told) == 24
    assert told[-1] in told[:-1], "what has come once is likelier than all else"


def test_slots_do_not_share_a_random_source(context: Context) -> None:
    alone = tokens_of(context, HOT, tokens=3)
    for slot in range(3):
        context.start(slot, HOT, None, None)
    told: dict[int, list[int]] = {slot: [] for slot in range(3)}
    feeds = [Feed(slot, PROMPT, 0, is_sampled=True) for slot in range(3)]
    for step in range(3):
        for slot, found in decode(context, feeds).items():
            told[slot].append(found[0].token)
        feeds = [Feed(slot, told[slot][-1:], len(PROMPT) + step, is_sampled=True) for slot in range(3)]
    context.clear()
    assert all(tokens == alone for tokens in told.values())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 19), max_size=30),
    st.floats(1.0, 2.0),
    st.floats(-2.0, 2.0),
    st.floats(-2.0, 2.0),
    st.lists(st.floats(-20, 20, width=32), min_size=20, max_size=20),
)
def test_penalties_equal_those_of_llama(
    came: list[int], repeat: float, frequency: float, presence: float, values: list[float]
) -> None:
    native = c.llama_sampler_init_penalties(20, 64, repeat, frequency, presence)
    ours = Penalties(repeat=repeat, frequency=frequency, presence=presence)
    for token in came:
        ours.add(token)
        c.llama_sampler_accept(native, token)
    logits = np.array(values, dtype=np.float32)
    data = (c.llama_token_data * 20)(*((token, value, 0.0) for token, value in enumerate(values)))
    array = c.llama_token_data_array(data=data, size=20, selected=-1, sorted=False)
    c.llama_sampler_apply(native, array)
    c.llama_sampler_free(native)
    ours.apply(logits)
    np.testing.assert_allclose(logits, [each.logit for each in data], rtol=1e-4, atol=1e-5)


def test_drawn_tokens_have_the_distribution_of_the_temperature() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    sampler = SlotSampler(HOT, candidates=Candidates(3), end_tokens=np.array([2]), gate=None, top_logprobs=None)
    drawn = np.bincount([sampler.sample(logits.copy()).token for _ in range(3000)]) / 3000
    sampler.close()
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.2], atol=0.04)


@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_p": 0.5, "temperature": 0.9}])
def test_leaving_out_hopeless_tokens_changes_no_draw(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    rows = random.normal(0.0, 2.5, (40, 20_000)).astype(np.float32)
    rows += (random.random(rows.shape) < 1e-3) * random.uniform(0.0, 30.0, rows.shape).astype(np.float32)
    sampling = SamplingSettings(**({"temperature": 0.7} | more), seed=5)
    sizes: list[int] = []

    def drawn() -> list[int]:
        slot = SlotSampler(sampling, candidates=Candidates(20_000), end_tokens=ALL, gate=None, top_logprobs=None)
        tokens = [slot.sample(row.copy()).token for row in rows]
        slot.close()
        return tokens

    def noted(ids: Any, values: Any, temperature: float) -> Any:
        left = without_hopeless(ids, values, temperature)
        sizes.append(len(left[0]))
        return left

    monkeypatch.setattr(sampler, "without_hopeless", noted)
    trimmed = drawn()
    assert sum(sizes) < 0.5 * rows.size, "nothing was left out, so nothing is shown"
    monkeypatch.setattr(sampler, "without_hopeless", lambda ids, values, temperature: (ids, values))  # noqa: ARG005
    assert trimmed == drawn()


def test_log_probabilities_are_of_the_model_and_not_of_the_settings(context: Context) -> None:
    for sampling in (GREEDY, SamplingSettings(temperature=3.0, seed=1, logit_bias={7: 100.0}, repeat_penalty=2.0)):
        for each in generate(context, sampling, tokens=6, top_logprobs=4):
            assert each.logprob is not None
            assert len(each.top) == 4
            assert [logprob for _, logprob in each.top] == sorted((logprob for _, logprob in each.top), reverse=True)
            assert sum(math.exp(logprob) for _, logprob in each.top) <= 1.0
            if sampling == GREEDY:
                assert (each.token, each.logprob) == each.top[0]
            else:
                assert each.token == 7
                assert each.logprob < each.top[0][1]
    assert all(each.top == () and each.logprob is not None for each in generate(context, tokens=2, top_logprobs=0))
    assert math.isclose(np.exp(logprobs(context, PROMPT)).sum(), 1.0, rel_tol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_forces_and_forbids(context: Context, temperature: float) -> None:
    free = tokens_of(context, SamplingSettings(temperature=temperature, seed=1))
    banned = dict.fromkeys(free, -100.0)
    assert not set(free) & set(tokens_of(context, SamplingSettings(temperature=temperature, seed=1, logit_bias=banned)))
    forced = tokens_of(context, SamplingSettings(temperature=temperature, seed=1, logit_bias={65: 100.0}))
    assert set(forced) == {65}


def test_bias_on_a_token_that_does_not_exist_is_refused(context: Context) -> None:
    for refuse in (context.check_sampling, lambda sampling: context.start(0, sampling, None, None)):
        with pytest.raises(RequestError, match="token id 99999 does not exist; this model's ids are 0 to 263"):
            refuse(SamplingSettings(logit_bias={5: 1.0, 99999: 1.0}))


def test_values_that_are_no_numbers_are_an_error() -> None:
    sampler = SlotSampler(GREEDY, candidates=Candidates(3), end_tokens=np.array([2]), gate=None, top_logprobs=None)
    for bad in (np.nan, np.inf):
        with pytest.raises(EngineFailed, match="no numbers"):
            sampler.sample(np.array([0.0, bad, 1.0], dtype=np.float32))
    sampler.close()


GBNF = 'root ::= pair ("," pair)*\npair ::= key ":" [0-9]{1,3}\nkey ::= "a" | "b\\u00e9"\n'


@pytest.mark.parametrize(
    ("kind", "source", "texts"),
    [
        ("regex", "(yes|no) [0-9]{3}", r"(yes|no) \d{3}"),
        ("lark", 'start: "<" WORD ">"\nWORD: /[a-c]{2}/\n', r"<[a-c]{2}>"),
        ("gbnf", GBNF, r"(a|bé):\d{1,3}(,(a|bé):\d{1,3})*"),
        ("json_schema", json.dumps({"enum": ["red", 5, None], **COMPACT}), r'"red"|5|null'),
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_each_kind_of_grammar_binds_the_whole_answer(
    context: Context, kind: GrammarKind, source: str, texts: str, sampling: SamplingSettings
) -> None:
    import re

    compiled = context.compile(Grammar(kind=kind, source=source))
    for top in (None, 2):
        told = generate(context, sampling, grammar=compiled, tokens=300, top_logprobs=top)
        assert context.is_end(told[-1].token)
        assert re.fullmatch(texts, text_of(context, told))


def test_decided_text_is_forced_and_not_sampled(context: Context) -> None:
    compiled = context.compile(Grammar(kind="regex", source="(a|b)the use of it!"))
    context.start(0, GREEDY, compiled, None)
    first = decode(context, [Feed(0, PROMPT, 0, is_sampled=True)])[0][0]
    forced = context.forced(0)
    assert context.piece(first.token) in (b"a", b"b")
    assert b"".join(map(context.piece, forced)) == b"the use of it!"
    assert context.is_end(forced[-1])
    assert context.forced(0) == []
    context.start(0, GREEDY, compiled, 1)
    assert context.forced(0) == []
    context.release(0)


def test_long_decided_text_comes_in_parts(context: Context) -> None:
    grammar = context.compile(Grammar(kind="regex", source="(ab){500}"))
    context.start(0, GREEDY, grammar, None)
    decode(context, [Feed(0, PROMPT, 0, is_sampled=True)])
    assert len(context.forced(0)) == IDLE_CHUNK_TOKENS
    context.release(0)
    assert text_of(context, generate(context, grammar=grammar, tokens=2000)) == "ab" * 500


schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -5, "maximum": 250},
            {"type": "boolean"},
            {"type": "string", "maxLength": 8},
            {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"},
            {"enum": ["a", 1, None]},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": ["string", "null"], "maxLength": 3},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda each: {"type": "array", "items": each, "minItems": 1, "maxItems": 3}, inner),
        st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner),
        st.builds(
            lambda one, two: {
                "type": "object",
                "properties": {"one": one, "two ü": two},
                "required": ["one"],
                "additionalProperties": False,
            },
            inner,
            inner,
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schemas, st.integers(0, 1000))
def test_answer_bound_by_a_schema_is_valid(context: Context, schema: dict[str, Any], seed: int) -> None:
    compiled = context.compile(Grammar(kind="json_schema", source=json.dumps({**schema, **COMPACT})))
    told = generate(context, SamplingSettings(temperature=1.0, seed=seed), grammar=compiled, tokens=230, prompt=[65])
    assert not told[-1].failure
    if context.is_end(told[-1].token):  # numbers may have very many digits
        jsonschema_rs.validate(schema, json.loads(text_of(context, told)))


def test_text_is_free_before_the_marker_and_after_the_grammar(context: Context) -> None:
    steer = SamplingSettings(temperature=1.0, seed=3, logit_bias={ord("<"): 4.0, ord("|"): 4.0, END: -100.0})
    compiled = context.compile(Grammar(kind="regex", source="[xyz]{5}", after="<|"))
    text = text_of(context, generate(context, steer, grammar=compiled, tokens=200))
    before, *calls = text.split("<|")
    assert len(calls) >= 2, "the marker came several times"
    assert before
    for call in calls[:-1]:
        assert set(call[:5]) <= set("xyz")
    assert any(len(call) > 5 for call in calls), "free again after the grammar"


def test_token_that_ends_the_marker_and_breaks_the_grammar_is_not_taken(context: Context) -> None:
    words = tiny_gguf.vocabulary()
    steer = SamplingSettings(logit_bias={words.index("use"): 100.0, words.index("us"): 50.0})
    compiled = context.compile(Grammar(kind="regex", source="sx", after="u", is_last=True))
    assert text_of(context, generate(context, steer, grammar=compiled)) == "usx"


def test_answer_cannot_end_before_a_marker_that_is_required(context: Context) -> None:
    eager = SamplingSettings(temperature=1.0, seed=3, logit_bias={END: 100.0, ord("<"): 5.0})
    for is_required, ends_at in ((False, ""), (True, "<")):
        grammar = Grammar(kind="regex", source="ok", after="<", is_required=is_required)
        text = text_of(context, generate(context, eager, grammar=context.compile(grammar), tokens=100))
        assert text.endswith("<ok" if is_required else "")
        assert (ends_at in text) == is_required or not is_required


def test_last_grammar_ends_the_answer(context: Context) -> None:
    steer = SamplingSettings(temperature=1.0, seed=3, logit_bias={ord("<"): 5.0, END: -100.0})
    for is_last in (True, False):
        compiled = context.compile(Grammar(kind="regex", source="ok", after="<", is_last=is_last))
        told = generate(context, steer, grammar=compiled, tokens=60)
        assert context.is_end(told[-1].token) == is_last
        assert text_of(context, told).endswith("<ok") or not is_last


def test_grammar_that_leaves_nothing_fails_this_answer_alone(context: Context) -> None:
    digits = context.compile(Grammar(kind="regex", source="[0-9]{3}"))
    no_digit = SamplingSettings(logit_bias=dict.fromkeys(b"0123456789", -100.0))
    context.start(0, no_digit, digits, None)
    context.start(1, GREEDY, digits, None)
    found = decode(context, [Feed(slot, PROMPT, 0, is_sampled=True) for slot in (0, 1)])
    assert found[0][0].failure == "The grammar cannot go on: the logit biases forbid every token that fits"
    assert context.is_end(found[0][0].token)
    assert found[1][0].failure is None
    assert context.piece(found[1][0].token) in [bytes([digit]) for digit in b"0123456789"]
    context.clear()


def test_vocabulary_is_read_as_it_is_spoken(context: Context) -> None:
    """A control token inside a grammar's text would be silent, so no grammar takes one for its text."""
    compiled = context.compile(Grammar(kind="regex", source="<.im_start.>"))
    told = generate(context, GREEDY, grammar=compiled, tokens=40)
    assert text_of(context, told)[:1] == "<"
    assert all(context.piece(each.token) for each in told[:-1])
    assert ALL == 264
