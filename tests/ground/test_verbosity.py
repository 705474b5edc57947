"""The level of the package's loggers comes from the environment."""

import logging

import pytest

from restnet_hf.verbosity import VARIABLES, set_verbosity


@pytest.fixture(autouse=True)
def logger(monkeypatch):
    logger = logging.getLogger("restnet_hf")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(logger, "handlers", [])
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return logger


@pytest.mark.parametrize(
    ("own", "of_transformers", "level"),
    [
        (None, None, logging.NOTSET),
        ("error", None, logging.ERROR),
        (None, "critical", logging.CRITICAL),
        ("INFO", "error", logging.INFO),
        (None, "detail", logging.NOTSET),
    ],
)
def test_levels(monkeypatch, logger, own, of_transformers, level):
    for name, value in zip(VARIABLES, (own, of_transformers), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    set_verbosity()
    assert logger.level == level and bool(logger.handlers) == (level == logging.INFO)


def test_an_unknown_level(monkeypatch):
    monkeypatch.setenv(VARIABLES[0], "loud")
    with pytest.raises(ValueError, match="RESTNET_HF_VERBOSITY='loud' is not one of"):
        set_verbosity()
