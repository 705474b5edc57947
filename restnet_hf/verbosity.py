"""How much this package logs: RESTNET_HF_VERBOSITY, or else TRANSFORMERS_VERBOSITY."""

import logging
import os


LEVELS = ("debug", "info", "warning", "error", "critical")
VARIABLES = ("RESTNET_HF_VERBOSITY", "TRANSFORMERS_VERBOSITY")


def set_verbosity() -> None:
    """Set the level of this package's loggers from the environment; without a variable it is Python's, ``warning``.

    Raises:
        ValueError: RESTNET_HF_VERBOSITY is not the name of a level.
    """
    value = next((value for name in VARIABLES if (value := os.environ.get(name, "").lower())), "")
    if value not in LEVELS:
        if os.environ.get(VARIABLES[0]):
            raise ValueError(f"{VARIABLES[0]}={value!r} is not one of {LEVELS}")
        return
    logger = logging.getLogger("restnet_hf")
    logger.setLevel(value.upper())
    if value in ("debug", "info") and not logger.handlers:  # Python itself shows warnings alone
        logger.addHandler(logging.StreamHandler())
