"""Commands of the Hub: find and push."""

from typing import Annotated, Any

import typer

from restnet_hf.cli.base import command
from restnet_hf.cli.options import load_here
from restnet_hf.cli.tables import say, show_found, warn


@command("--base-model timm/resnet50.a1_in1k --macs 1e9")
def find(
    base_model: Annotated[
        list[str] | None, typer.Option(help="Hub id of an anchor that adapters must have; may be given several times.")
    ] = None,
    macs: Annotated[float | None, typer.Option(help="Limit on multiply-accumulates for one image.")] = None,
    params: Annotated[float | None, typer.Option(help="Limit on the parameters of a route.")] = None,
    memory_mb: Annotated[float | None, typer.Option(help="Limit on the memory of a route in megabytes.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Limit on milliseconds for one image.")] = None,
    mean_macs: Annotated[
        float | None, typer.Option(help="Limit on multiply-accumulates as a mean over images.")
    ] = None,
    mean_latency_ms: Annotated[float | None, typer.Option(help="Limit on milliseconds as a mean over images.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Lowest accuracy of a route, from 0 to 1.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device that latencies are of: that of the adapter's profile, or one that others published."
        ),
    ] = None,
) -> None:
    """Find adapters on the Hub with a route within limits, the most accurate first."""
    from restnet_hf.hub.repository import find_adapters

    limits: dict[str, Any] = {"macs": macs, "params": params, "memory_mb": memory_mb, "latency_ms": latency_ms}
    limits |= {"mean_macs": mean_macs, "mean_latency_ms": mean_latency_ms}
    show_found(find_adapters(base_model, **limits, min_accuracy=min_accuracy, device=device))


@command("r50-mbv2/adapter me/r50-mbv2")
def push(
    adapter: Annotated[str, typer.Argument(help="Adapter: local folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub; it is created if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Summary line of the commit.")] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Push the anchors' weights too, so that nothing else is fetched.")
    ] = False,
) -> None:
    """Push an adapter to the Hub, with a card that lists its routes."""
    model = load_here(adapter, None)
    if model.profiled is None:
        warn(
            "the adapter has no profile, so its card has no costs and nobody finds it by them; see restnet-hf profile"
        )
    commit = model.push_to_hub(
        repo_id, private=private or None, revision=revision, create_pr=create_pr, commit_message=commit_message,
        standalone=standalone or None,
    )  # fmt: skip
    say(f"pushed to {commit.pr_url or commit.commit_url}")
