"""Documents that are read once, by themselves, and then stand anywhere in a prompt; on a decoder that checks every cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance.serving.cache import common_length
from appliance.serving.passages import MOST_LOOKUPS, Passages, arranged
from appliance.serving.snapshots import Identity, SnapshotStore
from tests.serving.counting_decoder import CountingDecoder
from tests.serving.scheduler_bench import Bench, Client, until

SYSTEM = tuple(range(1000, 1020))
DOCUMENTS = {name: tuple(range(100 * at, 100 * at + 12)) for at, name in enumerate("abcdef", start=20)}
QUESTION = (7, 8, 9)


def ask(
    bench: Bench, names: str, question: Sequence[int] = QUESTION, *, system: Sequence[int] = SYSTEM, **fields: Any
) -> Client:
    prompt, bounds = list(system), [len(system)]
    for name in names:
        prompt += DOCUMENTS[name]
        bounds.append(len(prompt))
    passages = Passages(tuple(bounds), (None,) * len(names))
    return bench.client(*prompt, *question, passages=passages, **fields)


def stitching_bench(
    *, reread_tokens: int | None = 0, slots: int = 2, cache_tokens: int = 400, can_move: bool = True, **rest: Any
) -> Bench:
    decoder = CountingDecoder(slots=slots, context_tokens=200, can_move=can_move)
    return Bench(decoder, reread_tokens=reread_tokens, cache_tokens=cache_tokens, **rest)


def test_document_that_was_read_is_not_read_again_wherever_it_stands() -> None:
    with stitching_bench() as bench:
        first = ask(bench, "abc")
        assert first.finished().cached_tokens == 0
        assert bench.decoder.computed == 20 + 3 * 12 + 3 + 4
        for names, moved in (("cab", 3), ("ba", 2), ("cb", 1)):  # the last begins as "cab" did
            before = bench.decoder.computed
            client = ask(bench, names)
            end = client.finished()
            assert (end.cached_tokens, end.stitched_tokens) == (20 + 12 * len(names), 12 * moved)
            assert bench.decoder.computed - before == 3 + 4
            assert end.documents == "stitched"
            assert client.text == "10 11 12 13 14 "


def test_only_new_documents_are_read() -> None:
    with stitching_bench() as bench:
        ask(bench, "ab").finished()
        before = bench.decoder.computed
        end = ask(bench, "bd").finished()
        assert bench.decoder.computed - before == 12 + 3 + 4
        assert (end.prompt_tokens, end.cached_tokens, end.stitched_tokens) == (47, 32, 12)


@pytest.mark.parametrize("reread_tokens", [1, 4, 12, 30])
def test_beginnings_of_documents_are_read_where_they_stand(reread_tokens: int) -> None:
    with stitching_bench(reread_tokens=reread_tokens) as bench:
        ask(bench, "abc").finished()
        before = bench.decoder.computed
        client = ask(bench, "cab")
        end = client.finished()
        again = min(reread_tokens, 12)
        assert bench.decoder.computed - before == 3 * again + 3 + 4
        assert (end.cached_tokens, end.stitched_tokens) == (20 + 3 * (12 - again), 3 * (12 - again))
        assert client.text == "10 11 12 13 14 "


def test_conversation_goes_on_from_what_was_put_together() -> None:
    with stitching_bench(reread_tokens=2) as bench:
        ask(bench, "ab").finished()
        before = bench.decoder.computed
        end = ask(bench, "ab", (*QUESTION, 10, 11, 12, 13, 14, 50)).finished()
        assert (end.cached_tokens, end.stitched_tokens) == (20 + 24 + 3 + 4, 0)
        assert bench.decoder.computed - before == 2 + 4


def test_cells_of_documents_read_apart_are_never_taken_for_those_of_an_exact_prompt() -> None:
    with stitching_bench() as bench:
        ask(bench, "ab").finished()
        prompt = (*SYSTEM, *DOCUMENTS["a"], *DOCUMENTS["b"], *QUESTION)
        assert bench.client(*prompt).finished().cached_tokens == len(SYSTEM)
        assert bench.client(*DOCUMENTS["a"], *QUESTION).finished().cached_tokens == 0


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"adapter": "x"}])
def test_neither_tenants_nor_adapters_share_a_document(other: dict[str, str]) -> None:
    with stitching_bench() as bench:
        ask(bench, "ab", tenant="a").finished()
        assert ask(bench, "ab", **({"tenant": "a"} | other)).finished().cached_tokens == 0


@pytest.mark.parametrize("settings", [{"reread_tokens": None}, {"cache_tokens": 40}, {"can_move": False}])
def test_prompt_is_read_exactly_where_it_cannot_be_put_together(settings: dict[str, Any]) -> None:
    with stitching_bench(**settings) as bench:
        ask(bench, "ab").finished()
        end = ask(bench, "ba").finished()
        assert (end.documents, end.stitched_tokens) == ("exact", 0)


def test_cells_that_are_not_taken_make_the_prompt_be_read_exactly() -> None:
    with stitching_bench(slots=1) as bench:
        ask(bench, "ab").finished()
        bench.decoder.restore_failures.append("no room")
        client = ask(bench, "ba")
        end = client.finished()
        assert (end.documents, end.stitched_tokens) == ("exact", 0)
        assert client.text == "10 11 12 13 14 "


@pytest.mark.parametrize("call", range(5))
def test_request_that_is_cancelled_while_its_documents_are_read_leaves_nothing_behind(call: int) -> None:
    with stitching_bench(reread_tokens=1) as bench:
        bench.decoder.hold_at = call
        client = ask(bench, "abc")
        for _ in range(call + 1):
            bench.decoder.entered.acquire()
        bench.decoder.hold_at = -1
        client.cancel()
        assert client.reason() == "cancelled"
        until(lambda: bench.scheduler.load().running == 0)
        assert ask(bench, "cab").finished().documents == "stitched"


def test_two_that_need_the_same_document_read_it_once() -> None:
    with stitching_bench(slots=3, cache_tokens=1000) as bench:
        with bench.together():
            clients = [ask(bench, names) for names in ("ab", "bc", "ca")]
        for client in clients:
            assert client.finished().documents == "stitched"
        assert bench.decoder.computed <= 20 + 3 * 12 + 3 * (3 + 4)


def store_in(folder: Path) -> SnapshotStore:
    identity = Identity(model_sha256="m", template_sha256="t", kv_type="f16", layout="l")
    return SnapshotStore(folder / "snapshots", 10**6, identity)


def test_documents_outlive_a_restart_and_a_broken_file_is_read_again(tmp_path: Path) -> None:
    documents = {name: tuple(range(1000 * at, 1000 * at + 40)) for at, name in enumerate("gh", start=20)}
    DOCUMENTS.update(documents)
    store = store_in(tmp_path)
    with stitching_bench(snapshots=store) as bench:
        for names in ("gh", "hg", "gh"):
            ask(bench, names).finished()
        until(lambda: len(store.prefixes()) >= 2)
        bench.idle()
    with stitching_bench(snapshots=store_in(tmp_path)) as bench:
        end = ask(bench, "hg").finished()
        assert end.stitched_tokens == 80
        assert bench.decoder.computed <= 20 + 3 + 4
    for path in (tmp_path / "snapshots").iterdir():
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    with stitching_bench(snapshots=store_in(tmp_path)) as bench:
        end = ask(bench, "hg").finished()
        assert (end.stitched_tokens, end.documents) == (0, "stitched")
        assert bench.decoder.computed == 20 + 80 + 3 + 4


class TestArranged:
    TEXTS = ((1, 1), (2, 2, 2), (3, 3), (4, 4))

    def arranged(self, scores: Sequence[float | None], tolerance: float, *known: Sequence[int]) -> list[int]:
        """Numbers of the documents, in their new order, behind the beginning 0."""
        tokens, bounds = [0], [1]
        for text in self.TEXTS[: len(scores)]:
            tokens += text
            bounds.append(len(tokens))

        def known_length(prompt: Sequence[int]) -> int:
            return max((common_length(tuple(prompt), tuple(each)) for each in known), default=0)

        found, passages = arranged((*tokens, 9), Passages(tuple(bounds), tuple(scores)), tolerance, known_length)
        assert found[0] == 0
        assert found[-1] == 9
        texts = [found[start:end] for start, end in passages.spans]
        order = [self.TEXTS.index(text) for text in texts]
        assert list(passages.scores) == [scores[at] for at in order]
        return [at + 1 for at in order]

    def test_without_scores_the_order_is_the_clients(self) -> None:
        assert self.arranged([None] * 3, 1.0, (0, 3, 3)) == [1, 2, 3]
        assert self.arranged([0.5, None, 0.9], 1.0, (0, 3, 3)) == [1, 2, 3]

    def test_what_is_more_relevant_comes_first(self) -> None:
        assert self.arranged([0.1, 0.9, 0.5], 0.0, (0, 1, 1)) == [2, 3, 1]

    def test_what_is_about_as_relevant_comes_as_it_is_known(self) -> None:
        assert self.arranged([0.5, 0.55, 1.0, 0.0], 0.1, (0, 3, 3, 1, 1, 2, 2)) == [3, 1, 2, 4]
        assert self.arranged([0.5, 0.55, 1.0, 0.0], 0.1, (0, 3, 3, 2, 2, 2)) == [3, 2, 1, 4]
        assert self.arranged([0.5, 0.55, 1.0, 0.0], 0.01, (0, 3, 3, 1, 1)) == [3, 2, 1, 4]

    def test_the_same_documents_stand_in_the_same_order_whatever_is_known_of_them(self) -> None:
        assert self.arranged([0.9, 1.0, 0.0], 0.2) == self.arranged([1.0, 0.9, 0.0], 0.2) == [1, 2, 3]

    def test_looking_for_what_is_known_has_an_end(self) -> None:
        count = 64
        asked: list[Sequence[int]] = []
        tokens = range(count + 1)

        def known_length(prompt: Sequence[int]) -> int:
            asked.append(prompt)
            return len(prompt)

        found, _ = arranged((*tokens, 99), Passages(tuple(range(1, count + 2)), (1.0,) * count), 0.0, known_length)
        assert sorted(found) == [*tokens, 99]
        assert len(asked) <= MOST_LOOKUPS + 1


def test_conversations_make_way_for_documents() -> None:
    """What was put together can be put together again; what was read would have to be read again."""
    with stitching_bench(cache_tokens=20 + 4 * 12 + 10) as bench:
        ask(bench, "ab").finished()
        for names in ("cd", "ac", "bd", "ca", "db"):
            ask(bench, names).finished()
            bench.idle()
            with bench.together():
                while bench.scheduler._prefixes.save_one():
                    pass
        before = bench.decoder.computed
        assert ask(bench, "abcd").finished().stitched_tokens >= 36
        assert bench.decoder.computed - before == 3 + 4


def grown(name: str, *texts: Sequence[int]) -> None:
    DOCUMENTS[name] = tuple(token for text in texts for token in text)


def test_a_running_answer_that_begins_alike_is_no_reason_to_fail() -> None:
    """It is worth copying for the sake of a long beginning, and not for a short one."""
    grown("n", range(9000, 9001))
    grown("o", range(9100, 9160))
    grown("p", range(9100, 9130), range(9200, 9205))
    with stitching_bench(slots=2, cache_tokens=400) as bench:
        with bench.together():
            running = ask(bench, "no", system=(1, 2), max_tokens=60)
        until(lambda: running.events.qsize() > 1)
        other = ask(bench, "np", system=(1, 2))
        assert other.finished().documents == "stitched"
        running.finished()


def test_what_had_to_be_read_again_does_not_count_as_known() -> None:
    grown("q", range(9300, 9340))
    grown("r", range(9400, 9405))
    with stitching_bench(slots=1, cache_tokens=60) as bench:
        system = tuple(range(1000, 1015))
        ask(bench, "q", system=system).finished()
        before = bench.decoder.computed
        end = ask(bench, "qr", system=system).finished()
        computed = bench.decoder.computed - before - 4
        assert end.prompt_tokens - end.cached_tokens <= computed
        assert end.cached_tokens <= end.prompt_tokens


def test_conversations_do_not_take_the_system_prompt_with_them() -> None:
    system = tuple(range(1000, 1040))
    with stitching_bench(slots=1, cache_tokens=40 + 4 * 12 + 8) as bench:
        ask(bench, "ab", system=system).finished()
        with bench.together():
            while bench.scheduler._prefixes.save_one():
                pass
        before = bench.decoder.computed
        ask(bench, "cd", system=system).finished()
        assert bench.decoder.computed - before == 12 + 12 + 3 + 4


def test_documents_that_come_in_a_fixed_order_reach_the_disk_too(tmp_path: Path) -> None:
    grown("u", range(9700, 9740))
    grown("v", range(9800, 9840))
    store = store_in(tmp_path)
    with stitching_bench(snapshots=store) as bench:
        for _ in range(3):
            ask(bench, "uv").finished()
        until(lambda: len(store.prefixes()) >= 2)


def test_scores_choose_no_place_where_documents_are_stitched() -> None:
    with stitching_bench() as bench:
        for scores in ((0.1, 0.9), (None, None)):
            prompt = [*SYSTEM, *DOCUMENTS["b"], *DOCUMENTS["a"], *QUESTION]
            bench.client(*prompt, passages=Passages((20, 32, 44), scores)).finished()
            with bench.together():
                held = [left.prefix.tokens for left in bench.scheduler._prefixes._slots.left.values()]
            found = [[token & 0xFFFF for token in tokens][:47] for tokens in held]
            assert prompt in found, "in the order given"
