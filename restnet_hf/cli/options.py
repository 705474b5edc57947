"""Options that several commands share, and texts of options as values."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from restnet_hf.routes.profile import Budget


if TYPE_CHECKING:
    from restnet_hf.modeling_restnet import StitchedModelForImageClassification

Front = Annotated[str | None, typer.Option(help="Anchor whose early blocks run: Hub id or local folder.")]
End = Annotated[str | None, typer.Option(help="Anchor whose late blocks run: Hub id or local folder.")]
Data = Annotated[str | None, typer.Option("--dataset", help="Labelled images: Hub id or local folder.")]
Out = Annotated[Path, typer.Option(help="Folder for the adapter, the report and the pictures.")]
Adapter = Annotated[str, typer.Argument(help="Adapter: Hub id or local folder.")]
Threads = Annotated[
    int | None, typer.Option(help="Number of threads of the processor; by default as many as torch uses.")
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        help="Lowest share of images, from 0 to 1, on which an exported route must predict the same class; 0.98 "
        "without --max-accuracy-drop."
    ),
]
MaxAccuracyDrop = Annotated[
    float | None,
    typer.Option(
        help="Most that an exported route may lose of the accuracy, in percentage points, with 95 % confidence; "
        "give labelled --data and thousands of --images."
    ),
]
WithPreprocessing = Annotated[
    bool,
    typer.Option(
        "--with-preprocessing", help="Write files that take pixels (N, H, W, 3) in uint8 and return probabilities."
    ),
]
Target = Annotated[str, typer.Option(help="Processor to quantise for: auto (this one), x86-avx2, x86-vnni or arm.")]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run has written there.")]
BudgetTexts = Annotated[
    list[str] | None, typer.Option(help="Limit on a cost, as macs=1e9; may be given several times.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Device whose latencies others published beside the adapter, for limits in milliseconds on it."),
]


def parse_budget(texts: Iterable[str]) -> Budget:
    """A budget from texts such as ``latency_ms=20``.

    Args:
        texts: limits, each the name of a cost, ``=`` and a number.

    Raises:
        typer.BadParameter: a text is not the name of a cost and a number.
    """
    limits = dict(text.partition("=")[::2] for text in texts)
    try:
        return Budget(**{cost.strip(): float(limit) for cost, limit in limits.items()})
    except (TypeError, ValueError) as error:
        names = ", ".join(field.name for field in fields(Budget))
        raise typer.BadParameter(
            f"--budget {' --budget '.join(texts)} must be of the form COST=NUMBER, COST one of {names}: {error}"
        ) from error


def is_exported(adapter: str) -> bool:
    """Whether a path is a folder of exported routes, and not an adapter.

    Args:
        adapter: Hub id or local folder.
    """
    from restnet_hf.runtime.exported_files import LABELS

    return (Path(adapter) / LABELS).is_file()


def load_here(
    adapter: str, threads: int | None, device: str | None = None, budget: Budget | None = None
) -> "StitchedModelForImageClassification":
    """Load an adapter on this process's device.

    Args:
        adapter: Hub id or local folder.
        threads: number of threads of the processor; None for torch's own choice.
        device: device whose published latencies replace those of the profile; None for the profile's own.
        budget: limits within which the best route or cascade is made active; None for what was active.
    """
    import torch

    from restnet_hf.distributed import this_process
    from restnet_hf.modeling_restnet import StitchedModelForImageClassification

    if threads is not None:
        torch.set_num_threads(threads)
    model = StitchedModelForImageClassification.from_pretrained(adapter, device=device, budget=budget)
    return model.to(this_process().device)
