"""Finds the settings with which one model is fastest on one machine; `tune` is the entry.

One setting after the other, each value beside the one before it, in rounds that take turns: what disturbs one disturbs the
other. A value has to be faster by more than the rounds differ among themselves. What changes answers is proposed, never
taken. Measuring is `speed_meter.py`'s business, memory the plan's; the outcome is written by `tuning_file.py`.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from appliance.serving.decoder import SHORTEST_CHUNK_TOKENS
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.speed import Progress, measuring_settings
from appliance.serving.speed_meter import ReadPrompt, Task, WriteAnswers
from appliance.serving.tuning_file import Trial, TunedSettings

SMALLEST_GAIN = 0.02
SLOT_GAIN = 0.1  # of all answers together: slots cost memory
RULE = (
    "A value is taken when the median of its gain over the rounds is larger than the spread between their quartiles, and "
    f"than {SMALLEST_GAIN:.0%} ({SLOT_GAIN:.0%} for more slots); otherwise what was there before stays."
)
SECONDS = 300.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 11
OVERTIME = 1.5  # of the time that was given: then a stage is given up that has not made the fewest rounds
TASK_SECONDS = 1.5  # what one reading should take, so that a stage has rounds enough; writing takes half as long
PROMPT_TOKENS = (128, 1024)
STEPS = (4, 32)
MANY_ANSWERS = 4
SLOTS = (2, 4, 8)
READING_TOKENS_PER_SECOND = 5.0  # as fast as people read; a slot that would write slower is no gain
CHUNK_TOKENS = (64, 128, 256, 512, 1024)
LONGEST_CHUNK_SECONDS = 1.0  # a newcomer waits for the chunk in hand
# The request by which ways of loading are judged: a question with what was found on it, and an answer.
TYPICAL_PROMPT_TOKENS, TYPICAL_ANSWER_TOKENS = 512, 128

CONFIRMATION = "all together"

Measure = Callable[[EngineSettings, Task], float]  # seconds that a task takes with these settings
Work = Sequence[tuple[EngineSettings, Task, float]]  # tasks, with which settings, and how much each weighs
Value = int | str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What may be changed. `fits` asks the memory plan, in which nothing may be stepped down for the sake of speed."""

    settings: EngineSettings  # without any tuning
    undecided: Collection[str]  # names of `TunedSettings` that no person has set
    usable_cores: int
    physical_cores: int
    can_repack: bool
    can_quantize_kv: bool
    fits: Callable[[TunedSettings], bool]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    settings: TunedSettings
    trials: Sequence[Trial]
    proposals: Sequence[str]
    notes: Sequence[str]
    tasks: tuple[ReadPrompt, WriteAnswers]  # of a length that suits this machine, with the tuned settings


