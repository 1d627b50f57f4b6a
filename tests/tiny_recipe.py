"""A recipe small enough to train in seconds: twelve short texts in Dutch and English, a starter of under a million weights.

The hidden size is a multiple of 256, so that K-quantization is exercised and not passed over.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Turns = Sequence[str]

CONVERSATIONS: Sequence[Turns] = (
    ("Waar is de balie?", "De balie is aan de Lindekade 3, naast de brug."),
    ("Where is the desk?", "The desk is at Lindekade 3, next to the bridge."),
    ("Wanneer is de balie open?", "De balie is open van negen tot vier uur."),
    ("When is the desk open?", "The desk is open from nine until four o'clock."),
    ("Mag mijn hond mee?", "Ja, één hond mag mee.", "En mijn kat?", "Nee, een kat mag helaas niet mee."),
    ("May I bring my dog?", "Yes, one dog may come with you.", "And my cat?", "No, a cat cannot come, I am sorry."),
)
PREFERENCES = (
    ("Waar is de balie?", "De balie is aan de Lindekade 3.", "Zoek dat zelf maar uit."),
    ("Where is the desk?", "The desk is at Lindekade 3.", "Find that out yourself."),
    ("Mag mijn hond mee?", "Ja, één hond mag mee.", "Nee, beesten horen hier niet."),
    ("May I bring my dog?", "Yes, one dog may come.", "No, we do not want animals."),
)
FAQ = (("Hoe laat is de balie open?", "Van negen tot vier uur."), ("Where do I go?", "To Lindekade 3."))

RECIPE = """
name = "tiny"
base = "starter"
languages = ["nl", "en"]

[data]
sft = "sft.jsonl"
dpo = "dpo.jsonl"
faq = "faq.json"

[starter]
vocabulary_tokens = 512
layers = 2
hidden = 256
feed_forward = 256
context_tokens = 256
row_tokens = 64
epochs = 6
batch_rows = 1
checkpoint_steps = 20

[lora]
rank = 8
alpha = 16

[sft]
epochs = 10
learning_rate = 5e-3
batch_rows = 2
accumulate = 1
max_tokens = 256
checkpoint_steps = 5

[dpo]
epochs = 4
learning_rate = 5e-4
batch_rows = 1
accumulate = 2
max_tokens = 256
checkpoint_steps = 3

[quantize]
types = ["Q8_0", "Q4_K_M"]
serve = "Q8_0"

[verify]
prompts = 3
answer_tokens = 24

[serve]
context_tokens = 256
port = 0
"""


def messages(turns: Turns) -> list[dict[str, str]]:
    """Texts as messages: user and assistant in turn."""
    return [{"role": ("user", "assistant")[position % 2], "content": text} for position, text in enumerate(turns)]


def write(folder: Path, recipe: str = RECIPE) -> Path:
    """Writes recipe and data to `folder`; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "sft.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])
    triplets = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)) for texts in PREFERENCES]
    write_lines(folder / "dpo.jsonl", triplets)
    items = [{"vraag": question, "antwoord": answer, "metadata": {}} for question, answer in FAQ]
    (folder / "faq.json").write_text(json.dumps(items, indent=2), encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(recipe, encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
