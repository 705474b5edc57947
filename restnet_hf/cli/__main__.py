"""Run the command line as ``python -m restnet_hf.cli``."""

from restnet_hf.cli.commands import app


app()
