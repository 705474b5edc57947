"""build: the page with all tabs, for ``restnet-hf app`` and for a Space."""

from collections.abc import Sequence
from threading import Thread
from typing import Any

import gradio as gr

from restnet_hf.app.device_tab import add_device_tab
from restnet_hf.app.entries import AppModel, check_model, first_entry
from restnet_hf.app.share_tab import add_share_tab
from restnet_hf.app.stitch_tab import add_stitch_tab
from restnet_hf.app.tradeoff_tab import add_tradeoff_tab
from restnet_hf.app.try_tab import add_try_tab
from restnet_hf.modeling_restnet import StitchedModelForImageClassification


TITLE = "One network out of two, cut to the size of any device"
MAX_UPLOAD = "20mb"
KEPT_S = 3600, 3600  # seconds between removals of uploads, and their age at which they are removed
CSS = """
.mark { cursor: pointer; pointer-events: all; }
.mark:hover, .mark:focus { outline: 2px solid currentColor; outline-offset: 2px; }
#picture img { min-width: 40%; }
#route, #tradeoff, #maps, #following { overflow-x: auto; }
"""


def build(model: StitchedModelForImageClassification, images: Any = None, examples: Sequence[str] = ()) -> gr.Blocks:
    """Make the page of a model.

    Nothing of a visitor is stored in the model: routes are passed with each call, so many can use the page at once.

    Args:
        model: model with a profile, best with cascades and with latencies of this device; see `record_latency`.
        images: images, labelled or not, in any form that `prepare_data` takes, to compare cuts and to verify exports.
        examples: paths of pictures to try.

    Raises:
        ValueError: the model has no profile.
    """
    check_model(model)
    app = AppModel(model, None if images is None else model.prepare_data(images), [*examples])
    Thread(target=app.draw_ahead).start()  # some seconds, in which a visitor still looks around
    with gr.Blocks(title="restnet-hf", analytics_enabled=False, delete_cache=KEPT_S) as page:
        chosen = gr.State(first_entry(model))
        gr.Markdown(f"# {TITLE}\n{' + '.join(f'`{name}`' for name in model.anchors)}")
        with gr.Tab("Try", id="try"):
            loads = add_try_tab(app, chosen)
        with gr.Tab("Trade-off", id="tradeoff") as tab:
            add_tradeoff_tab(app, chosen, tab)
        with gr.Tab("Where to stitch", id="stitch"):
            add_stitch_tab(app)
        with gr.Tab("On this device", id="device"):
            add_device_tab(app)
        with gr.Tab("Share", id="share") as tab:
            add_share_tab(app, chosen, tab)
        for function, inputs, outputs in loads:
            page.load(function, inputs, outputs, show_progress="hidden")
    return page


def launch_options() -> dict[str, Any]:
    """Options for ``page.launch``: limits on uploads, errors that are shown, and a style without fonts of others."""
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    return {
        "theme": theme,
        "css": CSS,
        "max_file_size": MAX_UPLOAD,
        "show_error": True,
        "ssr_mode": False,
    }
