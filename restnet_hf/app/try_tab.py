"""The tab Try: a picture, a limit for each cost, and what the best route or cascade within them answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from restnet_hf.app.entries import (
    AppModel,
    CostRange,
    best_entry,
    cost_ranges,
    describe_row,
    offered_entries,
    read_picture,
)
from restnet_hf.errors import BudgetError, PictureError


COLUMNS = ["route or cascade", "answer", "sure, %", "ms", "MACs, M", "right, %"]


def add_try_tab(app: AppModel, chosen: gr.State) -> list[tuple[Any, Any, Any]]:
    """Add the contents of the tab.

    Args:
        app: model that the page shows.
        chosen: the entry that a visitor looks at, as text.

    Returns:
        Functions with inputs and outputs, for the page to call when it loads.
    """
    ranges = cost_ranges(app.profile)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            picture, sliders = _add_inputs(app, ranges)
        with gr.Column(scale=3, min_width=300):
            status = gr.Markdown(elem_id="status")
            drawing = gr.HTML(elem_id="route")
            label = gr.Label(num_top_classes=5, label="Answer", elem_id="answer")
    compared = gr.Dataframe(
        headers=COLUMNS, label="The same picture under every entry", interactive=False, wrap=True,
        column_widths=["40%", "20%", "10%", "10%", "10%", "10%"], elem_id="compared",
    )  # fmt: skip
    outputs = [status, drawing, label]

    def choose(current: str, *limits: float) -> str:
        try:
            return best_entry(app.profile, ranges, limits)
        except BudgetError as error:
            gr.Warning(str(error), duration=5)
            return current

    def show(entry: str, path: str | None) -> tuple[str, str, dict[str, float] | None]:
        return show_entry(app, entry, path)

    def compare(path: str | None) -> list[list[Any]]:
        return compare_entries(app, path)

    def check(value: Any) -> str | None:
        return checked_upload(app, value, Path(picture.GRADIO_CACHE))

    path = gr.State(app.examples[0] if app.examples else None)
    # gradio's own errors name files of the server, so we look at the file ourselves
    picture.change(check, picture, path, preprocess=False, show_progress="hidden")
    path.change(show, [chosen, path], outputs, show_progress="hidden").then(compare, path, compared)
    for slider in sliders:
        slider.input(choose, [chosen, *sliders], chosen, trigger_mode="always_last", show_progress="hidden")
    chosen.change(show, [chosen, path], outputs, trigger_mode="always_last", show_progress="hidden")
    return [(show, [chosen, path], outputs), (compare, path, compared)]


def _add_inputs(app: AppModel, ranges: Sequence[CostRange]) -> tuple[gr.Image, list[gr.Slider]]:
    """Add the picture, examples, and a slider for the limit of each cost."""
    picture = gr.Image(
        label="Picture",
        type="filepath",
        image_mode=None,
        value=app.examples[0] if app.examples else None,
        sources=["upload", "clipboard"],
        height=260,
        elem_id="picture",
        alt_text="The picture to classify",
    )
    if app.examples:
        gr.Examples([[each] for each in app.examples], picture, label="Examples")
    sliders = []
    for each in ranges:
        options: dict[str, Any] = {"label": f"At most: {each.label}", "elem_id": f"limit-{each.cost}"}
        sliders.append(gr.Slider(each.low, each.high, each.high, step=each.step, **options))
    return picture, sliders


def show_entry(app: AppModel, entry: str, path: str | None) -> tuple[str, str, dict[str, float] | None]:
    """What the tab shows of an entry: a line of Markdown, the drawing, and probabilities.

    Args:
        app: model that the page shows.
        entry: route or cascade as text.
        path: file of the picture; None for none.
    """
    row = app.profile[entry]
    drawing = app.draw(entry)
    text = f"**`{entry}`**\n\n{describe_row(row, app.profile)}"
    if path is None:
        return f"{text}\n\nDrop a picture to classify it.", drawing, None
    (answer,) = app.run(path, [entry])
    by = "" if answer.answered_by == entry else f", answered by `{answer.answered_by}`"
    return f"{text}\n\nThis run: **{answer.milliseconds:.1f} ms**{by}", drawing, dict(answer.scores)


def compare_entries(app: AppModel, path: str | None) -> list[list[Any]]:
    """A row for each entry that is offered, with its answer for a picture; none without a picture.

    Args:
        app: model that the page shows.
        path: file of the picture; None for none.
    """
    if path is None:
        return []
    rows, entries = [], offered_entries(app.profile)
    for entry, answer in zip(entries, app.run(path, entries), strict=True):
        row = app.profile[entry]
        (name, score), *_ = answer.scores.items()
        macs = row.costs.get("mean_macs", row.costs.get("macs", 0.0)) / 1e6
        accuracy = 100 * row.scores["accuracy"] if "accuracy" in row.scores else None
        numbers = [100 * score, answer.milliseconds, macs, accuracy]
        rows.append([entry, name, *(None if x is None else round(x, 1) for x in numbers)])
    return rows


def checked_upload(app: AppModel, value: Any, uploads: Path) -> str | None:
    """The path of an uploaded picture that can be read; None where there is none.

    Args:
        app: model that the page shows.
        value: what the browser sent: a mapping with ``path``.
        uploads: folder of uploaded files.

    Raises:
        gr.Error: the picture cannot be read, which the page shows.
    """
    if value is None:
        return None
    path = Path(str(value.get("path") if isinstance(value, dict) else value)).resolve()
    if not path.is_relative_to(uploads.resolve()) or not path.is_file():
        raise gr.Error("Upload the picture again.", print_exception=False)
    try:
        read_picture(app.model, str(path))
    except PictureError as error:
        reason = str(error).replace(str(path), "").partition(". Repair")[0].strip()
        raise gr.Error(f"The picture {reason}. Choose another one.", duration=10, print_exception=False) from None
    return str(path)
