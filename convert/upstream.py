"""Runs a converter of llama.cpp in this process, which is a subprocess of `convert.converter`.

Usage: python -m convert.upstream CONVERTER_FOLDER SCRIPT PRE_TOKENIZER|- ARGUMENTS... Two things are changed:
- Where a pre-tokenizer is named, the file gets it. The converter recognizes tokenizers by a hash of some token ids, which
  knows no tokenizer of one's own, and can be misled: one of Llama 3's kind once had the hash of another model.
- An adapter of Ministral 3 is converted, and not its base model under the adapter's name: the converter's class for that
  architecture, with eyes or without, hands everything on to another one, which knows nothing of adapters.
"""

import runpy
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    folder, script, pre_tokenizer, *rest = arguments
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    if pre_tokenizer != "-":
        from conversion.base import TextModel  # type: ignore[import-not-found]

        TextModel.get_vocab_base_pre = lambda _self, _tokenizer: pre_tokenizer
    if "lora" in script:
        from conversion.base import ModelBase, ModelType
        from conversion.mistral3 import Mistral3Model  # type: ignore[import-not-found]

        for name in ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"):
            ModelBase._model_classes[ModelType.TEXT][name] = Mistral3Model.Ministral3Model
    sys.argv = [script, *rest]
    runpy.run_path(f"{folder}/{script}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
