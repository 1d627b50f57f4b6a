"""Group relative policy optimization (Shao et al. 2024): answers of the model itself, judged by the recipe's rewards.

Continues the adapter of DPO or SFT, or that of an earlier round, with its frozen copy as reference. Rewards are tried by the
reward linter before the first step.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from appliance import artifacts
from appliance.artifacts import Artifact, Plan
from appliance.config import plain
from appliance.data import examples
from appliance.data.check import read_rows
from appliance.errors import ApplianceError, ArtifactError, TrainingFailed
from appliance.findings import Finding
from appliance.recipe import Recipe
from appliance.training import adapters, curve, layout, loop, processes, reward_linter, run_files, samples
from appliance.training import model as models
from appliance.training import prompts as prompting
from appliance.training.labels import render_ids
from appliance.training.model import Base
from appliance.training.rewards import registry
from appliance.training.rewards import reward as rewarding
from appliance.training.rewards.reward import Answer, Prompt, Reward
from appliance.training.rungs import Rung

REVISION = 1  # raised when the same data and settings would give another adapter
FINDINGS = run_files.REWARD_FINDINGS


def plan(recipe: Recipe, dataset: str, base: str, adapter: str) -> Plan:
    settings = {**plain(recipe.grpo), "rewards": registry.identities(recipe)}
    del settings["adapter"]  # a parent
    parents = [dataset, base, adapter]
    config = {"memory": plain(recipe.memory), "grpo": settings, "languages": list(recipe.languages), "seed": recipe.seed}
    return Plan(kind="adapter", name=f"{recipe.name}-grpo", inputs={"revision": REVISION}, parents=parents, config=config)


def train(recipe: Recipe, dataset: Path, base: Base, adapter: Path, root: Path, *, resume: bool, restart: bool) -> Artifact:
    """Trains on the prompts; `adapter` is the one to continue.

    Raises `VerificationFailed` for rewards that cannot be trained with, before the first step.
    """
    from transformers import set_seed

    from appliance.training import choice

    identity = plan(recipe, artifacts.identity(dataset), base.identity, artifacts.identity(adapter))
    checkpoint = processes.from_first(lambda: loop.resume_point(identity, root, resume=resume, restart=restart))
    tokenizer, prompts = processes.from_first(lambda: _read(recipe, dataset, base, adapter, root))
    rewards = _rewards(recipe, prompts)
    rung = processes.from_first(lambda: choice.choose(recipe, base, choice.of_grpo(recipe), checkpoint, adapter))
    with processes.draft(identity, root, keep_partial=checkpoint is not None) as draft:
        loop.prepare()
        set_seed(recipe.seed)
        model = adapters.continued(base, adapter, rung)
        groups = sample(model, tokenizer, examples.spread(prompts, recipe.grpo.lint_prompts), recipe)
        findings = processes.from_first(lambda: reward_linter.lint(rewards, prompts, groups, recipe.languages))
        _tell(findings, draft.path)
        trainer = _trainer(model, tokenizer, prompts, rewards, recipe, draft.path, rung)
        layout.settle(trainer, rung)
        layout.remember(draft.path / loop.CHECKPOINTS, rung)
        outcome = loop.train(trainer, draft.path, "grpo", checkpoint)
        models.save_adapter(model, draft.path)
        outcome |= processes.from_first(lambda: _outcome(draft.path, [reward.name for reward in rewards]))
        processes.note(
            f"grpo: mean reward {outcome['reward_first']:.3f} in the first fifth of the steps,"
            f" {outcome['reward_last']:.3f} in the last; {outcome['flat_groups']:.0%} of groups without spread"
        )
        samples.write(model, tokenizer, read_rows(dataset, "sft"), recipe, draft.path)
        draft.results.update(outcome, **layout.results(rung), rows=len(prompts), findings=len(findings))
        run_files.write(draft, identity, recipe, "grpo", dataset, base)
        loop.finish(draft.path)
    return processes.from_first(lambda: artifacts.load(identity.location(root)))


def sample(model: Any, tokenizer: Any, prompts: Sequence[Prompt], recipe: Recipe) -> list[list[Answer]]:
    """A group of answers to each prompt, as training will sample them. Every process must call it."""
    import torch

    model.eval()
    groups = []
    for prompt in prompts:
        ids = torch.tensor([render_ids(tokenizer, [dict(m) for m in prompt.messages], add_generation_prompt=True)])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=recipe.grpo.answer_tokens,
                do_sample=True,
                temperature=recipe.grpo.temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=recipe.grpo.answers,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        groups.append([Answer(prompt, text) for text in texts])
    return groups


def _read(recipe: Recipe, dataset: Path, base: Base, adapter: Path, root: Path) -> tuple[Any, list[Prompt]]:
    loop.require_space(base.path, root)
    if (adapter / artifacts.MANIFEST).exists() and base.identity not in (
        parents := artifacts.load(adapter).manifest["parents"]
    ):
        raise ArtifactError(
            f"{adapter} was trained on another base ({', '.join(parents)}) than {base.identity}; continue one of this base."
        )
    tokenizer = models.load_tokenizer(base.path)
    return tokenizer, prompting.read_checked(tokenizer, dataset, recipe)


def _rewards(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Reward]:
    """Made by each process for itself, since sessions and functions do not travel."""
    try:
        return registry.build(recipe, prompts)
    except ApplianceError as error:
        processes.fail(error)


def _tell(findings: Sequence[Finding], folder: Path) -> None:
    for finding in findings:
        processes.note(f"grpo: rewards: {finding}")
    if processes.is_first():
        text = json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False)
        (folder / FINDINGS).write_text(text + "\n", encoding="utf-8")


def _trainer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    recipe: Recipe,
    folder: Path,
    rung: Rung,
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    grpo = recipe.grpo
    arguments = GRPOConfig(
        **{**loop.arguments(folder, grpo, recipe.seed, rung), "num_train_epochs": 1},  # the order of prompts has them all
        num_generations=grpo.answers,
        max_completion_length=grpo.answer_tokens,
        temperature=grpo.temperature,
        beta=grpo.beta,
        shuffle_dataset=False,
        reward_weights=[reward.weight for reward in rewards],
    )
    per_step = grpo.batch_rows * grpo.accumulate // grpo.answers
    places = prompting.order(len(prompts), grpo.epochs, per_step, recipe.seed)
    data = Dataset.from_list([{"prompt": [dict(m) for m in prompts[i].messages], "row": i} for i in places])
    functions = [_function(reward, prompts, tokenizer) for reward in rewards]
    return GRPOTrainer(model=model, reward_funcs=functions, args=arguments, train_dataset=data, processing_class=tokenizer)


def _function(reward: Reward, prompts: Sequence[Prompt], tokenizer: Any) -> Callable[..., list[rewarding.Value]]:
    """The reward as TRL calls it; each answer brings its own row.

    The text comes from the tokens, as in `sample`: TRL's own has no thinking where the tokenizer can parse answers.
    """

    def score(completion_ids: Sequence[Sequence[int]], row: Sequence[int], **_: Any) -> list[rewarding.Value]:
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        answers = [Answer(prompts[i], text) for i, text in zip(row, texts, strict=True)]
        found = reward.score(answers)
        if (what := rewarding.malformed(found, len(answers))) is not None:
            raise TrainingFailed(f"The reward {reward.name} {what}. It was tried before training and did well then.")
        return rewarding.values(found)

    score.__name__ = reward.name  # under which TRL logs it
    return score


def _outcome(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What the rewards did, from the first fifth of the steps to the last."""
    lines = curve.read_lines(folder)
    loop.plot(lines, folder / "reward.png", "grpo", "reward")

    def course(key: str) -> tuple[float, float]:
        first, last = ([point[key] for point in part if key in point] for part in curve.fifths(lines))
        return _mean(first), _mean(last)

    first, last = course("reward")
    by_name = {name: course(f"rewards/{name}/mean") for name in names}
    return {
        "reward_first": first,
        "reward_last": last,
        "reward_spread": _mean([point["reward_std"] for point in lines]),
        "flat_groups": _mean([point["frac_reward_zero_std"] for point in lines]),
        "rewards": {name: {"first": start, "last": end} for name, (start, end) in by_name.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
