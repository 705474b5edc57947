"""The best route of a model on this device, found with its own images, which never leave it."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from datasets import Dataset, Image
from typer.testing import CliRunner

from restnet_hf import Anchor, Budget, BudgetError, Cascade, Route, StitchedModelForImageClassification, load_images
from restnet_hf.adaptation import scorer
from restnet_hf.adaptation.adapt import adapt, adapt_to
from restnet_hf.adaptation.scorer import Scorer
from restnet_hf.adaptation.search import SEARCHES
from restnet_hf.cli import app
from restnet_hf.cli.options import parse_budget
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.profiling import device
from restnet_hf.profiling import timing as timing_module
from restnet_hf.profiling.latency import LatencyTable


BROKEN = {3, 17, 18}
ROUTES = [f"resnet_fashion[:{i}] + vit_fashion[{j}:]" for i in (3, 5, 7) for j in (4, 6)]


@pytest.fixture(autouse=True)
def busy(monkeypatch):
    """Other tests run beside these, and latencies scatter."""
    monkeypatch.setattr(timing_module, "MAX_SPREAD", float("inf"))


@pytest.fixture(scope="module")
def adapter(clothes, tmp_path_factory):
    """The demo's anchors with six fitted stitches, as a folder."""
    demo_model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype=torch.float32)
    for route in ROUTES:
        demo_model.add_stitch(route)
    demo_model.fit_stitches(clothes(demo_model, "train", 256))
    folder = tmp_path_factory.mktemp("adapter")
    demo_model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(adapter):
    return StitchedModelForImageClassification.from_pretrained(adapter)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind != "exhaustive"))
        for kind in sorted({*SEARCHES} - {"ranked"})
    ],
)
def test_the_best_within_a_budget(model, clothes, kind):
    """What is chosen is what profiling everything would choose."""
    rows = clothes(model, "test", 200)
    exact = model.profile(rows)
    for macs in (8e6, 24e6, 60e6):
        found = adapt(model, rows, Budget(macs=macs), search=kind, max_evaluations=8 if kind == "evolution" else None)
        assert found.best.route == exact.best(Budget(macs=macs)).route == model.active_route
        assert found.best.scores == {"accuracy": exact.best(Budget(macs=macs)).scores["accuracy"]}
        assert found.score == "accuracy" and found.finished and not found.checks
        assert {each.route for each in found.rejected} == {*model.all_routes} - {found.best.route}
        over = {row.route for row in exact.routes if row.costs["macs"] > macs}
        assert {each.route for each in found.rejected if each.why == "over budget"} == over
        scores = {row.route: row.scores for row in exact.routes}
        assert all(row.scores in ({}, scores[row.route]) for row in model.profiled.routes), "no score of a few images"


def test_all_of_them_exactly(model, clothes):
    rows = clothes(model, "test", 100)
    exact = {row.route: row.scores for row in model.profile(rows).routes}
    adapt(model, rows, Budget(params=1e9), exact=True)
    assert {row.route: row.scores for row in model.profiled.routes} == exact


@torch.no_grad()
def test_without_labels(model, clothes):
    """The score is how often a route predicts the class that the largest anchor predicts."""
    rows = clothes(model, "test", 100)
    images = torch.stack([rows[index]["pixel_values"] for index in range(len(rows))])
    found = adapt(model, images, Budget(macs=24e6), exact=True)
    assert found.score == "agreement"
    predicted = {}
    for route in (found.best.route, "resnet_fashion[:]"):
        model.set_route(route)
        predicted[str(route)] = model(images).logits.argmax(-1)
    agrees = (predicted[str(found.best.route)] == predicted["resnet_fashion[:]"]).double().mean().item()
    assert found.best.scores == {"agreement": pytest.approx(agrees)}


@pytest.mark.slow
def test_a_batch_that_fits(model, clothes, monkeypatch):
    """Memory runs out above eight images; what is found is the same."""
    rows = clothes(model, "test", 40)
    images = torch.stack([rows[index]["pixel_values"] for index in range(len(rows))])
    expected = adapt(model, images, Budget(macs=24e6), exact=True)
    sizes, original = [], Anchor.capture

    def small(self, x, *args, **kwargs):
        sizes.append(len(x))
        if len(x) > 8 and racing:
            raise RuntimeError("CUDA out of memory.")
        return original(self, x, *args, **kwargs)

    racing: list[int] = []
    race = scorer.race_routes

    def watched(*args):
        racing.append(1)
        try:
            return race(*args)
        finally:
            racing.clear()

    monkeypatch.setattr(scorer, "race_routes", watched)
    monkeypatch.setattr(Anchor, "capture", small)
    found = adapt(model, images, Budget(macs=24e6), exact=True)
    assert found.best == expected.best and {32, 8} <= set(sizes)


