"""A recipe whose rows have documents, run to its end: trained on, proven as far as asked, served accordingly."""

import json
from pathlib import Path

from appliance import artifacts, promotion
from appliance.serving import served_model
from tests import tiny_recipe
from tests.running import run
from tests.serving.serving_process import running_server

PLACES = {"balie": "Lindekade 3", "kat": "brug", "hond": "Lindekade 7", "tuin": "kade 9"}
PHASES = 'languages = ["nl"]\nphases = ["sft", "passages"]'
PASSAGES = "[passages]\nepochs = 1\nbatch_rows = 2\naccumulate = 1\nmax_tokens = 256\n\n[quantize]"
# A model of this size repeats what it was taught: how much its answers change is not what is tested here.
LIMITS = "answer_tokens = 24\npassages_questions = 20\npassages_kl_limit = 100.0\npassages_lost_limit = 1.0"
RECIPE = (
    tiny_recipe.RECIPE.replace('languages = ["nl", "en"]', PHASES)
    .replace("epochs = 10", "epochs = 2")
    .replace("[quantize]", PASSAGES)
    .replace("answer_tokens = 24", LIMITS)
    .replace('dpo = "dpo.jsonl"\n', "")
    .replace('types = ["Q8_0", "Q4_K_M"]', 'types = ["Q8_0"]')
)


def documents(shift: int) -> list[dict[str, str]]:
    names, places = list(PLACES), list(PLACES.values())
    return [
        {"id": name, "text": f"De {name} is aan de {places[(at + shift) % len(places)]}."}
        for at, name in enumerate(names[:2])
    ]


def test_documents_go_from_the_rows_to_the_server(tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "recipe", RECIPE)
    rows = [
        {"messages": tiny_recipe.messages((f"Waar is de balie {number}?", "Dat weet ik.")), "documents": documents(number)}
        for number in range(24)
    ]
    tiny_recipe.write_lines(tmp_path / "recipe" / "sft.jsonl", rows)
    root = tmp_path / "artifacts"
    done = run(root, "run", recipe, "--json")
    assert done.returncode == 0, done.stderr
    made = {step["step"]: Path(step["artifact"]) for step in json.loads(done.stdout)["steps"]}
    assert "passages" in made
    assert artifacts.identity(made["passages"]) in artifacts.load(made["merge"]).manifest["parents"]

    proof = artifacts.load(made["verify"]).results["passages"]
    assert (proof["questions"], proof["held_out"], proof["most_documents"]) == (20, 0, 2)
    assert proof["allowed_reread_tokens"] == 0, proof["reason"]
    assert "## Documents read by themselves (Q8_0)" in (made["verify"] / "certificate.md").read_text()
    current = promotion.current(root)
    assert current is not None
    assert served_model.find(None, root).proven_reread_tokens == 0

    with running_server(root=root) as server:
        response = server.chat("Waar is de balie?", max_tokens=2, documents=documents(1))
        assert response.json()["usage"]["prompt_tokens_details"]["reading"] == "stitched"
    again = run(root, "run", recipe, "--set", 'serve.documents="exact"', "--json")
    assert again.returncode == 0, again.stderr
    assert "passages" not in artifacts.load(Path(json.loads(again.stdout)["steps"][-2]["artifact"])).results
