"""The decoder over the real llama.cpp with a tiny random model: batches, shared cells, adapters, drafts, abort."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import EngineFailed, ModelFileError
from appliance.serving.decoder import MAX_DRAFT_TOKENS, Adapter, Feed, SavedPart, SnapshotRefused
from appliance.serving.llama import Context, Model, library
from appliance.serving.llama.sampler import SlotSampler
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
    assert (context.slots, context.context_tokens, context.cells) == (3, 256, 768)
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


def read(context: Context, tokens: Sequence[int], slot: int = 0) -> None:
    context.start(slot, GREEDY, None, None)
    for at in range(0, len(tokens), 200):
        decode(context, [Feed(slot, tokens[at : at + 200], at, is_sampled=False)])


def after(context: Context, slot: int, tokens: Sequence[int], held: int) -> np.ndarray:
    """Log probabilities after the tokens, of which the slot holds the first."""
    context.start(slot, GREEDY, None, ALL)
    return in_order(decode(context, [Feed(slot, tokens[held:], held, is_sampled=True)])[slot][0])


@pytest.mark.parametrize("slots", [1, 3, 5], ids=["fewer slots", "as many", "more slots"])
def test_saved_cells_are_as_good_as_computed_ones(context: Context, folder: Path, slots: int) -> None:
    expected = logprobs(context, PROMPT)
    read(context, PROMPT[:10], slot=2)
    saved = context.save(2)
    assert saved == context.save(2), "saving changes nothing"
    context.check(saved, 10)
    assert 0 < len(saved) - 10 * context.cell_bytes < 500
    other = open_context(folder / "tiny.gguf", slots=slots)
    for held in (10, 6):
        other.restore(0, [SavedPart(saved, 0, held)])
        assert difference(after(other, 0, PROMPT, held), expected) < SAME
    other.close()


def test_parts_are_joined_where_they_were_cut(context: Context) -> None:
    expected = logprobs(context, PROMPT)
    read(context, PROMPT)
    read(context, [*PROMPT[:8], 1, 2, 3, 4, 5], slot=1)
    whole, other = context.save(0), context.save(1)
    context.release(0)
    middle = context.join([SavedPart(whole, 6, 12)])
    parts = [SavedPart(other, 0, 7), SavedPart(middle, 7, 11), SavedPart(whole, 11, 13)]
    context.restore(2, parts)
    assert difference(after(context, 2, PROMPT, 13), expected) < SAME
    joined = context.join(parts)
    context.check(joined, 13)
    context.restore(0, [SavedPart(joined, 0, 13)])
    again = context.save(0)
    assert context.join([SavedPart(again, 0, 6), SavedPart(again, 6, 13)]) == again


def test_what_a_slot_held_before_is_gone_with_what_it_gets(context: Context) -> None:
    read(context, PROMPT)
    saved = context.save(0)
    read(context, LONG, slot=1)
    context.restore(1, [SavedPart(saved, 0, 5)])
    assert difference(after(context, 1, PROMPT, 5), logprobs(context, PROMPT, slot=2)) < SAME


def test_answers_move_with_cells_and_sampler(context: Context) -> None:
    drawn = SamplingSettings(temperature=1.0, seed=3, repeat_penalty=1.3)
    expected = [each.token for each in generate(context, drawn, tokens=20)]
    context.start(0, drawn, None, None)
    told = [decode(context, [Feed(0, PROMPT, 0, is_sampled=True)])[0][0].token]
    slot = 0
    while len(told) < len(expected):
        if len(told) % 6 == 0:
            context.move(slot, (slot + 2) % 3)
            slot = (slot + 2) % 3
        feed = Feed(slot, told[-1:], len(PROMPT) + len(told) - 1, is_sampled=True)
        told.append(decode(context, [feed])[slot][0].token)
    assert told == expected


def test_an_answer_of_which_nothing_was_read_moves_too(context: Context) -> None:
    read(context, LONG, slot=2)  # what the slot held before
    context.release(2, kept=20)
    context.start(0, GREEDY, None, ALL)
    context.move(0, 2)
    found = decode(context, [Feed(2, PROMPT, 0, is_sampled=True)])
    assert difference(in_order(found[2][0]), logprobs(context, PROMPT, slot=1)) < SAME


def test_a_slot_keeps_the_beginning_it_is_told_to(context: Context) -> None:
    read(context, LONG)
    context.release(0, kept=9)
    assert difference(after(context, 0, PROMPT, 9), logprobs(context, PROMPT, slot=1)) < SAME


def test_order_of_feeds_and_gaps_between_slots_change_nothing(folder: Path) -> None:
    context = open_context(folder / "tiny.gguf", slots=6)
    prompts = {slot: [*PROMPT, slot] for slot in (4, 0, 5, 2)}
    for slot in prompts:
        context.start(slot, GREEDY, None, ALL)
    together = decode(context, [Feed(slot, prompt, 0, is_sampled=True) for slot, prompt in prompts.items()])
    for slot, prompt in prompts.items():
        assert difference(in_order(together[slot][0]), logprobs(context, prompt, slot=1)) < SAME
    context.close()


def test_saved_cells_that_do_not_fit_are_refused(folder: Path) -> None:
    context = open_context(folder / "tiny.gguf", context_tokens=512)
    read(context, PROMPT * 16)  # 272 tokens; the smallest memory has room for 256
    saved = context.save(0)
    quantized = open_context(folder / "tiny.gguf", kv_type="q8_0")
    small = open_context(folder / "tiny.gguf", context_tokens=200)
    size = len(PROMPT) * 16
    longer, behind = SavedPart(saved, 0, size + 1), SavedPart(saved, 5, size)
    for each, parts in (
        (context, [SavedPart(b"", 0, 1)]),
        (context, [SavedPart(b"x" * 500, 0, 1)]),
        (context, [SavedPart(saved[:-100], 0, size)]),
        (context, [longer]),
        (quantized, [SavedPart(saved, 0, size)]),
        (small, [SavedPart(saved, 0, size)]),
    ):
        each.clear()
        read(each, PROMPT, slot=1)
        with pytest.raises(SnapshotRefused):
            each.restore(1, parts)
        assert difference(after(each, 1, PROMPT, 0), logprobs(each, PROMPT, slot=2)) < SAME, "cells were left behind"
    small.restore(0, [SavedPart(saved, 0, 200)])  # as much as it takes
    for cells, tokens in ((saved, size - 1), (saved, size + 1), (context.join([behind]), size - 5)):
        with pytest.raises(SnapshotRefused):
            context.check(cells, tokens)
    with pytest.raises(SnapshotRefused):
        quantized.check(saved, size)
    assert quantized.cell_bytes == context.cell_bytes * 34 // 64
    for each in (context, quantized, small):
        each.close()


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
    context = open_context(folder / "tiny.gguf", slots=8)
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
    context = open_context(folder / "tiny.gguf")
    for slot in (0, 1):
        context.start(slot, GREEDY, None, None)
        decode(context, [Feed(slot, [5] * 200, 0, is_sampled=True)])
    with pytest.raises(EngineFailed, match="could not compute"):
        context.decode([Feed(1, [5] * 57, 200, is_sampled=False)], None)
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [0, 24])
def test_text_beside_answers_says_what_it_says_alone(tmp_path: Path, folder: Path, seed: int, window: int) -> None:
    """In streams of their own, and where a sliding window makes all share one memory."""
    context = open_context(tiny_gguf.write_sliding(tmp_path / "s.gguf", window) if window else folder / "tiny.gguf")
    assert context.can_share == (window == 0)
    drawn, size = SamplingSettings(temperature=1.0, seed=seed), len(LONG)
    for slot in (0, 1):
        context.start(slot, drawn, None, None)
    context.decode([Feed(0, LONG[:-1], 0, is_sampled=False)], None)
    told = decode(context, [Feed(0, LONG[-1:], size - 1, is_sampled=True), Feed(1, LONG, 0, is_sampled=True)])
    alone = generate(context, drawn, prompt=LONG, tokens=1, slot=2)
    assert [list(told[slot]) for slot in (0, 1)] == [list(alone)] * 2
    context.close()


@pytest.mark.parametrize("aborted_call", [1, 2])
def test_nothing_is_drawn_of_a_step_that_is_aborted_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aborted_call: int
) -> None:
    context = open_context(tiny_gguf.write_sliding(tmp_path / "s.gguf", 24))
    for slot in (0, 1):
        context.start(slot, GREEDY, None, None)
    context.decode([Feed(0, PROMPT, 0, is_sampled=False)], None)
    calls = itertools.count(1)
    real = library.c.llama_decode
    monkeypatch.setattr(
        library.c, "llama_decode", lambda *given: library.DECODE_ABORTED if next(calls) == aborted_call else real(*given)
    )
    drawn: list[object] = []
    monkeypatch.setattr(SlotSampler, "sample", lambda _, row: drawn.append(row))
    assert context.decode([Feed(0, [5], len(PROMPT), is_sampled=True), Feed(1, LONG, 0, is_sampled=True)], None) is None
    assert (drawn, next(calls)) == ([], aborted_call + 1)
    context.close()


def test_repacked_and_read_weights_compute_the_same(folder: Path) -> None:
    path = folder / "tiny.gguf"
    mapped = Context(open_model(path), engine_settings(path))
    copied = Context(Model(path, is_mapped=False, is_repacked=True), engine_settings(path))
    assert difference(logprobs(mapped, PROMPT), logprobs(copied, PROMPT)) < SAME
    mapped.close()
    copied.close()
