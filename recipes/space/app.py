# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf[app,onnx]"]
# ///
"""A Space: the page of the embedded demo, or of the adapter that the Space's variable ADAPTER names."""

import os

from restnet_hf.app import build, launch_options
from restnet_hf.app.start import open_adapter, open_demo


adapter = os.environ.get("ADAPTER")
page = build(*(open_adapter(adapter) if adapter else open_demo()))

if __name__ == "__main__":
    page.launch(**launch_options())
