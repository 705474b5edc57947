"""Commands that make adapters, or choose what to make them of: demo, train, similarity and scout."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from restnet_hf.cli.base import command
from restnet_hf.cli.options import Data, End, Front, Out, Overwrite, Split, parse_budget
from restnet_hf.cli.outputs import Written, check_output, remove_outputs
from restnet_hf.cli.tables import say, show_compared, show_report, show_scouted, warn_of_few
from restnet_hf.demo.paths import DATA, END, FRONT, RECIPE


if TYPE_CHECKING:
    from restnet_hf.recipe import Recipe

WRITTEN = ("adapter", "report.json", "similarity.png", "tradeoff.png", "training")  # by a run of a recipe
SCOUTED = ("scout.json", "pairs.csv", "tradeoff.png", "recipe.yaml", ".scout")  # by a run of scout
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints of an earlier run in --out.")]


@command("--out restnet-demo")
def demo(
    out: Out = Path("restnet-demo"),
    front: Front = None,
    end: End = None,
    dataset: Data = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Stitch two small anchors that come with the package (or your own), on real images, and show the result."""
    if any((front, end, dataset)) and not all((front, end, dataset)):
        raise typer.BadParameter("give --front, --end and --dataset together, or none of them for the embedded demo")
    chosen = (front, end, dataset) if front else (str(FRONT), str(END), str(DATA))
    overrides = dict(zip(("front", "end", "dataset"), chosen, strict=True))

    def load() -> "Recipe":
        from restnet_hf.recipe import load_recipe

        return load_recipe(RECIPE, **overrides)

    _run_job(load, out, resume, overwrite)


