"""`appliance pull`: fetches a base model from the Hugging Face hub, the only command that downloads."""

import click

from appliance import config
from appliance.console import Command, emit, human_bytes, json_option, note


@click.command(cls=Command)
@click.argument("model", metavar="ID[@REVISION]")
@json_option
def pull(model: str, as_json: bool) -> None:
    """Fetch a base model (safetensors only) and keep the hash of every file."""
    from appliance.training import hub

    root = config.artifacts_root()
    wanted = hub.resolve(model)
    plan = hub.plan(wanted)
    state = "unchanged" if plan.existing(root) else "pulled"
    if state == "pulled":
        note(f"pull: {wanted.id} at {wanted.revision[:12]}, {len(wanted.files)} files, {human_bytes(wanted.size_bytes)}")
        hub.fetch(wanted, plan, root)
    emit({"artifact": plan.location(root), "state": state}, as_json, f"{plan.location(root)} ({state})")
