"""The tab Share: the card as it would be pushed, the code that loads the adapter, and exports to download."""

import importlib.util
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from restnet_hf.app.entries import AppModel
from restnet_hf.export.export import export_routes
from restnet_hf.export.exporter import load_exporter
from restnet_hf.hub.cards import is_hub_id, make_card
from restnet_hf.routes.cascade import is_cascade
from restnet_hf.runtime.runners import RUNTIMES


NAME = "me/my-stitch"
LOAD = """from restnet_hf import StitchedModelForImageClassification

model = StitchedModelForImageClassification.from_pretrained("{name}")
print(model.predict("photo.jpg", {kind}="{entry}"))
"""
PUSH = """
model.push_to_hub("{name}")  # stitches, profile and card; the anchors are fetched from where they are
"""


def add_share_tab(app: AppModel, chosen: gr.State, tab: gr.Tab) -> None:
    """Add the contents of the tab, which are written when somebody looks at it.

    Args:
        app: model that the page shows.
        chosen: the entry that a visitor looks at, as text.
        tab: tab that holds the components.
    """
    name = gr.Textbox(NAME, label="Name on the Hub", elem_id="repo", max_lines=1)
    code = gr.Code(language="python", label="Load and push it", interactive=False, elem_id="code")
    with gr.Accordion("The card", open=False):
        card = gr.Code(language="markdown", label="README.md", interactive=False, elem_id="card")
    gr.Markdown("### Export\nThe chosen route or cascade as a folder that runs without torch, verified and measured.")
    with gr.Row():
        runtime = gr.Dropdown(installed_runtimes(), label="Runtime", elem_id="runtime", interactive=True)
        start = gr.Button("Export", variant="primary", elem_id="export", scale=0)
    done, file = gr.Markdown(elem_id="exported"), gr.File(label="Folder, as a zip file", interactive=False)
    write, texts = partial(write_texts, app), [code, card]
    gr.on([tab.select, name.change], write, [name, chosen], texts, show_progress="hidden")
    start.click(partial(export, app), [chosen, runtime], [done, file], concurrency_limit=1)


def write_texts(app: AppModel, name: str, entry: str) -> tuple[str, str]:
    """Code that loads the adapter, and its card.

    Args:
        app: model that the page shows.
        name: name on the Hub.
        entry: route or cascade as text.
    """
    if not is_hub_id(name):
        raise gr.Error("A name on the Hub is of the form user/name.", print_exception=False)
    kind = "cascade" if is_cascade(entry) else "route"
    code = LOAD.format(name=name, kind=kind, entry=entry) + PUSH.format(name=name)
    anchors = [{"license": None, **each} for each in app.model.config.anchors]
    return code, str(make_card(name, anchors, app.profile, training=app.model.config.training))


def installed_runtimes() -> list[str]:
    """The runtimes whose packages are installed; a package that is there may still fail when it is imported."""
    tops = {name: [each.partition(".")[0] for each in load_exporter(name).packages] for name in RUNTIMES}
    return [name for name, packages in tops.items() if all(map(importlib.util.find_spec, packages))]


def export(app: AppModel, entry: str, runtime: str) -> tuple[str, str]:
    """Export an entry.

    Args:
        app: model that the page shows.
        entry: route or cascade as text.
        runtime: one of the keys of `RUNTIMES`.

    Returns:
        What was written, and the path of a zip file.
    """
    place = Path(app.folder)
    named: dict[str, Any] = {"cascades": entry} if is_cascade(entry) else {"routes": entry}
    try:
        with app.busy:
            shutil.rmtree(place / runtime, ignore_errors=True)  # of the last visitor, who has the file
            exported = export_routes(app.model, place / runtime, runtime=runtime, data=app.images, **named)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    file = shutil.make_archive(str(place / f"{runtime}-route"), "zip", place / runtime)
    size = exported.profiled.metadata["size_mb"]
    row = exported.profiled[entry]
    latency = f", {row.costs['latency_ms']:.2f} ms here" if "latency_ms" in row.costs else ""
    return f"{size:.1f} MB{latency}. Run `python run.py PICTURE` in the folder.", file
