"""Messages of the library in the words of the command line: ``max_routes=0`` is ``--max-routes 0``."""

import re
from collections.abc import Collection


ALIASES = {"resume_from_checkpoint": "resume", "output_dir": "out"}  # Python: option
SENTENCES = {  # what the library advises, and what does it here
    r"call (?:model\.)?profile\(\)( first)?": r"run `restnet-hf profile ADAPTER --data DIR_OR_ID`\1",
    r"\(torch\.set_num_threads\)": "(--threads)",
}


def flag(option: str) -> str:
    """The flag of an option: ``--max-routes`` for ``max_routes``."""
    return "--" + option.replace("_", "-")


def in_flags(text: str, options: Collection[str]) -> str:
    """A message of the library with the names of Python's arguments as flags of a command.

    Args:
        text: message of an error.
        options: names of the options that the command has; others, such as entries of a recipe, stay as they are.
    """
    names = {name: name for name in options} | {name: to for name, to in ALIASES.items() if to in options}
    if names:
        either = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
        text = re.sub(
            rf"(?<![\w.-])({either})=(True\b|'[^']*'|[^\s,;:)]+)",
            lambda match: flag(names[match[1]]) + ("" if match[2] == "True" else f" {match[2]}"),
            text,
        )
        for alias in ALIASES.keys() & names.keys():
            text = re.sub(rf"\b{alias}\b", flag(names[alias]), text)
    for pattern, sentence in SENTENCES.items():
        text = re.sub(pattern, sentence, text)
    return text
