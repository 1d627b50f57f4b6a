"""How a document stands in a prompt.

Each document is tokenised by itself, so that its tokens are the same whatever stands before it.
"""

import json

SEPARATOR = "\n\n"  # between the system prompt and the first document


def shown(name: str, text: str) -> str:
    """The text of a document in a prompt, with the name by which an answer may refer to it."""
    return f"<document id={json.dumps(name, ensure_ascii=False)}>\n{text.strip()}\n</document>\n"
