"""The starter base model, made on the spot from the recipe's own files: for trying the appliance without a download.

A byte-level BPE tokenizer and a Qwen3 decoder of a few million parameters, trained from scratch on plain text (no chat
template: answering in turns is what the adapter learns). It knows the words of these files and nothing else.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.console import note
from appliance.data import documents
from appliance.data.check import read_rows
from appliance.recipe import Recipe, Starter
from appliance.training import loop
from appliance.training.model import TRAINING_TEMPLATE
from appliance.training_settings import Phase

REVISION = 1  # raised when the same data would give another model
# The pre-tokenizer of Qwen2 (tokenizer.json of Qwen/Qwen2.5-0.5B), which llama.cpp knows as "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CARD = """# A starter base model

Made by the appliance from the files of recipe {name!r} alone: {parameters:,} parameters, {tokens:,} tokens of text.
It is for trying the appliance where there is no network. It repeats those files and knows nothing else; for real use, set
`base` in the recipe to an instruction-tuned model and run `appliance pull`.
"""


def plan(recipe: Recipe, dataset: str) -> Plan:
    """The starter's identity; `dataset` is the id of the dataset artifact."""
    from appliance.config import plain

    config = {"starter": plain(recipe.starter), "seed": recipe.seed}
    return Plan(kind="base", name=f"{recipe.name}-starter", inputs={"revision": REVISION}, parents=[dataset], config=config)


def make(recipe: Recipe, dataset: Path, root: Path, *, resume: bool = False, restart: bool = False) -> Artifact:
    """Trains tokenizer and model, about three minutes on two cores; `dataset` is the dataset artifact's folder."""
    from transformers import set_seed

    identity = plan(recipe, artifacts.identity(dataset))
    loop.require_space(dataset, root)
    checkpoint = loop.resume_point(identity, root, resume=resume, restart=restart)
    with artifacts.create(identity, root, keep_partial=checkpoint is not None, is_resumable=True) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        texts = plain_texts(dataset)
        preferences = [row[key] for row in read_rows(dataset, "dpo") for key in ("chosen", "rejected")]
        tokenizer = make_tokenizer([*texts, *preferences], recipe.starter.vocabulary_tokens)
        model = make_model(recipe.starter, tokenizer)
        rows = _rows(tokenizer, texts, recipe.starter.row_tokens)
        tokens = sum(map(len, rows))
        note(
            f"starter: a base of {model.num_parameters():,} parameters from {tokens:,} tokens of this recipe's own text."
            " It is for trying the appliance: it knows only your files."
        )
        outcome = loop.train(_trainer(model, tokenizer, rows, recipe, draft.path), draft.path, "starter", checkpoint)
        renew_turn_tokens(model, tokenizer)
        save(model, tokenizer, draft.path)
        card = CARD.format(name=recipe.name, parameters=model.num_parameters(), tokens=tokens)
        (draft.path / "README.md").write_text(card)
        draft.results.update(outcome, parameters=model.num_parameters(), tokens=tokens, vocabulary=len(tokenizer))
        loop.finish(draft.path)
    return artifacts.load(identity.location(root))


def plain_texts(dataset: Path) -> list[str]:
    """What the base reads: documents, conversations and FAQ. Preferences are left to DPO, which has to learn something."""
    rows = read_rows(dataset, "sft")
    texts = ["\n".join([*documents.texts(row), *(each["content"] for each in row["messages"])]) for row in rows]
    return texts + [f"{row['question']}\n{row['answer']}" for row in read_rows(dataset, "faq")]


def make_tokenizer(texts: Sequence[str], vocabulary_tokens: int) -> Any:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer and ChatML's control tokens; decodes to the exact input."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, TURN_START, TURN_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(shape: Starter, tokenizer: Any) -> Any:
    """A Qwen3 decoder with random weights and tied embeddings."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=shape.context_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def renew_turn_tokens(model: Any, tokenizer: Any) -> None:
    """Gives the tokens of turns, which plain text never shows, new embeddings: random directions of the usual length.

    Training pushed them away from every hidden state, since they were never the next token; with tied embeddings no adapter
    could then make the model end a turn.
    """
    import torch

    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        usual_length = embeddings.norm(dim=1).mean()
        for token in tokenizer.convert_tokens_to_ids([TURN_START, TURN_END]):
            direction = torch.randn_like(embeddings[token])
            embeddings[token] = direction / direction.norm() * usual_length


def _rows(tokenizer: Any, texts: Sequence[str], row_tokens: int) -> list[list[int]]:
    """One row a text, ended by its own token; a text longer than `row_tokens` continues in the next row."""
    rows: list[list[int]] = []
    for text in texts:
        tokens = [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
        rows += [tokens[start : start + row_tokens] for start in range(0, len(tokens), row_tokens)]
    return rows


def _trainer(model: Any, tokenizer: Any, rows: list[list[int]], recipe: Recipe, folder: Path) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from appliance.training.optimizer import MuonWithAdamW

    shape = recipe.starter
    phase = Phase(
        epochs=shape.epochs,
        learning_rate=shape.learning_rate,
        batch_rows=shape.batch_rows,
        accumulate=1,
        checkpoint_steps=shape.checkpoint_steps,
    )
    settings = loop.arguments(folder, phase, recipe.seed)
    # A few million parameters need no card.
    unusual = {"use_cpu": True, "include_num_input_tokens_seen": "all"}
    arguments = TrainingArguments(**{**settings, **unusual})
    optimizer = MuonWithAdamW(
        model,
        muon_learning_rate=shape.matrix_learning_rate,
        learning_rate=shape.learning_rate,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(optimizer, None),
    )


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes both as other phases read a base, with the template that marks what is learned."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / TRAINING_TEMPLATE).write_text(MARKED_TEMPLATE)
    # transformers 5 writes this name; a reader that knows only the older one would see a class that it does not have.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
