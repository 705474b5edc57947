"""The tab On this device: measured latency beside the predicted one, and a controller that follows a load."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gradio as gr
import torch

from restnet_hf.app.entries import AppModel, offered_entries
from restnet_hf.app.svg import as_svg
from restnet_hf.profiling.device import device_name
from restnet_hf.profiling.plots import ANCHOR, PALE, STITCHED, new_figure
from restnet_hf.routes.cascade import is_cascade
from restnet_hf.routes.profile import Budget
from restnet_hf.runtime.controller import Controller, Decision, median
from restnet_hf.steps import run_steps


ROUNDS, PIECES_S = 12, 3.0  # of measurements from end to end, and seconds for those of pieces
TICK_S, SHOWN = 0.5, 120  # seconds between the runs of a followed load, and number of them that are drawn
RUNS = 3  # in each tick
COLUMNS = ["route", "predicted, ms", "measured, ms", "runs"]


def add_device_tab(app: AppModel) -> None:
    """Add the contents of the tab.

    Args:
        app: model that the page shows.
    """
    gr.Markdown(f"This device: {device_name(app.model.device)}", elem_id="device")
    with gr.Row():
        start = gr.Button("Measure now", variant="primary", elem_id="measure")
        stop = gr.Button("Cancel", elem_id="cancel")
    state, note = gr.Markdown(elem_id="measuring"), gr.Markdown(elem_id="cancelled")
    table = gr.Dataframe(headers=COLUMNS, interactive=False, label="Predicted from pieces, and measured end to end")
    measuring = start.click(partial(measure, app), None, [state, table], concurrency_limit=1, show_progress="hidden")
    # a note of its own, since what runs in the moment may still report after it is cancelled
    stop.click(lambda: "Cancelled.", None, note, cancels=[measuring], show_progress="hidden")
    start.click(lambda: "", None, note, show_progress="hidden")
    if all("latency_ms" in row.costs for row in app.profile.routes):
        _add_controller(app)


def _add_controller(app: AppModel) -> None:
    """Add a load that a visitor changes, and the routes that a controller chooses meanwhile."""
    latencies = [row.costs["latency_ms"] for row in app.profile.routes]
    gr.Markdown("### Follow a budget\nA controller without torch switches routes while the load changes.")
    with gr.Row():
        most = gr.Slider(
            min(latencies), 3 * max(latencies), 1.3 * max(latencies), label="Budget: latency, ms", elem_id="follow-ms"
        )
        load = gr.Slider(1, 4, 1, label="Load: how many times slower the device is", elem_id="follow-load")
    with gr.Row():
        go = gr.Button("Start", elem_id="follow")
        halt = gr.Button("Stop", elem_id="halt")
    chart = gr.HTML(elem_id="following")
    followed, timer = gr.State(None), gr.Timer(TICK_S, active=False)
    go.click(lambda ms: (Followed.begin(app, ms), gr.Timer(active=True)), most, [followed, timer])
    halt.click(lambda: gr.Timer(active=False), None, timer)
    timer.tick(partial(follow, app), [followed, most, load], [followed, chart], show_progress="hidden")


@torch.inference_mode()
def measure(app: AppModel) -> Iterator[tuple[str, list[list[Any]]]]:
    """Measure the offered routes, round by round.

    Args:
        app: model that the page shows.

    Yields:
        What is being done, and a row for each route.
    """
    if not app.busy.acquire(blocking=False):
        raise gr.Error("Somebody else measures now, which would disturb both. Try again soon.", print_exception=False)
    try:
        yield "Measuring the pieces of all routes ...", []
        routes = [app.model.route(each) for each in offered_entries(app.profile) if not is_cascade(each)]
        latency = app.model.measure_latency(routes, seconds=PIECES_S)
        walks = [(route, app.model.steps(route)) for route in routes]
        times: dict[str, list[float]] = {str(route): [] for route in routes}
        for number in range(1, ROUNDS + 1):
            for route, steps in walks:
                x = torch.zeros(steps[0].shape, device=app.model.device, dtype=app.model.dtype)
                began = time.perf_counter()
                run_steps(x, steps)
                times[str(route)].append((time.perf_counter() - began) * 1e3)
            rows = [
                [str(route), round(latency.latency_ms(steps), 2), round(median(times[str(route)]), 2), number]
                for route, steps in walks
            ]
            yield f"Round {number} of {ROUNDS}", rows
        yield f"Done: {ROUNDS} rounds on {latency.device}.", rows
    except RuntimeError as error:  # times that scatter too widely
        raise gr.Error(str(error), print_exception=False) from error
    finally:
        app.busy.release()


@dataclass
class Followed:
    """A load that is followed: the controller, and what happened.

    Args:
        controller: controller of the budget.
        began: time of the start, in seconds.
        rows: seconds, latency in milliseconds, budget, and the route that ran.
    """

    controller: Controller
    began: float
    rows: list[tuple[float, float, float, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, app: AppModel, latency_ms: float) -> "Followed":
        """Begin with a budget."""
        return cls(Controller(app.profile, Budget(latency_ms=latency_ms)), time.monotonic())

    def observe(self, latency_ms: float, budget_ms: float) -> Decision:
        """Tell the controller of a run."""
        now = time.monotonic()
        if budget_ms != self.controller.budget.latency_ms:
            self.controller.set_budget(now, Budget(latency_ms=budget_ms))
        self.rows = [*self.rows[-SHOWN + 1 :], (now - self.began, latency_ms, budget_ms, str(self.controller.route))]
        return self.controller.observe(now, latency_ms=latency_ms)


@torch.inference_mode()
def follow(app: AppModel, followed: Followed | None, budget_ms: float, load: float) -> tuple[Followed | None, str]:
    """Run the controller's route, tell it the latency under a load, and draw what happened so far.

    Args:
        app: model that the page shows.
        followed: what is followed; None where nothing is.
        budget_ms: latency budget in milliseconds.
        load: factor on the measured latency.
    """
    if followed is None:
        return None, ""
    steps = app.model.steps(app.model.route(str(followed.controller.route)))
    x, times = torch.zeros(steps[0].shape, device=app.model.device, dtype=app.model.dtype), []
    for _ in range(RUNS):
        began = time.perf_counter()
        run_steps(x, steps)
        times.append((time.perf_counter() - began) * 1e3)
    decision = followed.observe(load * median(times), budget_ms)
    return followed, draw_followed(followed.rows, decision)


def draw_followed(rows: Sequence[tuple[float, float, float, str]], decision: Decision) -> str:
    """A chart of latency, budget and route over time, as SVG.

    Args:
        rows: seconds, latency in milliseconds, budget, and the route that ran.
        decision: what the controller decided last.
    """
    seconds, latencies, budgets, routes = zip(*rows, strict=True)
    names = list(dict.fromkeys(routes))
    figure = new_figure(7.0, 3.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1 + 0.3 * len(names)])
    above.plot(seconds, latencies, ".-", color=STITCHED, label="latency")
    above.plot(seconds, budgets, "--", color=ANCHOR, label="budget", drawstyle="steps-post")
    above.set_ylabel("ms")
    above.set_ylim(bottom=0)
    above.legend(fontsize=8, loc="upper left")
    below.plot(seconds, [names.index(route) for route in routes], "-", color=PALE, drawstyle="steps-post", zorder=0)
    below.plot(seconds, [names.index(route) for route in routes], "s", color=STITCHED, markersize=4)
    below.set_yticks(range(len(names)), labels=names, fontsize=7, parse_math=False)
    below.set_ylim(-0.5, len(names) - 0.5)
    below.set_xlabel("seconds")
    now = f"{latencies[-1]:.1f} ms of {budgets[-1]:.1f} by {decision.route}. {decision.reason}"
    return as_svg(figure, f"Latency, budget and route over time; now {now}")
