"""Cards say what was measured, by tags that the Hub can filter, and never merge licences silently."""

import pytest
import yaml
from huggingface_hub import ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries

from restnet_hf.cards import BUCKETS, MARK, budget_tags, eval_results, filter_tags, make_card
from restnet_hf.profiles import Profile, ProfiledRoute
from restnet_hf.routes import Route


def profile(macs=(2.5e8, 4e9), scores=(0.7, 0.8), **metadata):
    routes = ("small[:]", "big[:3] + small[2:]")
    rows = [
        ProfiledRoute(Route.parse(route), {"macs": cost, "params": 2e6}, {} if score is None else {"accuracy": score})
        for route, cost, score in zip(routes, macs, scores, strict=True)
    ]
    return Profile(tuple(rows), metadata)


def parents(*licences):
    names = ("big", "small")
    return [
        {"name": name, "repo_id": f"me/{name}", "revision": "0" * 40, "license": licence}
        for name, licence in zip(names, licences, strict=True)
    ]


def test_tags_are_those_of_the_cheapest_route():
    tags = budget_tags(profile())
    assert [tag for tag in tags if tag.startswith("macs")] == [
        "macs:le-300m",
        "macs:le-1g",
        "macs:le-3g",
        "macs:le-10g",
        "macs:le-30g",
    ]
    assert "params:le-1m" not in tags and "params:le-3m" in tags


def test_tags_of_the_author():
    card = make_card("me/adapter", parents("mit", "mit"), profile(), tags=["mine", "restnet"])
    assert card.data.tags == ["restnet", *budget_tags(profile()), "mine"]


@pytest.mark.parametrize("cost", BUCKETS)
@pytest.mark.parametrize("limit", [1.0, 9.9e7, 1e8, 1.01e8, 1e9, 2e12])
def test_a_filter_loses_no_adapter_within_the_limit(cost, limit):
    """Whatever fits the limit has the tags that the search asks for."""
    for value in (limit, limit / 2, limit / 1e3):
        row = ProfiledRoute(Route.parse("a[:]"), {cost: value})
        assert set(filter_tags({cost: limit})) <= set(budget_tags(Profile((row,))))


def test_metadata_survives_yaml():
    card = make_card("me/adapter", parents("mit", "mit"), profile(dataset="me/data", images=100, device="cpu"))
    data = yaml.safe_load(str(card).split("---")[1])
    assert Profile.from_dict(data["restnet"]) == profile(dataset="me/data", images=100, device="cpu")
    assert (data["license"], data["library_name"], data["base_model_relation"]) == ("mit", "restnet-hf", "adapter")
    assert data["base_model"] == ["me/big", "me/small"] and data["datasets"] == ["me/data"]
    (entry,) = data["model-index"]
    values = {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert values == {"small[:]": 0.7, "big[:3] + small[2:]": 0.8}
    assert ModelCard(str(card)).data.pipeline_tag == "image-classification"


def test_a_folder_is_no_dataset_of_the_hub():
    card = make_card("me/adapter", parents("mit", "mit"), profile(dataset="data", images=100))
    assert card.data.datasets is None and "100 images of data" in card.text


def test_table_of_routes():
    text = make_card("me/adapter", parents("mit", "mit"), profile(), plot="tradeoff.png").text
    assert "| `small[:]` | 250.0 | 2.00 | 70.00 |" in text.splitlines()
    assert "| `big[:3] + small[2:]` | 4000.0 | 2.00 | 80.00 |" in text.splitlines()
    assert "![accuracy against MACs of every route](tradeoff.png)" in text and MARK in text


@pytest.mark.parametrize("licences", [("mit", "apache-2.0"), ("mit", None), (None, None)])
def test_licences_are_never_merged(licences):
    card = make_card("me/adapter", parents(*licences), profile())
    assert card.data.license == "other"
    assert all(
        f"{name}: {licence or 'not stated'}" in card.text
        for name, licence in zip(("big", "small"), licences, strict=True)
    )


def test_without_scores_or_profile():
    bare = make_card("me/adapter", parents("mit", "mit"), profile(scores=(None, None)))
    assert bare.data.metrics is None and bare.data.eval_results is None and "accuracy, %" not in bare.text
    assert "They were not measured" in make_card("me/adapter", parents("mit", "mit"), None).text


def test_standalone():
    entries = [{**entry, "repo_id": None, "revision": None} for entry in parents("mit", "mit")]
    card = make_card("me/whole", entries, profile(), standalone=True)
    assert card.data.base_model is None and card.data.to_dict()["base_model_relation"] == "merge"
    assert "the anchors' weights too" in card.text and "in this repository" in card.text


def test_training_is_told():
    stages = [{"stage": "least squares", "images": 64, "ridge": 1e-6}, {"stage": "training", "steps": 9, "seed": None}]
    lines = make_card("me/adapter", parents("mit", "mit"), profile(), training=stages).text.splitlines()
    assert "- least squares: images 64, ridge 1e-06" in lines and "- training: steps 9" in lines
    assert "neither fitted nor trained" in make_card("me/adapter", parents("mit", "mit"), profile()).text


def test_results_for_leaderboards():
    """What the Hub's own parser reads from the YAML is what was measured; a folder's name is no leaderboard."""
    known = profile(dataset="me/data", date="2026-01-02")
    entries = parse_eval_result_entries(
        yaml.safe_load(yaml.safe_dump(eval_result_entries_to_yaml(eval_results(known))))
    )
    assert [(e.dataset_id, e.notes, e.value, e.date) for e in entries] == [
        ("me/data", "small[:]", 0.7, "2026-01-02"),
        ("me/data", "big[:3] + small[2:]", 0.8, "2026-01-02"),
    ]
    for none in (None, profile(), profile(dataset="data"), profile(scores=(None, None), dataset="me/data")):
        assert eval_results(none) == []


def test_what_nobody_should_have_put_there():
    """A profile from elsewhere may say anything about itself; the card is still one."""
    for dataset in (3, ["x"], None, {"a": 1}):
        assert ModelCard(str(make_card("me/adapter", parents("mit", "mit"), profile(dataset=dataset)))).data.metrics