def tune(
    subject: Subject,
    measure: Measure,
    *,
    on_progress: Progress = lambda share, what: None,  # noqa: ARG005
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Takes about `seconds`. Raises what `measure` raises."""
    return _Tuning(subject, measure, on_progress, seconds, clock).run()


def applied(settings: EngineSettings, tuned: TunedSettings) -> EngineSettings:
    """`settings` as tuned, but for slots, whose number changes what is loaded and not how fast it is."""
    return msgspec.structs.replace(
        settings,
        threads_decode=tuned.threads or settings.threads_decode,
        threads_prefill=tuned.prefill_threads or settings.threads_prefill,
        chunk_tokens=tuned.chunk_tokens or settings.chunk_tokens,
        is_mapped=settings.is_mapped if tuned.mmap is None else tuned.mmap == "on",
        is_repacked=settings.is_repacked if tuned.repack is None else tuned.repack == "on",
    )


def with_room(settings: EngineSettings) -> EngineSettings:
    """The same way of loading, with room for every task of a tuning."""
    return measuring_settings(
        settings,
        answers=max(*SLOTS, MANY_ANSWERS),
        prompt_tokens=PROMPT_TOKENS[1] + STEPS[1],
        answer_tokens=STEPS[1],
        chunk_tokens=CHUNK_TOKENS[-1],
    )


class _TimeIsOver(Exception):
    """The rounds of a stage were not made in time."""


class _Tuning:
    """The state of a tuning: what was chosen so far, what was measured, and how much time is left."""

    def __init__(
        self, subject: Subject, measure: Measure, on_progress: Progress, seconds: float, clock: Callable[[], float]
    ) -> None:
        self._subject, self._measure, self._clock = subject, measure, clock
        self._on_progress = on_progress
        self._started, self._seconds = clock(), seconds
        self._tuned = TunedSettings()
        self._trials: list[Trial] = []
        self._proposals: list[str] = []
        self._notes: list[str] = []
        self._prompt_tokens, self._steps = PROMPT_TOKENS[0], STEPS[0]
        self._prompt_token_seconds = 0.0
        self._stage = ""

    @property
    def _now(self) -> EngineSettings:
        return applied(self._subject.settings, self._tuned)

    def run(self) -> Outcome:
        stages = {
            "repack": self._tune_repack,
            "mmap": self._tune_mmap,
            "threads": self._tune_threads,
            "prefill_threads": self._tune_prefill_threads,
            "chunk_tokens": self._tune_chunk_tokens,
            "slots": self._tune_slots,
            "kv_type": self._compare_kv_types,
            CONFIRMATION: self._confirm,
        }
        self._calibrate()
        for number, (name, stage) in enumerate(stages.items()):
            left = self._seconds - (self._clock() - self._started)
            if left <= 0 and name != CONFIRMATION:
                self._give_up(name)
                continue
            self._tell(name)
            try:
                stage(name, max(0.0, left) / (len(stages) - number))
            except _TimeIsOver:
                self._give_up(name)
        return Outcome(
            settings=self._tuned,
            trials=self._trials,
            proposals=self._proposals,
            notes=self._notes,
            tasks=(self._read(self._now), self._write(self._now, 1)),
        )

    def _give_up(self, name: str) -> None:
        if name == CONFIRMATION:
            self._tuned = TunedSettings()
            self._notes.append(f"{name}: the time was over before this could be confirmed, so the defaults stay.")
        else:
            self._notes.append(f"{name}: not measured, the time was over.")

    def _calibrate(self) -> None:
        """Chooses tasks that take about as long on every machine; what comes first warms up and is not counted."""
        self._tell("how fast it is at all")
        fewest, most = PROMPT_TOKENS
        self._measure(self._now, self._read(self._now, tokens=fewest))
        self._prompt_token_seconds = self._measure(self._now, self._read(self._now, tokens=fewest)) / fewest
        tokens = int(TASK_SECONDS / self._prompt_token_seconds) // SHORTEST_CHUNK_TOKENS * SHORTEST_CHUNK_TOKENS
        self._prompt_tokens = min(most, max(fewest, tokens))
        step_seconds = self._measure(self._now, self._write(self._now, 1)) / self._steps
        self._steps = min(STEPS[1], max(STEPS[0], int(TASK_SECONDS / 2 / step_seconds)))

    def _tune_repack(self, name: str, seconds: float) -> None:
        if name not in self._subject.undecided:
            return self._set_by_hand(name)
        if not self._subject.can_repack:
            self._notes.append("repack: this file has nothing that another layout would speed up on this CPU.")
            return None
        other = "off" if self._now.is_repacked else "on"
        return self._try(name, _on_off(self._now.is_repacked), [other], self._typical, seconds)

    def _tune_mmap(self, name: str, seconds: float) -> None:
        if name not in self._subject.undecided:
            return self._set_by_hand(name)
        other = "off" if self._now.is_mapped else "on"
        return self._try(name, _on_off(self._now.is_mapped), [other], self._typical, seconds)

    def _tune_threads(self, name: str, seconds: float) -> None:
        """For one answer, and for several at once: one number serves both."""
        if name not in self._subject.undecided:
            return self._set_by_hand(name)

        return self._try(name, self._now.threads_decode, self._thread_counts(), self._writing, seconds)

    def _tune_prefill_threads(self, name: str, seconds: float) -> None:
        if name not in self._subject.undecided:
            return self._set_by_hand(name)
        return self._try(name, self._now.threads_prefill, self._thread_counts(), self._reading, seconds)

    def _tune_chunk_tokens(self, name: str, seconds: float) -> None:
        longest = min(self._prompt_tokens, LONGEST_CHUNK_SECONDS / self._prompt_token_seconds)
        sizes = [tokens for tokens in CHUNK_TOKENS if tokens <= longest]
        return self._try(name, self._now.chunk_tokens, sizes, self._reading, seconds)

    def _tune_slots(self, name: str, seconds: float) -> None:
        """More slots where they make all answers together faster, each still faster than one reads, and memory allows."""
        if name not in self._subject.undecided:
            return self._set_by_hand(name)
        before = self._subject.settings.slots
        counts = [count for count in SLOTS if count > before and self._has_room(name, count)]
        if not counts:
            return None
        now = self._now
        ways: dict[Value, Work] = {
            count: [(now, self._write(now, count), 1 / (self._steps * count))] for count in [before, *counts]
        }
        rounds = self._rounds(ways, seconds)
        for count in counts:
            trial = _trial(name, count, before, f"a token of as many answers, {self._steps} steps", rounds)
            tokens_per_second = 1 / (statistics.median(rounds[count]) * count)
            refusal = None
            if trial.gain <= max(trial.spread, SLOT_GAIN):
                refusal = _too_little(trial, SLOT_GAIN)
            elif tokens_per_second < READING_TOKENS_PER_SECOND:
                refusal = f"each answer gets {tokens_per_second:.1f} tokens/s, and people read {READING_TOKENS_PER_SECOND:g}"
            if not self._decide(trial, refusal):
                return None
            before = count
        return None

    def _compare_kv_types(self, name: str, seconds: float) -> None:
        """Only to tell: q8_0 rounds what the model remembers, and so may change answers."""
        if not self._subject.can_quantize_kv or self._now.kv_type == "q8_0":
            return
        write = msgspec.structs.replace(self._write(self._now, 1), prompt_tokens=self._prompt_tokens)
        ways: dict[Value, Work] = {
            kv_type: [(msgspec.structs.replace(self._now, kv_type=kv_type), write, 1 / self._steps)]
            for kv_type in ("f16", "q8_0")
        }
        trial = _trial(name, "q8_0", "f16", _said(ways["f16"]), self._rounds(ways, seconds))
        reason = "never taken for speed: it changes answers"
        self._trials.append(msgspec.structs.replace(trial, reason=reason))
        self._proposals.append(
            f"kv_type q8_0: an answer after {self._prompt_tokens} tokens is {_faster(trial)}, and the memory for prompts is "
            "half as large. It changes answers, so it is not taken; set it with --kv-type q8_0."
        )

    def _confirm(self, name: str, seconds: float) -> None:
        """What was found one by one has to hold together, or nothing of it is taken."""
        if self._now == self._subject.settings:
            return
        ways: dict[Value, Work] = {"default": self._typical(self._subject.settings), "tuned": self._typical(self._now)}
        trial = _trial(name, "tuned", "default", _said(ways["tuned"]), self._rounds(ways, seconds))
        if trial.gain < 0:
            self._tuned = TunedSettings(slots=self._tuned.slots)
            self._notes.append(f"all together: {_faster(trial)} than the defaults, so the defaults stay.")
        is_taken = trial.gain >= 0
        reason = "the tuned settings together" if is_taken else "slower than the defaults, which stay"
        self._trials.append(msgspec.structs.replace(trial, is_taken=is_taken, reason=reason))

    def _try(
        self, name: str, before: Value, values: Sequence[Value], work: Callable[[EngineSettings], Work], seconds: float
    ) -> None:
        """Measures the values of a setting beside the one there is; takes the fastest that is fast enough and fits."""
        others = [value for value in values if value != before and self._has_room(name, value)]
        if not others:
            return
        ways = {value: work(applied(self._subject.settings, self._with(name, value))) for value in [before, *others]}
        rounds = self._rounds(ways, seconds)
        trials = [_trial(name, value, before, _said(ways[before]), rounds) for value in others]
        is_taken = False
        for trial in sorted(trials, key=lambda each: each.gain, reverse=True):
            refusal = None
            if trial.gain <= max(trial.spread, SMALLEST_GAIN):
                refusal = _too_little(trial, SMALLEST_GAIN)
            elif is_taken:
                refusal = "another value is faster"
            is_taken |= self._decide(trial, refusal)

    def _decide(self, trial: Trial, refusal: str | None) -> bool:
        """Takes the value, unless it is refused."""
        if refusal is None:
            self._tuned = self._with(trial.setting, trial.value)
        reason = refusal or f"faster by {trial.gain:.1%}, and the rounds differ by {trial.spread:.1%}"
        self._trials.append(msgspec.structs.replace(trial, is_taken=refusal is None, reason=reason))
        return refusal is None

    def _rounds(self, ways: Mapping[Value, Work], seconds: float) -> dict[Value, list[float]]:
        """The weighed seconds of each way, by rounds; every other round goes through them backwards."""
        found: dict[Value, list[float]] = {value: [] for value in ways}
        started = self._clock()
        for number in range(MOST_ROUNDS):
            for value in list(ways) if number % 2 == 0 else reversed(list(ways)):
                if self._clock() - self._started > OVERTIME * self._seconds:
                    raise _TimeIsOver
                found[value].append(sum(self._measure(settings, task) * weight for settings, task, weight in ways[value]))
                self._tell("")
            spent = self._clock() - started
            if number + 1 >= FEWEST_ROUNDS and spent * (number + 2) / (number + 1) > seconds:
                break
        return found

    def _typical(self, settings: EngineSettings) -> Work:
        read, write = self._read(settings), self._write(settings, 1)
        return [
            (settings, read, TYPICAL_PROMPT_TOKENS / read.tokens),
            (settings, write, TYPICAL_ANSWER_TOKENS / write.steps),
        ]

    def _reading(self, settings: EngineSettings) -> Work:
        read = self._read(settings)
        return [(settings, read, 1 / read.tokens)]

    def _writing(self, settings: EngineSettings) -> Work:
        one, many = self._write(settings, 1), self._write(settings, MANY_ANSWERS)
        return [(settings, one, 1 / one.steps), (settings, many, 1 / (many.steps * MANY_ANSWERS))]

    def _read(self, settings: EngineSettings, tokens: int | None = None) -> ReadPrompt:
        tokens = tokens or self._prompt_tokens
        return ReadPrompt(tokens=tokens, chunk_tokens=settings.chunk_tokens, threads=settings.threads_prefill)

    def _write(self, settings: EngineSettings, answers: int) -> WriteAnswers:
        return WriteAnswers(answers=answers, steps=self._steps, threads=settings.threads_decode)

    def _thread_counts(self) -> Sequence[int]:
        physical, usable = self._subject.physical_cores, self._subject.usable_cores
        return sorted({max(1, physical // 2), max(1, physical - 1), physical, usable})

    def _has_room(self, name: str, value: Value) -> bool:
        """Whether there is memory for a value; only then it is tried."""
        if self._subject.fits(self._with(name, value)):
            return True
        self._notes.append(f"{name} {value}: not tried, there is not enough memory for it.")
        return False

    def _with(self, name: str, value: Value) -> TunedSettings:
        return msgspec.structs.replace(self._tuned, **{name: value})

    def _set_by_hand(self, name: str) -> None:
        self._notes.append(f"{name}: left as it was set.")

    def _tell(self, what: str) -> None:
        self._stage = what or self._stage
        self._on_progress(min(1.0, (self._clock() - self._started) / self._seconds), self._stage)


def _trial(name: str, value: Value, before: Value, work: str, rounds: Mapping[Value, Sequence[float]]) -> Trial:
    """Not decided yet."""
    gains = [old / new - 1 for new, old in zip(rounds[value], rounds[before], strict=True)]
    quarter, _, three_quarters = statistics.quantiles(gains, n=4, method="inclusive")
    return Trial(
        setting=name,
        value=value,
        instead_of=before,
        work=work,
        seconds=tuple(rounds[value]),
        seconds_before=tuple(rounds[before]),
        gain=statistics.median(gains),
        spread=three_quarters - quarter,
        is_taken=False,
        reason="",
    )


def _too_little(trial: Trial, smallest: float) -> str:
    limit = f"the rounds differ by {trial.spread:.1%}" if trial.spread > smallest else f"{smallest:.0%} is the least"
    return f"{_faster(trial)}, and {limit}"


def _faster(trial: Trial) -> str:
    return f"{abs(trial.gain):.1%} {'faster' if trial.gain >= 0 else 'slower'}"


def _on_off(value: bool) -> str:
    return "on" if value else "off"


def _said(work: Work) -> str:
    """What is done in each round, in words."""
    parts = []
    for _, task, weight in work:
        if isinstance(task, ReadPrompt):
            parts.append(f"{round(weight * task.tokens)} tokens read (measured on {task.tokens})")
        else:
            tokens = round(weight * task.steps * task.answers)
            parts.append(f"{tokens} tokens written, {task.answers} at once (measured over {task.steps} steps)")
    return " and ".join(parts)
