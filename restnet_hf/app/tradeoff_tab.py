"""The tab Trade-off: every route and cascade by a cost and its accuracy; a mark that is pressed is chosen."""

from typing import Any

import gradio as gr

from restnet_hf.app.entries import LIMITED, AppModel, cost_ranges, describe_row
from restnet_hf.app.svg import PRESS, as_svg
from restnet_hf.profiling.plots import AXES, plot_tradeoff


def add_tradeoff_tab(app: AppModel, chosen: gr.State, tab: gr.Tab) -> None:
    """Add the contents of the tab, which are drawn when somebody looks at it.

    Args:
        app: model that the page shows.
        chosen: the entry that a visitor looks at, as text.
        tab: tab that holds the components.
    """
    scores = [name for name in ("accuracy", "agreement") if all(name in row.scores for row in app.profile.routes)]
    costs = [each.cost for each in cost_ranges(app.profile)]
    if not scores or not costs:
        gr.Markdown("The routes have no accuracies. Profile the model with labelled images, and open the page again.")
        return
    cost = gr.Radio(
        [(LIMITED[each][0], each) for each in costs], value=costs[0], label="Cost", elem_id="cost", interactive=True
    )
    chart = gr.HTML(elem_id="tradeoff", js_on_load=PRESS)
    every = [str(row.route) for row in app.profile.rows]
    entry = gr.Dropdown(every, label="Or choose an entry by name", elem_id="entry", interactive=True)
    line = gr.Markdown(elem_id="tradeoff-chosen")

    def draw(cost: str, current: str) -> tuple[str, str, str]:
        described = describe_row(app.profile[current], app.profile)
        return draw_tradeoff(app, cost, scores[0], current), f"**`{current}`**: {described}", current

    def press(cost: str, event: gr.EventData) -> tuple[str, str, str, str]:
        current = entry_of(app, event.mark)
        return current, *draw(cost, current)

    outputs = [chart, line, entry]
    gr.on([tab.select, cost.change], draw, [cost, chosen], outputs, show_progress="hidden")
    chart.click(press, cost, [chosen, *outputs], show_progress="hidden")
    entry.input(
        lambda cost, name: (name, *draw(cost, name)), [cost, entry], [chosen, *outputs], show_progress="hidden"
    )


def draw_tradeoff(app: AppModel, cost: str, score: str, current: str) -> str:
    """The chart as SVG, with a mark for each entry.

    Args:
        app: model that the page shows.
        cost: name of the cost.
        score: name of the score.
        current: entry that is marked.
    """
    marks = {
        f"entry-{number}": f"{row.route}: {describe_row(row, app.profile)}"
        for number, row in enumerate(app.profile.rows)
    }
    figure = plot_tradeoff(app.profile, cost=cost, score=score, active=current)
    return as_svg(figure, f"{score} of {len(marks)} routes and cascades against {AXES[cost][0]}", marks)


def entry_of(app: AppModel, mark: Any) -> str:
    """The entry of a mark that was pressed; raises ValueError where there is none."""
    kind, _, number = str(mark).partition("-")
    rows = app.profile.rows
    if kind != "entry" or not number.isdecimal() or int(number) >= len(rows):
        raise ValueError(f"there is no mark {mark!r}")
    return str(rows[int(number)].route)
