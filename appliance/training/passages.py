"""The phase that learns to answer from documents which were read each by itself: LoRA self-distillation.

Teacher is the adapter as it came (a frozen copy), with ordinary attention over the whole prompt; the student, which
continues it, sees documents apart (`blocks.py`) and learns to say what the teacher says. Main entry: `train`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data import examples
from appliance.data.check import read_rows
from appliance.data.documents import DOCUMENTS
from appliance.recipe import Recipe
from appliance.training import (
    adapters,
    batches,
    blocks,
    conversations,
    layout,
    loop,
    processes,
    run_files,
    samples,
)
from appliance.training import model as models
from appliance.training.conversations import Conversations
from appliance.training.labels import IGNORED, LabelledRow
from appliance.training.model import Base
from appliance.training.rungs import Rung

REVISION = 2  # raised when the same data and settings would give another adapter
MEASURED_ROWS = 128  # of a file, evenly: for each of three figures teacher and student read it
BLOCKS = "blocks"  # the column of a training set with the number of each token's block


def plan(recipe: Recipe, dataset: str, base: str, adapter: str) -> Plan:
    config = {"memory": plain(recipe.memory), "passages": plain(recipe.passages), "seed": recipe.seed}
    parents = [dataset, base, adapter]
    return Plan(
        kind="adapter", name=f"{recipe.name}-passages", inputs={"revision": REVISION}, parents=parents, config=config
    )


def train(recipe: Recipe, dataset: Path, base: Base, adapter: Path, root: Path, *, resume: bool, restart: bool) -> Artifact:
    """Trains on the recipe's rows with documents; `adapter` is that of the phase before, which is continued.

    Raises `DataError`, before any weight is loaded, where no row has documents or one is too long.
    """
    from transformers import set_seed

    from appliance.training import choice, divergence_head

    identity = plan(recipe, artifacts.identity(dataset), base.identity, artifacts.identity(adapter))
    checkpoint = processes.from_first(lambda: loop.resume_point(identity, root, resume=resume, restart=restart))
    read = processes.from_first(lambda: _read(recipe, dataset, base, root))
    processes.note(f"passages: {said_of_rows(read.labelled)}")
    rung = processes.from_first(
        lambda: choice.choose(recipe, base, choice.of_passages(recipe, read.labelled), checkpoint, adapter)
    )
    with processes.draft(identity, root, keep_partial=checkpoint is not None) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = adapters.continued(base, adapter, rung)
        adapters.copy_as_reference(model)
        trained = trainer(model, read.tokenizer, read.labelled, recipe, draft.path, rung)
        layout.settle(trained, rung)
        divergence_head.install(model)
        blocks.require_apart(trained)
        layout.remember(draft.path / loop.CHECKPOINTS, rung)
        outcome = loop.train(trained, draft.path, "passages", checkpoint, batches=batches.record(trained))
        outcome |= _measured(model, read)
        outcome["is_taken_back"] = not recipe.passages.sft_weight and not has_gained(outcome, recipe.passages.exact_share)
        if outcome["is_taken_back"]:
            adapters.take_back(model)
        models.save_adapter(model, draft.path)
        processes.note(f"passages: {in_words(outcome)}")
        rows = [row for row in read_rows(dataset, "sft") if row.get(DOCUMENTS)]
        samples.write(model, read.tokenizer, rows, recipe, draft.path)
        draft.results.update(outcome, **layout.results(rung), rows=len(read.rows), tokens=read.tokens)
        run_files.write(draft, identity, recipe, "passages", dataset, base)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def trainer(model: Any, tokenizer: Any, labelled: Sequence[LabelledRow], recipe: Recipe, folder: Path, rung: Rung) -> Any:
    """Of rows whose documents are apart, and of the share of them that is read as ordinarily, so that it stays as it is."""
    from datasets import Dataset
    from trl import SFTConfig

    settings = recipe.passages
    arguments = SFTConfig(
        **loop.arguments(folder, settings, recipe.seed, rung),
        max_length=None,  # lengths were checked; the trainer must not cut
        dataset_kwargs={"skip_prepare_dataset": True},  # tokens and labels are ours, verified
        remove_unused_columns=False,  # the collator and `batches` want the others
    )
    exact = examples.spread(labelled, round(settings.exact_share * len(labelled)))
    rows = [*((row, row.bounds) for row in labelled), *((row, ()) for row in exact)]
    data = Dataset.from_list(
        [
            {
                "input_ids": row.input_ids,
                "labels": row.labels,
                BLOCKS: blocks.of_row(len(row.input_ids), bounds),
                batches.LINE: row.line,
            }
            for row, bounds in rows
        ]
    )
    return _trainer_class(settings.sft_weight)(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=lambda each: collate(each, tokenizer.pad_token_id),
    )


def collate(rows: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Any]:
    """Rows padded at their ends, where no token before sees it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    filled = {"input_ids": padding, "labels": IGNORED, BLOCKS: blocks.FOLLOWS}
    return {
        key: pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=value)
        for key, value in filled.items()
    }


