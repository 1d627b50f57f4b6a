"""Figures: rates, percentiles, ratios by round, verdicts; and the report that is made of them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import ServerError
from benchmarks import report
from benchmarks.client import Answer
from benchmarks.figures import Figure, decode_rate, generated_tokens, percentile
from benchmarks.report import MEGABYTE, ROWS, judge, ratios, summary


def stream(*times: float, tokens: int | None = None, **fields: Any) -> Answer:
    return Answer(
        sent_at=0.0,
        ended_at=times[-1] if times else 0.0,
        status=200,
        text_times=times,
        answer_tokens=len(times) if tokens is None else tokens,
        **fields,
    )


def steady(first: float, count: int, seconds: float) -> Answer:
    """`count` tokens, one each `seconds`."""
    return stream(*(first + i * seconds for i in range(count)))


def figure(row: str, server: str, number: int, *values: float, **fields: Any) -> Figure:
    return Figure(row=row, server=server, round=number, values=values, **fields)


class TestDecodeRate:
    def test_one_stream(self) -> None:
        assert decode_rate([steady(1.0, 11, 0.1)], 11) == (pytest.approx(10.0), "all streams")

    def test_reading_prompts_and_the_last_ones_alone_do_not_count(self) -> None:
        early, late = steady(1.0, 21, 0.1), steady(2.0, 21, 0.1)  # both decode from 2.0 to 3.0
        assert decode_rate([early, late], 21) == (pytest.approx(20.0), "all streams")

    def test_one_after_the_other_is_measured_while_any_decodes(self) -> None:
        first, second = steady(0.0, 11, 0.1), steady(5.0, 11, 0.1)  # four seconds of reading between them
        assert decode_rate([first, second], 11) == (pytest.approx(10.0), "any stream")

    def test_tokens_without_text_count(self) -> None:
        half = stream(*(0.2 * i for i in range(1, 12)), tokens=22)  # each second token completes no character
        assert decode_rate([half], 22)[0] == pytest.approx(10.0)

    @given(st.integers(1, 8), st.integers(8, 60), st.floats(0.001, 0.5))
    def test_equal_streams_are_as_many_times_as_fast(self, streams: int, tokens: int, seconds: float) -> None:
        found, over = decode_rate([steady(1.0, tokens, seconds)] * streams, tokens)
        assert over == "all streams"
        assert found == pytest.approx(streams / seconds)

    def test_nothing_to_measure_is_an_error(self) -> None:
        with pytest.raises(ServerError, match="cannot be measured: 1 tokens, and 1 events"):
            decode_rate([stream(1.0)], 1)
        with pytest.raises(ServerError, match="0 events"):
            decode_rate([stream(tokens=5)], 5)

    def test_a_stream_that_falls_silent_is_measured_by_its_end(self) -> None:
        silent = dataclasses.replace(stream(1.0, 1.1, tokens=21), finished_at=3.0)
        assert decode_rate([silent], 21)[0] == pytest.approx(10.0)
        assert decode_rate([silent, steady(1.0, 21, 0.1)], 21) == (pytest.approx(20.0), "all streams")

    def test_without_usage_only_an_answer_cut_at_the_limit_can_be_counted(self) -> None:
        told_none = dataclasses.replace(stream(1.0, 2.0), answer_tokens=None)
        assert generated_tokens(dataclasses.replace(told_none, finish_reason="length"), 7) == 7
        with pytest.raises(ServerError, match="ignore the end of text"):
            generated_tokens(dataclasses.replace(told_none, finish_reason="stop"), 7)


class TestStatistics:
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1))
    def test_percentiles_are_within_the_values(self, values: Sequence[float]) -> None:
        assert percentile(values, 0) == min(values)
        assert percentile(values, 100) == max(values)
        assert min(values) <= percentile(values, 95) <= max(values)

    def test_percentile_between_two(self) -> None:
        assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5

    def test_ratios_are_of_the_same_round(self) -> None:
        figures = [figure("decode-1", "ours", 1, 50.0), figure("decode-1", "llama-server", 1, 40.0)]
        figures += [figure("decode-1", "ours", 2, 10.0), figure("decode-1", "llama-server", 2, 10.0)]
        figures += [figure("decode-1", "ours", 3, 99.0), figure("decode-1", "llama-server", 3, problem="died")]
        assert ratios(figures, "decode-1", "llama-server") == [1.25, 1.0]

    def test_p95_is_of_all_values_and_the_median_of_rounds(self) -> None:
        figures = [figure("ttft-cold", "ours", 1, 1.0, 2.0, 9.0), figure("ttft-cold", "ours", 2, 3.0, 3.0, 3.0)]
        found = summary(figures)["ttft-cold"]["ours"]
        assert (found["median"], found["least"], found["most"], found["rounds"]) == (2.5, 2.0, 3.0, 2)
        assert found["p95"] == pytest.approx(7.5)


class TestTargets:
    def verdicts(self, *figures: Figure, quantization: str = "Q4_K_M") -> dict[tuple[str, str | None], str]:
        return {(each.row, each.target.peer): each.verdict for each in judge(figures, quantization)}

    def pair(self, row: str, ours: float, theirs: float, peer: str = "llama-server") -> Sequence[Figure]:
        return [figure(row, "ours", 1, ours), figure(row, peer, 1, theirs)]

    def test_more_is_better_for_rates_and_less_for_times(self) -> None:
        found = self.verdicts(*self.pair("decode-1", 51.0, 50.0), *self.pair("ttft-prefix-pushed", 0.6, 1.0))
        assert found["decode-1", "llama-server"] == "reached"
        assert found["ttft-prefix-pushed", "llama-server"] == "missed"

    def test_a_hair_less_than_equal_counts_as_equal_for_rates_only(self) -> None:
        found = self.verdicts(*self.pair("decode-8", 0.985, 1.0), *self.pair("ttft-prefix-held", 1.01, 1.0))
        assert found["decode-8", "llama-server"] == "equal"
        assert found["ttft-prefix-held", "llama-server"] == "missed"

    def test_memory_is_judged_by_a_difference_and_by_a_ratio(self) -> None:
        figures = [*self.pair("memory-anonymous", 900 * MEGABYTE, 800 * MEGABYTE)]
        figures += [figure("memory-anonymous", "llama_cpp.server", 1, 1400 * MEGABYTE)]
        assert self.verdicts(*figures) == {
            ("memory-anonymous", "llama-server"): "reached",
            ("memory-anonymous", "llama_cpp.server"): "missed",
        }

    def test_a_target_for_one_quantization_holds_for_that_one(self) -> None:
        figures = self.pair("decode-4", 1.0, 1.0, "llama_cpp.server")
        assert ("decode-4", "llama_cpp.server") in self.verdicts(*figures)
        assert ("decode-4", "llama_cpp.server") not in self.verdicts(*figures, quantization="Q8_0")

    def test_misses_come_first_and_what_was_not_measured_next(self) -> None:
        figures = [*self.pair("decode-1", 2.0, 1.0), *self.pair("start-warm", 9.0, 1.0), figure("decode-8", "ours", 1, 5.0)]
        assert [each.verdict for each in judge(figures, "Q4_K_M")] == ["missed", "not measured", "reached"]

    def test_the_median_of_rounds_decides_and_the_spread_is_told(self) -> None:
        figures = [figure("decode-1", "ours", i, rate) for i, rate in enumerate((0.5, 1.1, 1.2))]
        figures += [figure("decode-1", "llama-server", i, 1.0) for i in range(3)]
        (judged,) = judge(figures, "Q4_K_M")
        assert judged.verdict == "reached"
        assert judged.told() == "decode, 1 stream: 1.10 (0.500 to 1.20) of llama-server, wanted ≥ 1"

    def test_a_figure_of_ours_alone(self) -> None:
        assert self.verdicts(figure("own-cost", "ours", 1, 0.25)) == {("own-cost", None): "reached"}


class TestReport:
    def found(self) -> dict[str, Any]:
        overload = {
            "requests per second": 8.0,
            "capacity tokens per second": 100.0,
            "sent": 30,
            "served": 10,
            "refused": 18,
            "refused_with_time": 18,
            "gave_up": 2,
            "failed": 0,
            "tokens_per_second": 95.0,
            "first_token_p50": 1.5,
            "first_token_p95": None,
        }
        figures = [
            figure("decode-1", "ours", 1, 60.0),
            figure("decode-1", "llama-server", 1, 50.0),
            figure("prefix", "llama-server", 1, problem="llama-server did not start\nlast words"),
            figure("overload-held", "ours", 1, 0.95, details=overload),
        ]
        head = {"command": "python -m benchmarks.serve", "quantization": "Q4_K_M", "servers": {"ours": "appliance serve"}}
        return report.result(figures, head, is_judged=True)

    def test_says_all_of_it(self) -> None:
        told = report.markdown(self.found())
        for part in (
            "- command: python -m benchmarks.serve",
            "- servers, ours: appliance serve",
            "- **reached**: decode, 1 stream: 1.20",
            "| decode, 1 stream | tokens/s | 60.0 | 50.0 | **1.20** (1.20–1.20, 1) |",
            "| ours | 1 | 8.0 | 30 | 10 | 18 | 18 | 2 | 0 | 95.0 of 100.0 | 1.50, – |",
            "prefix, llama-server, round 1:\n\n```\nllama-server did not start\nlast words\n```",
        ):
            assert part in told, told

    def test_is_the_same_after_a_trip_through_json(self) -> None:
        found = self.found()
        assert report.markdown(json.loads(json.dumps(found))) == report.markdown(found)

    def test_nothing_measured_is_a_report_too(self) -> None:
        told = report.markdown(report.result([figure("decode", "ours", 1, problem="no")], {}, is_judged=True))
        assert "What failed" in told

    def test_a_quick_run_is_not_judged(self) -> None:
        found = report.result([figure("decode-1", "ours", 1, 60.0)], {}, is_judged=False)
        assert "Targets" not in report.markdown(found)

    @given(st.floats(1e-9, 1e12))
    def test_numbers_keep_three_digits(self, value: float) -> None:
        assert float(ROWS["decode-1"].said(value)) == pytest.approx(value, rel=0.006)

    def test_odd_numbers_are_shown_as_they_are(self) -> None:
        assert [ROWS["decode-1"].said(value) for value in (0.0, math.inf)] == ["0", "inf"]
