"""Runs llama.cpp's `convert_hf_to_gguf.py` in this process, which is a subprocess of `convert.to_gguf`.

Usage: python -m convert.upstream CONVERTER_FOLDER PRE_TOKENIZER|- ARGUMENTS... The one thing changed: a tokenizer whose
hash the converter does not know gets the pre-tokenizer named here instead of an error.
"""

import runpy
import sys


def main() -> None:
    folder, pre_tokenizer, *arguments = sys.argv[1:]
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    if pre_tokenizer != "-":
        from conversion.base import TextModel  # type: ignore[import-not-found]

        by_hash = TextModel.get_vocab_base_pre

        def get_vocab_base_pre(self: object, tokenizer: object) -> str:
            try:
                return str(by_hash(self, tokenizer))
            except NotImplementedError:
                return pre_tokenizer

        TextModel.get_vocab_base_pre = get_vocab_base_pre
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