@torch.no_grad()
@pytest.mark.parametrize("labels", [True, False])
def test_predictions_from_a_few_images(model, clothes, labels):
    """Every eighth of a hundred: the mean probability of the label, or of the largest anchor's class."""
    rows = clothes(model, "test", 100)
    images = torch.stack([rows[index]["pixel_values"] for index in range(100)])
    job = Scorer(model, rows if labels else images, 7, exact=True)
    job.fits = model.all_routes
    predict, taken = job.make_predictor("few_images", 4)
    assert len(job.fits) == 8 and taken == 1, "12 of 100 images for 8 routes"
    model.set_route("resnet_fashion[:]")
    right = model(images).logits.argmax(-1)
    if labels:
        right = torch.tensor([rows[index]["labels"] for index in range(100)])
    for route in model.all_routes:
        model.set_route(route)
        held = model(images[7::8]).logits.softmax(-1)[torch.arange(12), right[7::8]]
        assert predict(route) == pytest.approx(held.mean().item(), rel=1e-4)
    predict, taken = job.make_predictor("few_images", 1)
    assert taken == 1 and predict(route) is not None
    job = Scorer(model, images[:7], 7, exact=True)
    job.fits = model.all_routes
    predict, taken = job.make_predictor("few_images", 4)
    assert taken == 0 and predict(route) is None, "too few images to spare one"


def test_a_stream_with_broken_pictures_and_no_labels(model):
    """Each of the others is compared with what the largest anchor gives for the same picture."""
    rows = (
        load_images(DATA, "test").select(range(40)).remove_columns("label").cast_column("image", Image(decode=False))
    )
    files = [b"none" if number in BROKEN else row["image"]["bytes"] for number, row in enumerate(rows)]
    pictures = {"image": [{"bytes": each, "path": None} for each in files]}
    stream = Dataset.from_dict(pictures, features=rows.features).cast_column("image", Image())
    stream = stream.to_iterable_dataset(num_shards=2)
    found = adapt(model, stream, Budget(macs=1e12), batch_size=7, exact=True, on_error="skip")
    scores = {row.route: row.scores["agreement"] for row in model.profiled.routes}
    kept = model.prepare_data(rows.select(sorted({*range(40)} - BROKEN)).cast_column("image", Image()))
    expected = adapt(model, kept, Budget(macs=1e12), batch_size=7, exact=True)
    assert scores == {row.route: row.scores["agreement"] for row in model.profiled.routes}
    assert found.best == expected.best and scores[model.route("resnet_fashion[:]")] == 1


def test_predictions_from_similarity(model, clothes):
    rows = clothes(model, "test", 100)
    job = Scorer(model, rows, 32, exact=True)
    job.fits = model.all_routes
    predict, taken = job.make_predictor("lstsq", 4)
    [front, _] = model.compare(rows, ["lstsq"], order="auto", batch_size=32)["lstsq"]
    expected = [front.values[route.stitch_points[0].source_cut - 1, route.stitch_points[0].target_cut - 1]
                for route in model.routes]  # fmt: skip
    assert taken == 0 and [*map(predict, model.routes)] == pytest.approx(expected) and len(set(expected)) == 6
    assert predict(model.route("vit_fashion[:]")) is None


@pytest.mark.parametrize("predictor", [None, "few_images", "position"])
def test_evolution_with_each_predictor(model, clothes, predictor):
    """It keeps to the evaluations that there are, with those that the predictor took, and takes the best of them."""
    rows = clothes(model, "test", 50)
    found = adapt(
        model, rows, Budget(macs=60e6), search="evolution", predictor=predictor, max_evaluations=4, exact=True
    )
    evaluated = {row.route: row.scores["accuracy"] for row in model.profiled.routes if row.scores}
    assert len(evaluated) == (3 if predictor == "few_images" else 4)
    assert found.best.scores["accuracy"] == max(evaluated.values())


