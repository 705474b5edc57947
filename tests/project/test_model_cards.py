"""Released cards parse, are what today's code writes, and say what their profile says."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from restnet_hf.hub.cards import MARK, make_card
from restnet_hf.routes.profile import Profile


CARDS = sorted((Path(__file__).parents[2] / "model_cards").iterdir())


def test_there_are_some():
    assert len(CARDS) >= 3


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_card(folder):
    assert {path.name for path in folder.iterdir()} >= {"README.md", "profile.json", "tradeoff.png"}
    card, profile = ModelCard.load(folder / "README.md"), Profile.load(folder / "profile.json")
    data = card.data.to_dict()
    assert Profile.from_dict(data["restnet"]) == profile and MARK in card.text
    assert (data["library_name"], data["pipeline_tag"]) == ("restnet-hf", "image-classification")
    (entry,) = yaml.safe_load(card.content.split("---")[1])["model-index"]
    values = {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert values == {str(row.route): row.scores["accuracy"] for row in profile.routes}
    for row in profile.routes:
        line = f"| `{row.route}` | {row.costs['macs'] / 1e6:.1f} | {row.costs['params'] / 1e6:.2f} |"
        assert f"{line} {100 * row.scores['accuracy']:.2f} |" in card.text
    assert "- training: " in card.text and "- least squares: " in card.text


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_todays_code_writes_the_same(folder):
    """Everything but the training and the anchors, which profile.json does not hold."""
    there = ModelCard.load(folder / "README.md")
    anchors = [
        {"name": line.split("|")[1].strip(), "repo_id": None, "revision": None, "license": None}
        for line in there.text.splitlines()
        if "in this repository |" in line
    ]
    again = make_card(
        f"restnet-hf/{folder.name}", anchors, Profile.load(folder / "profile.json"), True, "tradeoff.png"
    )

    def parts(card):
        return {part.splitlines()[0]: part for part in card.content.split("\n## ")}

    ours, theirs = parts(again), parts(there)
    assert ours.keys() == theirs.keys()
    assert {k: v for k, v in ours.items() if k != "Training"} == {k: v for k, v in theirs.items() if k != "Training"}
