"""Asks a model of `benchmarks.passages` in torch: with full attention, each document by itself, or without documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from appliance.training import blocks, documents
from appliance.training import model as models
from appliance.training.documents import Tokens
from benchmarks.passages_world import Question, Scene, row

Reading = Literal["full", "blocks", "none"]
Asked = Sequence[tuple[Scene, Question]]
ROWS, ANSWER_TOKENS = 25, 24
THOUGHT = "</think>"  # ends what is no part of an answer


class Examined:
    """A merged model, and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = models.load_tokenizer(folder)
        self._model = models.load_model(folder).eval()

    @property
    def parameters(self) -> int:
        return int(self._model.num_parameters())

    def right(self, asked: Asked, reading: Reading) -> list[bool]:
        """Whether the greedy answer is the expected one, word for word, and ends there.

        It is where each token of the expected answer is the likeliest after those before it: one pass over it tells. Where a
        template begins answers with thoughts, a model may leave them out, so that others are spelt out.
        """
        found: list[bool] = []
        for start in range(0, len(asked), ROWS):
            part = asked[start : start + ROWS]
            prompts = [self._prompt(each, reading) for each in part]
            answers = [self.expected(each, reading) for each in part]
            likeliest = self._likeliest(prompts, answers)
            for (_, question), prompt, answer, each in zip(part, prompts, answers, likeliest, strict=True):
                is_right = each[len(prompt.input_ids) - 1 :][: len(answer)] == answer
                if not is_right and THOUGHT in self._tokenizer.decode(answer):
                    is_right = self._spelt(prompt) == question.answer
                found.append(is_right)
        return found

    def answers(self, asked: Asked, reading: Reading) -> list[str]:
        """The greedy answers themselves: those that are right are known, the others are spelt out token by token."""
        return [
            each[1].answer if is_right else self._spelt(self._prompt(each, reading))
            for each, is_right in zip(asked, self.right(asked, reading), strict=True)
        ]

    def expected(self, asked: tuple[Scene, Question], reading: Reading) -> list[int]:
        """The answer as it was trained: with what a template begins it with, Qwen3's empty thoughts, and what ends it."""
        told = row(*asked)
        shown = [] if reading == "none" else told["documents"]
        whole = documents.render(self._tokenizer, told["messages"], shown, add_generation_prompt=False).input_ids
        start = len(self._prompt(asked, reading).input_ids)
        return whole[start : whole.index(self._tokenizer.eos_token_id, start) + 1]

    def _spelt(self, prompt: Tokens) -> str:
        said: list[int] = []
        while len(said) < ANSWER_TOKENS:
            token = self._likeliest([prompt], [said])[0][len(prompt.input_ids) + len(said) - 1]
            if token == self._tokenizer.eos_token_id:
                break
            said.append(token)
        text: str = self._tokenizer.decode(said, skip_special_tokens=True)
        return text.rpartition(THOUGHT)[2].strip()

    def _prompt(self, asked: tuple[Scene, Question], reading: Reading) -> Tokens:
        """What serving makes of the same request; without bounds where all see all."""
        told = row(*asked)
        shown = [] if reading == "none" else told["documents"]
        made = documents.render(self._tokenizer, told["messages"][:1], shown, add_generation_prompt=True)
        return made if reading == "blocks" else Tokens(made.input_ids)

    def _likeliest(self, prompts: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of each row the likeliest next token after each of its tokens; padding comes last, where none of them sees it."""
        import torch

        rows = [[*prompt.input_ids, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        place = self._model.device
        padded = [[*each, *[self._tokenizer.pad_token_id] * (longest - len(each))] for each in rows]
        ids = torch.tensor(padded, device=place)
        numbers = torch.tensor([blocks.of_row(longest, prompt.bounds) for prompt in prompts], device=place)
        added = blocks.mask(numbers, blocks.weight_type(self._model))
        with torch.no_grad():
            output: Any = self._model(input_ids=ids, attention_mask=added, use_cache=False)
        found: list[list[int]] = output.logits.argmax(-1).tolist()
        return found
