"""Writes what is generated here: `python -m deploy.generate`. Dashboards come from dashboards/, vllm.yml from vllm.py."""

from pathlib import Path

from deploy import vllm
from deploy.dashboards import DASHBOARDS
from deploy.panels import grafana

FOLDER = Path(__file__).parent
HEAD = "# Made by `python -m deploy.generate` from vllm.py.\ngroups:\n  - name: vllm\n    rules:\n"


def files() -> dict[Path, str]:
    """Contents by path."""
    found = {FOLDER / f"grafana/dashboards/{name}.json": grafana(board) for name, board in DASHBOARDS.items()}
    entries = (f"      - record: {name}\n        expr: '{expression}'\n" for name, expression in vllm.rules().items())
    found[FOLDER / "prometheus/vllm.yml"] = HEAD + "".join(entries)
    return found


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content)
