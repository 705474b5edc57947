"""All commands of restnet-hf in one app. Importing it brings no torch: each command imports what it runs."""

from restnet_hf.cli import jobs, use, device, share, pages, cache  # noqa: I001  each adds its commands, in this order
from restnet_hf.cli.base import app


__all__ = ["app", "cache", "device", "jobs", "pages", "share", "use"]