def distil(
    model: Any, trained: Any, batch: Mapping[str, Any], sft_weight: float = 0.0, student: str | None = None
) -> tuple[Any, Any, Any, Any]:
    """What `divergence_head.Divergence` says of a batch, for each of its tokens that is learned.

    `trained` is PEFT's model, `model` the same as it is wrapped for training. `student` reads with another adapter than the
    one that is trained.
    """
    import torch
    from trl.trainer.utils import use_adapter

    ids, labels = batch["input_ids"], batch["labels"]
    asked = torch.zeros_like(labels, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != IGNORED  # the state before a token says what it will be
    was_training = trained.training
    trained.eval()  # whoever teaches drops nothing out
    with torch.no_grad(), use_adapter(trained, adapters.REFERENCE):
        taught = trained(input_ids=ids, asked=asked)
    trained.train(was_training)
    added = blocks.mask(batch[BLOCKS], blocks.weight_type(trained))
    named = {"asked": asked, "taught": taught, "targets": labels[:, 1:][asked[:, :-1]], "sft_weight": sft_weight}
    if student is None:
        return model(input_ids=ids, attention_mask=added, **named)  # type: ignore[no-any-return]
    with use_adapter(trained, student):
        return model(input_ids=ids, attention_mask=added, **named)  # type: ignore[no-any-return]


def in_words(results: Mapping[str, Any]) -> str:
    """What the phase did, in a sentence or two."""
    said = [_in_words(results, "", f"over {results['measured_rows']} of its rows")]
    if "heldout_measured_rows" in results:
        said.append(_in_words(results, "heldout_", f"over {results['heldout_measured_rows']} held-out rows"))
    if results["is_taken_back"]:
        said.append("That is no gain: the adapter stays as it came.")
    return " ".join(said)


def has_gained(results: Mapping[str, Any], exact_share: float) -> bool:
    """Whether what was trained for fell, by held-out rows where there are any; ordinary reading was 0 from the teacher."""
    prefix = "heldout_" if "heldout_measured_rows" in results else ""
    after = results[f"{prefix}kl_after"] + exact_share * results[f"{prefix}kl_exact"]
    return bool(after < results[f"{prefix}kl_before"])


def said_of_rows(labelled: Sequence[LabelledRow]) -> str:
    told = sum(row.bounds[-1] - row.bounds[0] for row in labelled)
    tokens, learned = sum(len(row.input_ids) for row in labelled), sum(row.learned_tokens for row in labelled)
    return f"{len(labelled)} conversations with documents: {tokens:,} tokens, {told:,} of documents, {learned:,} of answers"


def _in_words(results: Mapping[str, Any], prefix: str, where: str) -> str:
    return (
        f"Divergence from ordinary reading, nats a token of the answer, {where}: {results[f'{prefix}kl_before']:.4f} before,"
        f" {results[f'{prefix}kl_after']:.4f} after (same likeliest token {results[f'{prefix}top1_before']:.1%},"
        f" {results[f'{prefix}top1_after']:.1%}); ordinary reading itself moved by {results[f'{prefix}kl_exact']:.4f}."
    )


def _read(recipe: Recipe, dataset: Path, base: Base, root: Path) -> Conversations:
    loop.require_space(base.path, root)
    return conversations.read_documents(recipe, dataset, base)


def _trainer_class(sft_weight: float) -> Any:
    import torch
    from trl import SFTTrainer

    class Distilling(SFTTrainer):  # type: ignore[misc]
        """SFT's trainer with another loss."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            assert not return_outputs  # nothing here evaluates so
            each, divergence, surprise, agrees = distil(model, self.model, inputs, sft_weight)
            count = len(each) if num_items_in_batch is None else num_items_in_batch
            loss = each.sum() / torch.as_tensor(count).clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
            self._tell(inputs, divergence, surprise, agrees)
            return loss

        def _tell(self, inputs: dict[str, Any], divergence: Any, surprise: Any, agrees: Any) -> None:
            tokens = torch.tensor([inputs["input_ids"].numel(), len(divergence)], device=divergence.device)
            sums = torch.stack((divergence.sum(), surprise.sum(), agrees.sum().float()))
            read, learned = self.accelerator.gather_for_metrics(tokens[None]).sum(0).tolist()
            kl, nll, same = self.accelerator.gather_for_metrics(sums[None]).sum(0).tolist()
            self._total_train_tokens += read
            told = self._metrics["train"]
            told["num_tokens"] = [self._total_train_tokens]
            for name, total in (("divergence", kl), ("nll", nll), ("top1", same)):
                told[name].append(total / max(1, learned))

    return Distilling


def _measured(model: Any, read: Conversations) -> dict[str, float]:
    """Both once training is over, as a model that is sharded is so from its first step. Every process must call it."""
    found: dict[str, float] = {}
    for prefix, rows in (("", read.labelled), ("heldout_", read.heldout)):
        chosen = examples.spread(rows, MEASURED_ROWS)
        if chosen:
            found |= {f"{prefix}{name}": value for name, value in measure(model, chosen).items()}
    return found


def measure(model: Any, rows: Sequence[LabelledRow]) -> dict[str, float]:
    """How far the model is from the teacher, in nats a token of the answers, and how often both agree on the likeliest.

    `before`: the adapter as it came, documents apart; `after`: as trained; `exact`: as trained, documents in their place.
    """
    import torch

    model.eval()
    conditions = {"before": (True, adapters.REFERENCE), "after": (True, "default"), "exact": (False, "default")}
    sums = {name: [0.0, 0.0] for name in conditions}
    for row in rows:
        for name, (is_apart, adapter) in conditions.items():
            numbers = blocks.of_row(len(row.input_ids), row.bounds if is_apart else ())
            batch = {"input_ids": row.input_ids, "labels": row.labels, BLOCKS: numbers}
            with torch.no_grad():
                tensors = {key: torch.tensor([value], device=model.device) for key, value in batch.items()}
                _, divergence, _, agrees = distil(model, model, tensors, student=adapter)
            sums[name][0] += float(divergence.double().sum())
            sums[name][1] += int(agrees.sum())
    tokens = sum(row.learned_tokens for row in rows)
    kl = {f"kl_{name}": total / tokens for name, (total, _) in sums.items()}
    return {**kl, **{f"top1_{name}": same / tokens for name, (_, same) in sums.items()}, "measured_rows": len(rows)}
