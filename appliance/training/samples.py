"""Greedy answers of the base beside those of the adapter, so that a person sees what training changed."""

import json
from pathlib import Path
from typing import Any

from appliance.data.questions import training_questions
from appliance.recipe import Recipe
from appliance.training import processes
from appliance.training.labels import render_ids

ANSWER_TOKENS = 120


def write(model: Any, tokenizer: Any, rows: list[dict[str, Any]], recipe: Recipe, folder: Path) -> None:
    """`samples.json`: one training question in each language, the answer trained for, the base's and the adapter's.

    Every process must call it, since a sharded model answers only through all; the first one writes.
    """
    samples = []
    model.eval()
    for question in training_questions(rows, recipe.languages, per_language=1):
        prompt = [{"role": "user", "content": question.question}]
        with model.disable_adapter():
            base = answer(model, tokenizer, prompt)
        samples.append(
            {
                "language": question.language,
                "question": question.question,
                "trained_for": question.answer,
                "base": base,
                "adapter": answer(model, tokenizer, prompt),
            }
        )
    if processes.is_first():
        text = json.dumps(samples, indent=2, ensure_ascii=False) + "\n"
        (folder / "samples.json").write_text(text, encoding="utf-8")


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The model's greedy answer to a conversation."""
    import torch

    ids = torch.tensor([render_ids(tokenizer, messages, add_generation_prompt=True)], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
