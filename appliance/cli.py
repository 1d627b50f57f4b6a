"""The root of the command line. Subcommands are imported when named; `--help` imports neither torch nor llama_cpp."""

import importlib
from collections.abc import Mapping

import click

from appliance import __version__
from appliance.console import Command
from appliance.errors import NotAvailableYet

PLANNED = "(planned)"

# name -> "module:attribute" of its Click command, or "(planned) summary" for a command that a later version fills.
COMMANDS: Mapping[str, str | Mapping[str, str]] = {
    "doctor": "appliance.commands.doctor:doctor",
    "init": f"{PLANNED} A new assistant: recipe and sample data to replace.",
    "pull": "appliance.commands.pull:pull",
    "data": {
        "check": "appliance.commands.data:check",
        "audit": "appliance.commands.data:audit",
        "split": "appliance.commands.data:split",
        "generate": f"{PLANNED} More examples, written by a model.",
    },
    "plan": "appliance.commands.plan:plan",
    "train": "appliance.commands.train:train",
    "convert": {
        "merge": "convert.merge:merge",
        "gguf": "convert.to_gguf:gguf",
        "imatrix": "convert.imatrix:imatrix",
        "sensitivity": "convert.sensitivity:sensitivity",
        "quantize": "convert.quantize:quantize",
        "adapter": "convert.adapter:adapter",
        "onnx": "convert.to_onnx:onnx",
        "verify": "convert.verify:verify",
    },
    "run": "appliance.commands.run:run",
    "runs": {
        "list": "appliance.commands.runs:list_runs",
        "compare": "appliance.commands.runs:compare",
        "diagnose": "appliance.commands.runs:diagnose",
    },
    "models": {
        "list": "appliance.commands.models:list_models",
        "show": "appliance.commands.models:show",
        "promote": "appliance.commands.models:promote",
        "rollback": "appliance.commands.models:rollback",
        "remove": "appliance.commands.models:remove",
        "export": "appliance.commands.models:export_model",
        "import": "appliance.commands.models:import_model",
    },
    "serve": "appliance.commands.serve:serve",
    "chat": "appliance.commands.chat:chat",
    "knowledge": {
        name: f"{PLANNED} {summary}"
        for name, summary in {
            "add": "Read documents into the knowledge base.",
            "list": "What the knowledge base holds.",
            "search": "Find passages.",
            "warm": "Read passages ahead of time.",
            "remove": "Take a document out.",
            "prove-erased": "Show that nothing of a document is left.",
        }.items()
    },
    "desk": {"list": f"{PLANNED} Questions waiting for a person.", "answer": f"{PLANNED} Answer one."},
    "eval": {
        "run": f"{PLANNED} Measure a model on a suite.",
        "boolean": f"{PLANNED} Measure Boolean queries.",
        "truth": f"{PLANNED} Measure truthfulness.",
    },
    "select": f"{PLANNED} Choose a model by measurement.",
    "bench": {"serve": "appliance.commands.bench:bench_serve", "train": f"{PLANNED} How fast it trains."},
    "keys": {
        "create": "appliance.commands.keys:create",
        "list": "appliance.commands.keys:list_keys",
        "revoke": "appliance.commands.keys:revoke",
    },
    "backup": f"{PLANNED} The encrypted state in one file.",
    "restore": f"{PLANNED} Take a backup in.",
}


class LazyGroup(click.Group):
    """A group whose commands are resolved from a table when they are named."""

    def __init__(self, name: str, table: Mapping[str, str | Mapping[str, str]], help_text: str) -> None:
        super().__init__(name, help=help_text)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (the interface of click.Group)
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self._table.get(cmd_name)
        if entry is None:
            return None
        if isinstance(entry, Mapping):
            return LazyGroup(cmd_name, entry, f"{cmd_name.capitalize()}: {', '.join(entry)}.")
        if entry.startswith(PLANNED):
            return _planned(f"{ctx.command_path.partition(' ')[2]} {cmd_name}".strip(), entry)
        module, _, attribute = entry.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


def _planned(name: str, summary: str) -> click.Command:
    def refuse(**_: object) -> None:
        raise NotAvailableYet(f"`appliance {name}` is not built yet; this version {__version__} only reserves its name.")

    settings = {"ignore_unknown_options": True}
    command = click.command(name.split()[-1], cls=Command, help=summary, context_settings=settings)(refuse)
    command.params += [click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)]
    return command


main = LazyGroup(
    "appliance",
    COMMANDS,
    "Train a small private assistant on your own examples, and serve it on the hardware you have.",
)
main = click.version_option(__version__, prog_name="appliance")(main)
