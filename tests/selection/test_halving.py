"""Routes race: the candidates of a part train together, the worse half stops, and a race that was stopped goes on."""

import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.selection.halving import Race, RaceConfig, Racer, race_candidates, score_logits
from restnet_hf.selection.pairs import draw_images
from restnet_hf.selection.race_state import STATE
from restnet_hf.selection.ranking import RankedRoute
from restnet_hf.stitches.layers import Stitch


IMAGES = torch.randn(32, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(32) % CLASSES
BATCHES = [{"pixel_values": IMAGES, "labels": LABELS}]
SMALL = {"train_images": 20, "held_out_images": 12, "candidates": 4}


def build():
    return StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), order="given"
    )


def candidates(model, *parts):
    costs = model.route_costs()
    routes = [[model.route(f"resnet[:{i}] + vit[{j}:]") for i, j in part] for part in parts]
    return [[RankedRoute(route, 0.5, costs(route)) for route in part] for part in routes]


FOUR = ((1, 3), (2, 3), (2, 2), (1, 2))


@pytest.mark.parametrize("options", [{}, {"loss": "task"}])
def test_one_of_each_part_is_left(options):
    """Its stitch is in the model, trained, and its score is what the model's own profile measures."""
    model = build()
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    chosen = model.select_stitches(data, "race", max_routes=3, **SMALL, **options)
    assert 1 <= len(chosen) <= 3 and [*model.routes] == chosen and not model.unfitted
    assert [row.route for row in model.ranking[: len(chosen)]] == chosen and model.active_route in chosen
    drawn = draw_images(data, 0, 32)
    held = [tuple(map(torch.stack, zip(*[drawn[i] for i in range(12)], strict=True)))]
    measured = {row.route: row.scores["accuracy"] for row in model.profile(held)}
    assert all(row.score == pytest.approx(measured[row.route]) for row in model.ranking[: len(chosen)])
    costs = [row.costs["macs"] for row in model.ranking[: len(chosen)]]
    assert costs == sorted(costs)
    again = model.select_stitches(data, "race", max_routes=3, **SMALL, **options)
    assert again == chosen, "routes that exist already keep their stitches"


def test_without_labels():
    model = build()
    assert model.select_stitches(IMAGES, "race", max_routes=2, per_part=2, **SMALL)
    assert len(model.routes) > 2


def test_training_gains():
    """The final features come closer to the end's own, of all that race."""
    model = build()
    rows = candidates(model, FOUR)
    config = RaceConfig(**{**SMALL, "epochs": 4, "learning_rate": 3e-3})
    left, stopped = race_candidates(model, rows, BATCHES, config)
    assert [racer.epochs for racer in (*left, *stopped)] == [12, 12, 4, 4]
    start, _ = race_candidates(model, rows, BATCHES, RaceConfig(**SMALL, max_minutes=1e-9), winners=4)

    def loss(racer):
        end = model.anchors["vit"]
        own = end.capture(IMAGES[12:], {None}, features=True)[None]
        stitched = racer.stitch(model.anchors["resnet"](IMAGES[12:], stop=racer.place[1]))
        return (end.capture(stitched, {None}, racer.end[1], features=True)[None] - own).square().mean()

    with torch.no_grad():
        before = {racer.route: loss(racer) for racer in start}
        assert all(loss(racer) < before[racer.route] for racer in left)


def test_what_is_not_kept_in_memory_is_computed_again():
    results = []
    for most in (1.0, 1e-9):
        torch.manual_seed(0)
        model = build()
        left, stopped = race_candidates(model, candidates(model, FOUR), BATCHES, RaceConfig(**SMALL, max_gb=most))
        results.append([(str(racer.route), racer.accuracy, racer.score) for racer in (*left, *stopped)])
    assert [name for name, *_ in results[0]] == [name for name, *_ in results[1]]
    assert [row[1:] for row in results[0]] == [pytest.approx(row[1:], abs=1e-6) for row in results[1]]


