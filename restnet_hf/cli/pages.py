"""The command app: a page in the browser."""

import sys
from typing import Annotated

import typer

from restnet_hf.cli.base import command
from restnet_hf.cli.options import Data, End, Front
from restnet_hf.cli.tables import say


@command("me/r50-mbv2 --data photos")
def app(
    adapter: Annotated[
        str | None, typer.Argument(help="Adapter: Hub id or local folder; by default the embedded demo.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images to compare cuts, and to profile an adapter without a profile: Hub id or folder."),
    ] = None,
    front: Front = None,
    end: End = None,
    dataset: Data = None,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port to serve at; by default one from 7860 on.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Try budgets, routes and trade-offs on a page in the browser."""
    if any((front, end, dataset)) and (adapter or data or not all((front, end, dataset))):
        raise typer.BadParameter("give --front, --end and --dataset together, without an adapter or --data")
    if data and not adapter:
        raise typer.BadParameter("--data is for an adapter; two anchors take --dataset")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page needs gradio ({error}); pip install 'restnet-hf[app]'") from error

    from restnet_hf.app.build import build, launch_options
    from restnet_hf.app.start import open_adapter, open_anchors, open_demo

    if front and end and dataset:
        opened = open_anchors(front, end, dataset)
    else:
        opened = open_demo() if adapter is None else open_adapter(adapter, data)
    page = build(*opened)
    shown = browser and sys.stdout.isatty()
    _, address, _ = page.launch(
        **launch_options(), server_name=host, server_port=port, inbrowser=shown, quiet=True, prevent_thread_lock=True
    )
    say(f"{address} (Ctrl-C ends it)")
    page.block_thread()
