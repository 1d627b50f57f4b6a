"""The decoder over the real llama.cpp with a tiny random model: batches, shared cells, adapters, drafts, abort."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import EngineFailed, ModelFileError
from appliance.serving.decoder import MAX_DRAFT_TOKENS, Adapter, Feed, Sampled, SnapshotRefused
from appliance.serving.llama import Context, Model, library
from appliance.serving.requests import Grammar, SamplingSettings
from tests import tiny_gguf
from tests.serving.llama_decoding import (
    ALL,
    GREEDY,
    PROMPT,
    Drafter,
    decode,
    engine_settings,
    generate,
    in_order,
    logprobs,
    open_context,
    open_model,
)

SAME = 0.02  # flash attention adds up in f16, and in another order when cells lie elsewhere
OTHER = 0.5
A, B = Adapter("a", 1.0), Adapter("b", 1.0)
LONG = PROMPT * 5  # read by itself
LETTERS = Grammar(kind="regex", source="([a-f]{1,3} ){30}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_gguf.write(folder / "tiny.gguf")
    tiny_gguf.write_adapter(folder / "a.gguf", seed=1)
    tiny_gguf.write_adapter(folder / "b.gguf", seed=2)
    return folder


@pytest.fixture(scope="module")
def context(folder: Path) -> Iterator[Context]:
    adapters = {name: str(folder / f"{name}.gguf") for name in ("a", "b")}
    context = open_context(folder / "tiny.gguf", adapters=adapters)
    yield context
    context.close()


@pytest.fixture(autouse=True)
def _empty(context: Context) -> Iterator[None]:
    yield
    context.clear()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def test_sizes(context: Context) -> None:
    assert (context.slots, context.context_tokens, context.cells) == (3, 256, 1024)
    assert context.sequences > context.slots
    assert context.can_share
    assert context.cell_bytes == tiny_gguf.LAYERS * 2 * tiny_gguf.KV_HEADS * tiny_gguf.HEAD_WIDTH * 2


def test_prompt_in_chunks_among_others_equals_prompt_alone(context: Context) -> None:
    prompt = PROMPT * 8
    alone = logprobs(context, prompt)
    context.start(0, GREEDY, None, ALL)
    context.start(1, GREEDY, None, None)
    context.start(2, GREEDY, None, ALL)
    decode(context, [Feed(1, PROMPT, 0, is_sampled=True), Feed(0, prompt[:50], 0, is_sampled=False)])
    parts = [
        Feed(0, prompt[50:], 50, is_sampled=True),
        Feed(2, prompt, 0, is_sampled=True),
        Feed(1, [7], 17, is_sampled=True),
    ]
    found = decode(context, parts)
    assert difference(in_order(found[0][0]), alone) < SAME
    assert difference(in_order(found[2][0]), alone) < SAME
    context.clear()
    assert difference(logprobs(context, PROMPT), alone) > OTHER


def test_adapter_is_the_same_whatever_ran_before(context: Context) -> None:
    plain, a = logprobs(context, PROMPT), logprobs(context, PROMPT, adapter=A)
    assert difference(plain, a) > OTHER
    context.start(1, GREEDY, None, None)
    decode(context, [Feed(1, PROMPT, 0, is_sampled=True)], B)
    assert difference(logprobs(context, PROMPT, adapter=A), a) < SAME
    assert difference(logprobs(context, PROMPT, adapter=B), a) > OTHER
    assert difference(logprobs(context, PROMPT), plain) < SAME
    weak, none = (logprobs(context, PROMPT, adapter=Adapter("a", scale)) for scale in (0.5, 0.0))
    assert difference(weak, a) > SAME < difference(weak, plain)
    assert difference(none, plain) < SAME


def test_prefix_computed_with_another_adapter_would_be_wrong(context: Context) -> None:
    """Why a sequence is computed with one adapter throughout: the cells remember it."""
    a = logprobs(context, PROMPT, adapter=A)
    context.start(0, GREEDY, None, ALL)
    decode(context, [Feed(0, PROMPT[:-1], 0, is_sampled=False)], B)
    mixed = decode(context, [Feed(0, PROMPT[-1:], len(PROMPT) - 1, is_sampled=True)], A)
    assert difference(in_order(mixed[0][0]), a) > OTHER


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.99, 0.9999])
def test_truncated_adapter_is_named(folder: Path, share: float) -> None:
    whole = (folder / "a.gguf").read_bytes()
    cut = folder / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelFileError, match=str(cut)):
        open_context(folder / "tiny.gguf", adapters={"cut": str(cut)})


def test_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    whole = (folder / "a.gguf").read_bytes()
    for file in (whole.replace(b"qwen3", b"llama"), whole.replace(b"blk.1", b"blk.9")):
        other.write_bytes(file)
        with pytest.raises(ModelFileError, match=f"{other} cannot be used as an adapter"):
            open_context(folder / "tiny.gguf", adapters={"other": str(other)})
    with pytest.raises(ModelFileError, match="is a model, not a LoRA adapter"):
        open_context(folder / "tiny.gguf", adapters={"other": str(folder / "tiny.gguf")})


def test_copied_cells_are_as_good_as_computed_ones(context: Context) -> None:
    expected = logprobs(context, PROMPT)
    parked = context.sequences - 1
    context.start(0, GREEDY, None, None)
    decode(context, [Feed(0, PROMPT, 0, is_sampled=True)])
    context.copy(0, parked, 0, 10)
    context.release(0)
    for slot in (2, 1):
        context.copy(parked, slot, 0, 10)
        context.start(slot, GREEDY, None, ALL)
        found = decode(context, [Feed(slot, PROMPT[10:], 10, is_sampled=True)])
        assert difference(in_order(found[slot][0]), expected) < SAME
    context.remove(parked, 0, -1)


def test_saved_cells_are_as_good_as_computed_ones(context: Context, folder: Path) -> None:
    expected = logprobs(context, PROMPT)
    parked = context.slots
    context.start(0, GREEDY, None, None)
    decode(context, [Feed(0, PROMPT[:10], 0, is_sampled=False)])
    context.copy(0, parked, 0, 10)
    saved = context.save(parked)
    assert len(saved) == len(context.save(0))
    assert saved == context.save(parked), "saving changes nothing"
    context.clear()
    other = open_context(folder / "tiny.gguf")
    for each in (context, other):
        each.restore(each.sequences - 1, saved)
        each.copy(each.sequences - 1, 1, 0, 10)
        each.start(1, GREEDY, None, ALL)
        found = decode(each, [Feed(1, PROMPT[10:], 10, is_sampled=True)])
        assert difference(in_order(found[1][0]), expected) < SAME
    other.close()


def test_a_part_comes_back_at_its_place(context: Context) -> None:
    """Behind others, cells mean what they meant: the logits of the whole, and the same bytes."""
    context.start(0, GREEDY, None, ALL)
    whole = decode(context, [Feed(0, PROMPT, 0, is_sampled=True)])
    expected = in_order(whole[0][0])
    first, second = context.slots, context.slots + 1
    context.copy(0, first, 0, 6)
    context.copy(0, second, 6, 10)
    parts = [bytes(context.save(first)), bytes(context.save(second))]
    context.clear()
    for target, part in zip((second, first), parts, strict=True):
        context.restore(target, part)
        assert bytes(context.save(target)) == part
    context.copy(second, 1, 0, 6)
    context.copy(first, 1, 6, 10)
    context.start(1, GREEDY, None, ALL)
    found = decode(context, [Feed(1, PROMPT[10:], 10, is_sampled=True)])
    assert difference(in_order(found[1][0]), expected) < SAME


def test_saved_cells_that_do_not_fit_are_refused(context: Context, folder: Path) -> None:
    context.start(0, GREEDY, None, None)
    decode(context, [Feed(0, PROMPT * 8, 0, is_sampled=False)])
    saved = context.save(0)
    context.release(0)
    quantized = open_context(folder / "tiny.gguf", kv_type="q8_0", cells=256)
    small = open_context(folder / "tiny.gguf", cells=256)
    small.start(0, GREEDY, None, None)
    decode(small, [Feed(0, PROMPT * 9, 0, is_sampled=False)])
    for each, data in ((context, b""), (context, b"x" * 500), (context, saved[:-100]), (quantized, saved), (small, saved)):
        with pytest.raises(SnapshotRefused):
            each.restore(each.slots, data)
        assert len(each.save(each.slots)) == len(each.save(each.slots + 1)), "cells were left behind"
    assert quantized.cell_bytes == context.cell_bytes * 34 // 64
    quantized.close()
    small.close()


def sometimes_wrong(truth: Sequence[int]) -> Drafter:
    """Drafts of the true tokens, every fifth of them spoilt."""

    def draft(told: Sequence[int]) -> Sequence[int]:
        ahead = truth[len(told) : len(told) + MAX_DRAFT_TOKENS]
        return [token if (len(told) + number) % 5 else (token + 1) % 200 for number, token in enumerate(ahead)]

    return draft


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingSettings(temperature=1.0, seed=5, top_p=0.9, top_k=50),
        SamplingSettings(temperature=0.7, seed=6, presence_penalty=1.0, repeat_penalty=1.2, logit_bias={97: 2.0}),
    ],
)
@pytest.mark.parametrize("grammar", [None, LETTERS])
def test_drafts_change_nothing(context: Context, sampling: SamplingSettings, grammar: Grammar | None) -> None:
    compiled = None if grammar is None else context.compile(grammar)
    truth = [each.token for each in generate(context, sampling, grammar=compiled, tokens=40)]
    drafted = generate(context, sampling, grammar=compiled, tokens=40, drafts=sometimes_wrong(truth))
    assert [each.token for each in drafted][:40] == truth[:40]


def test_sequence_after_rejected_drafts_is_clean(context: Context) -> None:
    context.start(0, GREEDY, None, ALL)
    first = decode(context, [Feed(0, [*PROMPT, 1, 2, 3], 0, is_sampled=True, drafted=3)])[0]
    assert len(first) == 1
    assert difference(in_order(first[0]), logprobs(context, PROMPT, slot=1)) < SAME
    second = decode(context, [Feed(0, [first[0].token], len(PROMPT), is_sampled=True)])[0]
    assert difference(in_order(second[0]), logprobs(context, [*PROMPT, first[0].token], slot=1)) < SAME


def test_more_drafts_than_there_are_rows_are_left_out(folder: Path) -> None:
    context = open_context(folder / "tiny.gguf", slots=8, cells=2048)
    truth = [each.token for each in generate(context, tokens=12)]
    for slot in range(8):
        context.start(slot, GREEDY, None, None)
    drafts = truth[:MAX_DRAFT_TOKENS]
    feeds = [Feed(slot, [*PROMPT, *drafts], 0, is_sampled=True, drafted=len(drafts)) for slot in range(8)]
    found = decode(context, feeds)
    assert [len(found[slot]) for slot in range(8)] == [9] * 4 + [1] * 4
    assert all([each.token for each in found[slot]] == truth[: len(found[slot])] for slot in range(8))
    context.close()


def test_too_large_a_batch_is_an_error_and_not_a_crash(context: Context) -> None:
    limit = 3 * (1 + MAX_DRAFT_TOKENS) + 256
    with pytest.raises(EngineFailed, match=f"{limit + 1} tokens was asked for; the limit is {limit}"):
        context.decode([Feed(0, [1] * (limit + 1), 0, is_sampled=False)], None)


def test_full_memory_is_an_error_and_the_rest_goes_on(folder: Path) -> None:
    context = open_context(folder / "tiny.gguf", cells=256)
    context.start(0, GREEDY, None, None)
    decode(context, [Feed(0, [5] * 200, 0, is_sampled=True)])
    with pytest.raises(EngineFailed, match="could not compute"):
        context.decode([Feed(1, [5] * 200, 0, is_sampled=False)], None)
    assert decode(context, [Feed(0, [5], 200, is_sampled=True)])[0]
    context.close()


def test_abort_leaves_a_usable_context(context: Context) -> None:
    prompt = list(range(250))
    expected = generate(context, prompt=prompt, tokens=1)
    is_over = threading.Event()

    def insist() -> None:
        while not is_over.wait(0.0001):
            context.abort()

    thread = threading.Thread(target=insist)
    thread.start()
    context.start(1, GREEDY, None, None)
    results = [context.decode([Feed(1, prompt[:200], 0, is_sampled=True)], None)]
    while results[-1] is not None and len(results) < 50:
        context.remove(1, 0, -1)
        results.append(context.decode([Feed(1, prompt[:200], 0, is_sampled=True)], None))
    is_over.set()
    thread.join()
    context.release(1)
    assert results[-1] is None
    assert generate(context, prompt=prompt, tokens=1) == expected


def both(context: Context, seed: int) -> tuple[Sequence[Sampled], Sequence[Sampled]] | None:
    """The last token of a prompt of slot 1 and an answer in slot 0, in one step; None when it was aborted."""
    drawn, size = SamplingSettings(temperature=1.0, seed=seed), len(LONG)
    for slot in (0, 1):
        context.start(slot, drawn, None, None)
    context.decode([Feed(0, LONG[:-1], 0, is_sampled=False)], None)
    step = [Feed(0, LONG[-1:], size - 1, is_sampled=True), Feed(1, LONG, 0, is_sampled=True)]
    if (told := context.decode(step, None)) is None:
        context.remove(0, size - 1, -1)
        context.remove(1, 0, -1)
        told = context.decode(step, None)
    return None if told is None else (told[0], told[1])


@pytest.mark.parametrize("seed", range(5))
def test_text_beside_answers_says_what_it_says_alone(context: Context, seed: int) -> None:
    told = both(context, seed)
    alone = generate(context, SamplingSettings(temperature=1.0, seed=seed), prompt=LONG, tokens=1, slot=2)
    assert told is not None
    assert [list(slot) for slot in told] == [list(alone)] * 2


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_drawn_of_a_step_that_is_aborted_halfway(
    context: Context, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = both(context, seed)
    context.clear()
    calls = itertools.count(1)
    real = library.c.llama_decode
    monkeypatch.setattr(
        library.c, "llama_decode", lambda *given: library.DECODE_ABORTED if next(calls) == 3 else real(*given)
    )
    assert both(context, seed) == expected
    assert next(calls) == 6  # the first text, a step whose second pass was aborted, and both passes again


def test_repacked_and_read_weights_compute_the_same(folder: Path) -> None:
    path = folder / "tiny.gguf"
    mapped = Context(open_model(path), engine_settings(path))
    copied = Context(Model(path, is_mapped=False, is_repacked=True), engine_settings(path))
    assert difference(logprobs(mapped, PROMPT), logprobs(copied, PROMPT)) < SAME
    mapped.close()
    copied.close()