@command("recipe.yaml --out r50-mbv2")
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of a recipe.", exists=True, dir_okay=False)],
    out: Out,
    front: Front = None,
    between: Annotated[
        list[str] | None,
        typer.Option(help="Another anchor of a family, between front and end; may be given several times, in order."),
    ] = None,
    end: End = None,
    dataset: Data = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Run a recipe: choose, fit, train and profile stitches, and save the adapter."""
    overrides = {"front": front, "between": between or None, "end": end, "dataset": dataset}

    def load() -> "Recipe":
        from restnet_hf.recipe import load_recipe

        return load_recipe(recipe, **overrides)

    _run_job(load, out, resume, overwrite)


def _run_job(load: "Callable[[], Recipe]", out: Path, resume: bool, overwrite: bool) -> None:
    """Load a recipe, run it and show its report; one that has finished is only shown where it is to be resumed."""
    if resume and overwrite:
        raise typer.BadParameter("give --resume to go on with the run in --out or --overwrite to replace it, not both")
    finished, written = (out / "report.json").exists(), Written(out, hidden={"training"})
    if not resume:
        stopped = (out / "training").exists() and not finished
        check_output(out, overwrite, "--resume to go on with the run in it, " if stopped else "")

    import restnet_hf.modeling_restnet  # noqa: F401  first, since the Auto classes of transformers import it in turn
    from restnet_hf.distributed import this_process
    from restnet_hf.recipe import run_recipe

    recipe = load()
    if overwrite:
        remove_outputs(out, WRITTEN)
    report = run_recipe(recipe, out, resume)
    state = this_process()
    if state.is_main_process:
        show_report(report)
        done = f"{out} holds this run already: it is finished, and nothing is left to resume"
        say(done if resume and finished else str(written))
    if state.num_processes > 1:
        state.destroy_process_group()


@command("timm/resnet50.a1_in1k timm/mobilenetv2_100.ra_in1k --dataset photos")
def similarity(
    front: Annotated[str, typer.Argument(help="Anchor whose early blocks run: Hub id or local folder.")],
    end: Annotated[str, typer.Argument(help="Anchor whose late blocks run: Hub id or local folder.")],
    dataset: Annotated[str, typer.Option(help="Images, labelled or not: Hub id or local folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the matrices and pictures.")] = Path("similarity"),
    method: Annotated[
        list[str] | None, typer.Option(help="Selector that compares cuts; may be given several times.")
    ] = None,
    split: Split = "train",
    images: Annotated[int, typer.Option(help="Number of images, chosen at random.", min=1)] = 512,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width of images in pixels; by default the anchors' own.", min=1)
    ] = None,
    max_routes: Annotated[int, typer.Option(help="Largest number of routes to choose.", min=1)] = 8,
    macs: Annotated[float | None, typer.Option(help="Limit on the multiply-accumulates of a route.")] = None,
    params: Annotated[float | None, typer.Option(help="Limit on the parameters of a route.")] = None,
    order: Annotated[str, typer.Option(help="Directions to compare: given, or auto for both.")] = "given",
    overwrite: Overwrite = False,
) -> None:
    """Compare two classifiers: print the routes on which they are best joined, write all values and a heat map."""
    check_output(out, overwrite)
    warn_of_few(images, "the comparison of cuts")
    written = Written(out)
    limits = {cost: limit for cost, limit in (("macs", macs), ("params", params)) if limit is not None}

    import restnet_hf.modeling_restnet  # noqa: F401  as above
    from restnet_hf.comparing import compare_anchors

    chosen = compare_anchors(
        front, end, dataset, out, method or ["cka"], split=split, images=images, image_size=image_size,
        max_routes=max_routes, budget=limits or None, order=order,
    )  # fmt: skip
    for name, rows in chosen.items():
        show_compared(name, rows)
    say(str(written))


EvalImages = Annotated[
    int,
    typer.Option(
        help="Largest number of images of --eval-split that anchors and cascades are scored on; a third of them "
        "only checks the winner.",
        min=4,
    ),
]


@command("timm/resnet50.a1_in1k timm/mobilenetv2_100.ra_in1k --dataset photos --budget mean_macs=2e9")
def scout(
    candidates: Annotated[list[str], typer.Argument(help="Classifiers to choose two of: Hub ids or local folders.")],
    dataset: Annotated[str, typer.Option(help="Labelled images: Hub id or local folder.")],
    budget: Annotated[
        list[str],
        typer.Option(help="Limit on macs, mean_macs, params or memory_mb, as macs=1e9; may be given several times."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the table, the picture and the recipe.")] = Path("scouted"),
    split: Annotated[str, typer.Option(help="Split that stitches are fitted on.")] = "train",
    eval_split: Annotated[
        str, typer.Option(help="Split that accuracies are predicted on; no candidate may be trained on it.")
    ] = "test",
    images: Annotated[
        int, typer.Option(help="Number of images to fit and test stitched routes on, half from each split.", min=8)
    ] = 2000,
    eval_images: EvalImages = 10_000,
    head_images: Annotated[
        int, typer.Option(help="Largest number of further images that new heads train on.", min=1)
    ] = 2000,
    image_size: Annotated[
        int | None, typer.Option(help="Height and width of images in pixels; by default the candidates' own.", min=1)
    ] = None,
    order: Annotated[str, typer.Option(help="Directions to join: given (the larger first) or auto (both).")] = "given",
    new_head: Annotated[
        bool | None,
        typer.Option(
            help="Give all candidates new heads, or leave out those with other classes; by default new heads where "
            "one of them has other classes."
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Find the two of many classifiers that are best stitched for a budget, and write a recipe for them."""
    if resume and overwrite:
        raise typer.BadParameter("give --resume to go on with the run in --out or --overwrite to replace it, not both")
    limits, written = parse_budget(budget), Written(out, hidden={".scout"})
    if not resume:
        stopped = (out / ".scout").exists()
        check_output(out, overwrite, "--resume to go on with the run in it, " if stopped else "")
    warn_of_few(images // 2, "the comparison of stitched routes")

    import restnet_hf.modeling_restnet  # noqa: F401  as above
    from restnet_hf.distributed import this_process
    from restnet_hf.scouting.scout import scout as run

    if overwrite:
        remove_outputs(out, SCOUTED)
    result = run(
        candidates, dataset, limits, out, split=split, eval_split=eval_split, images=images, eval_images=eval_images,
        head_images=head_images, image_size=image_size, order=order, new_head=new_head, resume=resume,
    )  # fmt: skip
    state = this_process()
    if state.is_main_process:
        show_scouted(result)
        _say_scouted(written, out)
    if state.num_processes > 1:
        state.destroy_process_group()


def _say_scouted(written: Written, out: Path) -> None:
    """Print what `scout` wrote, and the command to go on with."""
    names = written.names()
    say(str(written) if names else f"{out} holds this run already: it is finished, and nothing is left to resume")
    say(f"next: restnet-hf train {out / 'recipe.yaml'} --out ADAPTER")
