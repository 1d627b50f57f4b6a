"""Our importance matrix beside the one of llama.cpp's own tool, built from the same source, on the same token ids."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from convert import imatrix
from convert.gguf_model import GgufVocabulary
from convert.mapped_model import MappedModel
from tests.running import Trained

CHUNK_TOKENS, CHUNKS = 128, 4
# The 16-bit file rounds inputs of each product to 16 bits (11 bits of mantissa), which the merged model's float32 does not.
ROUNDING = 5e-3


@pytest.mark.slow
def test_equals_that_of_llama_cpp(trained: Trained, tmp_path: Path) -> None:
    peers.ensure_programs()
    text, output = tmp_path / "text.txt", tmp_path / "theirs.gguf"
    text.write_text("\n".join((trained.made["data"] / "sft.jsonl").read_text() for _ in range(3)))
    sizes = ("-c", str(CHUNK_TOKENS), "-b", str(CHUNK_TOKENS), "-ub", str(CHUNK_TOKENS), "--chunks", str(CHUNKS))
    command = [peers.binary("llama-imatrix"), "-m", trained.full, "-f", text, "-o", output, *sizes, "--no-ppl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    theirs = imatrix.read(output)

    with GgufVocabulary(trained.full) as vocabulary:
        assert vocabulary.metadata("tokenizer.ggml.add_bos_token") in (None, "false")
        ids = vocabulary.tokenize(text.read_text())[: CHUNK_TOKENS * CHUNKS]
    chunks = [ids[start : start + CHUNK_TOKENS] for start in range(0, len(ids), CHUNK_TOKENS)]
    assert [len(chunk) for chunk in chunks] == [CHUNK_TOKENS] * CHUNKS
    ours = imatrix.collect(MappedModel(trained.made["merge"]), chunks)
    assert ours.keys() == theirs.keys()
    for name, each in ours.items():
        assert each.tokens == CHUNK_TOKENS * CHUNKS
        np.testing.assert_allclose(each.means, theirs[name], rtol=ROUNDING, atol=ROUNDING * float(each.means.mean()))
    # And what is compared tells one matrix from another.
    assert not np.allclose(ours["blk.0.ffn_down.weight"].means, theirs["blk.1.ffn_down.weight"], rtol=0.5)