def test_a_race_goes_on(tmp_path, monkeypatch):
    """Stopped in its second round, it goes on from the first: the same winners, to the last bit of their stitches."""
    model, config = build(), RaceConfig(**SMALL, folder=str(tmp_path / "race"))
    rows = candidates(model, FOUR)
    whole, _ = race_candidates(model, rows, BATCHES, RaceConfig(**SMALL))
    run_round = Race.run_round

    def stop(race, number, until):
        if number:
            raise KeyboardInterrupt
        run_round(race, number, until)

    monkeypatch.setattr(Race, "run_round", stop)
    with pytest.raises(KeyboardInterrupt):
        race_candidates(model, rows, BATCHES, config)
    rounds = []
    monkeypatch.setattr(Race, "run_round", lambda race, n, until: rounds.append(n) or run_round(race, n, until))
    resumed, _ = race_candidates(model, rows, BATCHES, config)
    assert rounds == [1] and [r.route for r in resumed] == [r.route for r in whole]
    for one, two in zip(resumed, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.stitch.parameters(), two.stitch.parameters(), strict=True))
    race_candidates(model, rows, BATCHES, config)
    assert rounds == [1], "it is finished"
    race_candidates(model, rows[:1], [{"pixel_values": IMAGES, "labels": LABELS.flip(0)}], config)
    assert rounds == [1, 0, 1], "other images are another race"
    (tmp_path / "race" / STATE).write_text('{"key": 1')
    with pytest.raises(ValueError, match="cannot be read.*delete it to begin anew"):
        race_candidates(model, rows, BATCHES, config)


def test_no_longer_than_it_may():
    """Without time for a step it is decided by least squares."""
    model = build()
    left, stopped = race_candidates(model, candidates(model, FOUR), BATCHES, RaceConfig(**SMALL, max_minutes=1e-9))
    assert len(left) == 1 and not any(racer.epochs for racer in (*left, *stopped))
    assert left[0].score >= max(racer.score for racer in stopped)


def test_the_score_is_scale_free():
    """Logits that are too sure or unsure everywhere lose nothing; those of a better network win."""
    logits, right = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5
    better = logits + torch.nn.functional.one_hot(right, 5)
    accuracy, score = score_logits(better, right)
    assert (
        score == pytest.approx(score_logits(2 * better, right)[1], abs=5e-3) and score > score_logits(logits, right)[1]
    )
    assert accuracy == (better.argmax(-1) == right).double().mean()


class Nothing(Stitch):
    def problems(self):
        return []


def test_the_worse_half_of_each_part_stops():
    model = build()
    rows = candidates(model, FOUR, ((3, 3), (4, 3), (5, 3)))
    racers = [
        Racer(row, part, Nothing(), (), score=accuracy)
        for part, (mine, scores) in enumerate(zip(rows, ((0.1, 0.4, 0.3, 0.2), (0.9, 0.8, 0.95)), strict=True))
        for row, accuracy in zip(mine, scores, strict=True)
    ]
    race = Race(racers, None, None, RaceConfig())
    assert race.rounds(1) == 2 and race.rounds(2) == 1
    race.halve(1)
    assert [racer.score for racer in race.racers] == [0.4, 0.3, 0.95] and race.rounds(1) == 1
    race.halve(1)
    assert [racer.score for racer in race.racers] == [0.4, 0.95] and race.rounds(1) == 0
    assert len(race.finished) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"los": "task"}, r"method 'race' has no options \['los'\]; it takes \['candidates'"),
        ({"loss": "all"}, r"loss='all' is not one of \('match', 'task'\)"),
        ({"candidates": 0}, "candidates=0 must be a whole number of at least 1"),
        ({"max_minutes": -1}, "max_minutes=-1 must be a number above 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        build().select_stitches(IMAGES, "race", **options)


def test_too_few_images():
    with pytest.raises(ValueError, match="3 came; give some hundreds"):
        build().select_stitches(IMAGES[:3], "race")
