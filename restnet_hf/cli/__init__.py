"""The command line: restnet-hf."""

from restnet_hf.cli.commands import app


__all__ = ["app"]
