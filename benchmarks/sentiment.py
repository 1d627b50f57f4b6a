"""A small classifier of sentiment, trained on the spot: a BERT of two layers with a vocabulary of its own."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.training import loop

VOCABULARY, WIDTH, MOST_TOKENS = 3000, 96, 64
EPOCHS, BATCH, LEARNING_RATE = 8, 32, 1e-3
KEPT_OUT = 10  # every tenth sentence is not trained on
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def train(folder: Path, rows: Sequence[tuple[str, str]], seed: int = 1) -> float:
    """Trains on (text, label) and saves the model as the hub has them; returns its accuracy on the rows kept out."""
    import torch

    loop.prepare()
    shutil.rmtree(folder, ignore_errors=True)
    labels = sorted({label for _, label in rows})
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    held, learned = shuffled[::KEPT_OUT], [row for i, row in enumerate(shuffled) if i % KEPT_OUT]
    tokenizer = _tokenizer([text for text, _ in learned])
    torch.manual_seed(seed)
    model = _model(labels)
    weights = [len(learned) / count for _, count in sorted(Counter(label for _, label in learned).items())]
    _fit(model, tokenizer, learned, labels, weights, seed)
    model.eval()
    right: int = sum(labels[_logits(model, tokenizer, [text])[0].argmax()] == label for text, label in held)
    _save(folder, model, tokenizer)
    return right / len(held)


def _fit(
    model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]], labels: Sequence[str], weights: Sequence[float], seed: int
) -> None:
    """Rare labels count more, so that the commonest is not always the best guess."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    weighed = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights), label_smoothing=0.1)
    chance = random.Random(seed)
    model.train()
    for _ in range(EPOCHS):
        order = chance.sample(list(rows), len(rows))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            wanted = torch.tensor([labels.index(label) for _, label in batch])
            loss = weighed(_logits(model, tokenizer, [text for text, _ in batch]), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _logits(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    import torch

    encoded = [each.ids[:MOST_TOKENS] for each in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, encoded))
    ids = torch.tensor([each + [0] * (longest - len(each)) for each in encoded])
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in encoded])
    return model(input_ids=ids, attention_mask=mask).logits


def _model(labels: Sequence[str]) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    shape = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=MOST_TOKENS,
        hidden_dropout_prob=0.2,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: position for position, label in enumerate(labels)},
        pad_token_id=0,
    )
    return BertForSequenceClassification(shape)


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MOST_TOKENS, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