def test_energy(model, clothes, tmp_path, monkeypatch):
    """The large anchor takes 3 mJ a run and the small one 1 mJ; a route that runs some of both takes both."""
    rows = clothes(model, "test", 64)
    with pytest.raises(BudgetError, match="energy_j is not known: no energy counter .* limit latency_ms instead"):
        adapt(model, rows, Budget(energy_j=1), latency=model.measure_latency(seconds=0.0))
    domain = tmp_path / "intel-rapl:0"
    domain.mkdir()
    for file, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "1000000000000")):
        (domain / file).write_text(text)
    monkeypatch.setattr(device, "POWERCAP", tmp_path)
    monkeypatch.setattr(timing_module, "joules", lambda run, seconds: device.joules(run, 0.0))

    def spend(microjoules):
        (domain / "energy_uj").write_text(str(int((domain / "energy_uj").read_text()) + microjoules))

    costs = {"resnet_fashion": 3000, "vit_fashion": 1000}
    for name, cost in costs.items():
        model.anchors[name].register_forward_hook(lambda *_, cost=cost: spend(cost))
    table = model.measure_latency(seconds=0.0)
    powers = sorted(
        sum(costs[part.anchor] for part in model.route(name).segments) / check.measured.ms / 1e3
        for name, check in table.checks.items()
    )
    assert table.watts == pytest.approx((powers[(len(powers) - 1) // 2] + powers[len(powers) // 2]) / 2)
    found = adapt(model, rows, Budget(energy_j=1e3), latency=table, exact=True)
    for row in model.profiled.routes:
        energy, ms = row.costs["energy_j"], row.costs["latency_ms"]
        whole = sum(costs[part.anchor] for part in row.route.segments) / 1e6
        assert energy == pytest.approx(whole if row.route in found.checks else table.watts * ms / 1e3)
    assert found.best.route in found.checks
    assert model.set_budget(energy_j=1e3) == found.best.route
    with pytest.raises(BudgetError, match="no route fits energy_j<=1e-12"):
        adapt(model, rows, Budget(energy_j=1e-12), latency=table)


def test_latency_is_measured_from_end_to_end(model, clothes, tmp_path):
    rows = clothes(model, "test", 64)
    found = adapt_to(model, rows, Budget(latency_ms=1e4), tmp_path)
    assert found.best.route in found.checks
    assert found.best.costs["latency_ms"] == found.checks[found.best.route].measured.ms
    again = StitchedModelForImageClassification.from_pretrained(tmp_path)
    assert again.active_route == found.best.route and all("latency_ms" in row.costs for row in again.profiled.routes)
    table = LatencyTable.load(tmp_path / "latency.json")
    assert again.profiled.metadata["latency"]["device"] == table.device
    assert len(table.checks) >= 2 and not (tmp_path / "search.json").exists()
    again.set_budget(latency_ms=1e4)
    with pytest.raises(BudgetError, match="no route fits"):
        adapt(model, rows, Budget(latency_ms=1e-3), latency=table)


def test_a_busy_device(model, clothes):
    """Where routes take a thousand times as long as predicted, the choice is by what they take."""
    rows = clothes(model, "test", 64)
    table = model.measure_latency()
    short = {name: replace(timing, ms=timing.ms / 1000) for name, timing in table.entries.items()}
    table = replace(table, entries=short, checks={})
    assert max(table.latency_ms(model.steps(route)) for route in model.all_routes) < 0.2
    with pytest.raises(BudgetError, match="no route fits"):
        adapt(model, rows, Budget(latency_ms=0.2), latency=table)


@pytest.mark.slow
def test_goes_on_after_an_interrupt(model, clothes, tmp_path, monkeypatch):
    rows, state = clothes(model, "test", 96), tmp_path / "search.json"
    options = {"search": "evolution", "max_evaluations": 8}
    whole = adapt(model, rows, Budget(macs=40e6), **options)
    calls = []
    original = SEARCHES["evolution"].step

    def step(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(SEARCHES["evolution"], "step", step)
    first = adapt(model, rows, Budget(macs=40e6), state=state, **options)
    assert not first.finished and first.best.scores and state.exists()
    known = json.loads(state.read_text())["search"]["found"]
    assert 0 < len(known) < 8
    second = adapt(model, rows, Budget(macs=40e6), state=state, **options)
    assert second.finished and second.best == whole.best
    state.write_text("[]")
    with pytest.raises(ValueError, match="remove it to begin anew"):
        adapt(model, rows, Budget(macs=40e6), state=state, **options)


@pytest.mark.slow
def test_by_command_and_without_any_request(adapter, tmp_path, processes):
    """In a process that may not open a connection and is not told to stay offline."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('a request was made')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "import restnet_hf.profiling.timing\n"
        "from restnet_hf.cli import app\n"
        "restnet_hf.profiling.timing.MAX_SPREAD = float('inf')\n"  # other tests run beside this one
        "app(sys.argv[1:])\n"
    )
    options = ["--data", str(DATA), "--split", "test", "--images", "64", "--budget", "latency_ms=10000"]
    done = processes.run(code, ["adapt", str(adapter), *options, "--out", str(tmp_path / "out")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chosen: " in done.stdout and "measured from end to end" in done.stdout and "worse: " in done.stdout
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"profile.json", "latency.json", "model.safetensors"} <= {*files}
    assert done.stdout.splitlines()[-1] == f"written to {tmp_path / 'out'}: {', '.join(files)}"


def test_measure_by_command(adapter, tmp_path):
    result = CliRunner().invoke(
        app, ["measure", str(adapter), "--out", str(tmp_path / "latency.json"), "--seconds", "1"]
    )
    assert result.exit_code == 0, result.output
    assert all(part in result.output for route in ROUTES for part in route.split(" + ")) and "±" in result.output
    assert max(map(len, result.output.splitlines()[1:-1])) <= 80
    assert LatencyTable.load(tmp_path / "latency.json").entries


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "macs=1"], "no candidate|no route fits"),
        (["--budget", "macs=1e9", "--search", "magic"], "--search 'magic' is not one of"),
        (["--budget", "macs=1e9", "--predictor", "magic"], "--predictor 'magic' is not one of"),
        (["--budget", "macs=1e9", "--split", "night"], "night"),
    ],
)
def test_refused(adapter, tmp_path, options, message):
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["adapt", str(adapter), "--data", str(DATA), "--images", "8", "--out", str(out), *options]
    )
    assert result.exit_code == 1 and "error: " in result.stderr and result.stdout == ""
    assert "8 images are too few" in result.stderr or "night" in options
    assert any(part in " ".join(result.output.split()) for part in message.split("|"))
    assert not list(out.glob("*")) if out.exists() else True


def test_images_of_other_classes(model, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image

    from restnet_hf.adaptation.adapt import device_images

    features = Features({"image": Image(), "label": ClassLabel(names=["red", "green"])})
    pixels = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"image": [pixels] * 2, "label": [0, 1]}, features=features).to_parquet(
        tmp_path / "data/train.parquet"
    )
    with pytest.raises(ValueError, match=r"the data set has 2 classes \(red, green\), the model 10"):
        device_images(model, str(tmp_path / "data"), "train", 2)


def test_budgets_from_text():
    assert parse_budget(["latency_ms=20", "macs = 1e9"]) == Budget(latency_ms=20, macs=1e9)
    for wrong in ([], ["latency_ms"], ["latency_ms=-1"]):
        with pytest.raises(typer.BadParameter, match="of the form COST=NUMBER"):
            parse_budget(wrong)


def test_a_candidate_without_a_stitch(model, clothes):
    route = next(
        f"{model.front}[:{i}] + {[*model.anchors][-1]}[{j}:]"
        for i in range(1, 4)
        for j in range(1, 4)
        if model.route(f"{model.front}[:{i}] + {[*model.anchors][-1]}[{j}:]") not in model.routes
    )
    with pytest.raises(ValueError, match="has no stitch yet"):
        adapt(model, clothes(model, "test", 8), Budget(macs=1), candidates=[model.routes[0], route])


def test_a_cascade_within_a_mean(model, clothes):
    """With cascades the best within a mean may be one; of its routes each may cost more than the mean."""
    rows = clothes(model, "test", 300)
    budget = {"mean_macs": 14e6}
    alone = adapt(model, rows, budget)
    assert isinstance(alone.best.route, Route) and alone.best.costs["macs"] <= 14e6 and not model.profiled.cascades
    found = adapt(model, rows, budget, cascades=True)
    assert found.best.route == model.active_cascade == model.profiled.best(budget).route
    assert isinstance(found.best.route, Cascade) and found.best.costs["mean_macs"] <= 14e6 < found.best.costs["macs"]
    assert found.best.scores["accuracy"] > alone.best.scores["accuracy"]
    expected = model.profile(rows, cascades=True).cascades
    assert [row.route for row in expected if row.route == found.best.route]
    assert {each.route for each in found.rejected} == {*model.all_routes}
    capped = adapt(model, rows, {"mean_macs": 14e6, "macs": 14e6}, cascades=True)
    assert capped.best.costs["macs"] <= 14e6


def test_latency_of_cascades(model, clothes):
    """All routes of the cascade run from end to end, and correct what it takes."""
    rows = clothes(model, "test", 120)
    images = torch.stack([rows[index]["pixel_values"] for index in range(len(rows))])
    table = model.measure_latency(seconds=1.0)
    found = adapt(model, images, {"mean_latency_ms": 1e4}, latency=table, cascades=True)
    assert found.score == "agreement" and model.profiled.cascades
    assert found.checks.keys() >= {*getattr(found.best.route, "routes", [found.best.route])}
    for row in model.profiled.cascades:
        assert row.costs["mean_latency_ms"] <= row.costs["latency_p99_ms"] <= row.costs["latency_ms"]


def test_too_few_images_for_cascades(model, clothes):
    with pytest.raises(ValueError, match="99 images are too few to calibrate cascades on; give at least 100"):
        adapt(model, clothes(model, "test", 99), {"mean_macs": 14e6}, cascades=True)
