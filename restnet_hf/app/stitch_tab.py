"""The tab Where to stitch: heat maps of selectors for two anchors; a cell that is pressed shows its route."""

from functools import lru_cache
from typing import Any

import gradio as gr
import numpy as np

from restnet_hf.app.entries import AppModel
from restnet_hf.app.svg import PRESS, as_svg
from restnet_hf.routes.route import Route
from restnet_hf.routes.tables import short_number
from restnet_hf.selection.plots import plot_similarity
from restnet_hf.selection.ranking import Similarity
from restnet_hf.selection.selectors import SELECTORS


MOST_IMAGES = 512
SHOWN = ("fitted_accuracy", "cka")  # selectors that are compared at first


def add_stitch_tab(app: AppModel) -> None:
    """Add the contents of the tab.

    Args:
        app: model that the page shows.
    """
    if len(app.model.anchors) < 2 or app.images is None:
        gr.Markdown("Open the page with images (`restnet-hf app ADAPTER --data DIR`) to compare cuts of two anchors.")
        return
    with gr.Row():
        methods = gr.CheckboxGroup(
            [*SELECTORS], value=["fitted_accuracy", "cka"], label="Selectors", elem_id="methods"
        )
        start = gr.Button("Compare", elem_id="compare", variant="primary", scale=0)
    maps = gr.HTML(elem_id="maps", js_on_load=PRESS)
    found = gr.Markdown("Press a cell to see its route.", elem_id="cell")

    @lru_cache
    def compare(wanted: tuple[str, ...]) -> dict[str, Similarity]:
        with app.busy:
            every = app.model.compare(app.images, [*wanted, "lstsq"], max_images=MOST_IMAGES)
        return {name: each[0] for name, each in every.items()}

    def draw(wanted: list[str]) -> str:
        if not wanted:
            raise gr.Error("Choose at least one selector.", print_exception=False)
        every = compare(tuple(sorted(wanted)))
        return draw_maps(app, [every[name] for name in sorted(wanted)])

    def press(wanted: list[str], event: gr.EventData) -> str:
        every = compare(tuple(sorted(wanted)))
        return describe_cell(app, [every[name] for name in sorted(wanted)], every["lstsq"], event.mark)

    start.click(draw, methods, maps, concurrency_limit=1)
    maps.click(press, methods, found, show_progress="hidden")


def draw_maps(app: AppModel, similarities: list[Similarity]) -> str:
    """Heat maps as SVG, with a mark for each cell.

    Args:
        app: model that the page shows.
        similarities: values of each selector.
    """
    marks = {}
    for number, each in enumerate(similarities):
        for row, column in zip(*np.nonzero(~np.ma.getmaskarray(each.values)), strict=True):
            value = f"{each.settings['method']} {each.values[row, column]:.3f}"
            marks[f"cell-{number}-{row}-{column}"] = f"{_route(each, row, column)}: {value}"
    figure = plot_similarity(similarities, app.model.routes, cells=True)
    names = ", ".join(str(each.settings["method"]) for each in similarities)
    return as_svg(figure, f"Heat maps of {names}", marks)


def describe_cell(app: AppModel, similarities: list[Similarity], fits: Similarity, mark: Any) -> str:
    """The route of a cell with its values and costs, as Markdown.

    Args:
        app: model that the page shows.
        similarities: values of each selector.
        fits: R² of least squares.
        mark: id of the cell.

    Raises:
        ValueError: there is no such cell.
    """
    kind, *numbers = str(mark).split("-")
    if kind != "cell" or len(numbers) != 3 or not all(each.isdecimal() for each in numbers):
        raise ValueError(f"there is no cell {mark!r}")
    number, row, column = map(int, numbers)
    if number >= len(similarities) or row >= len(fits.values) or column >= fits.values.shape[1]:
        raise ValueError(f"there is no cell {mark!r}")
    route = _route(similarities[number], row, column)
    values = ", ".join(f"{each.settings['method']} {each.values[row, column]:.3f}" for each in similarities)
    costs = app.model.route_costs()(route)
    fit = f"R² {fits.values[row, column]:.3f}"
    return (
        f"**`{route}`**: {values}; {fit}; {short_number(costs['macs'])} MACs, {short_number(costs['params'])} params"
    )


def _route(similarity: Similarity, row: int, column: int) -> Route:
    """The route that joins the cuts of a cell."""
    return Route.parse(f"{similarity.front}[:{row + 1}] + {similarity.end}[{column + 1}:]")
