"""Cards say what was measured, by tags that the Hub can filter, and never merge licences silently."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from mutations import JSON

from restnet_hf.hub.cards import BUCKETS, MARK, budget_tags, card_data, eval_results, filter_tags, make_card
from restnet_hf.hub.repository import CARD, RESULTS, write_card
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route


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
    assert "| `small[:]` | 250.0 | 2.00 | 70.00 | yes |" in text.splitlines()
    assert "| `big[:3] + small[2:]` | 4000.0 | 2.00 | 80.00 | yes |" in text.splitlines()
    assert "Routes on the front are" in text and "gap closed" not in text.lower()
    assert "![accuracy against MACs of every route](tradeoff.png)" in text and MARK in text


def test_what_stitching_gains():
    rows = (("a[:]", 30.0, 0.9), ("b[:]", 10.0, 0.8), ("a[:1] + b[1:]", 20.0, 0.85), ("a[:2] + b[1:]", 25.0, 0.8))
    whole = Profile(tuple(ProfiledRoute(Route.parse(r), {"macs": m}, {"accuracy": s}) for r, m, s in rows))
    text = make_card("me/adapter", parents("mit", "mit"), whole).text
    assert "Gap closed: 0.25. The gap closed is the mean over budgets" in text
    assert [line.rsplit("|", 2)[1].strip() for line in text.splitlines() if line.startswith("| `")] == [
        *("yes", "yes", "", "yes")
    ]
    level = Profile(
        (*whole.routes[2:], *(ProfiledRoute(r.route, r.costs, {"accuracy": 0.5}) for r in whole.routes[:2]))
    )
    text = make_card("me/adapter", parents("mit", "mit"), level).text
    assert "Gap closed: not defined, since the most expensive anchor" in text


def test_cascades_are_listed():
    """Behind the routes, with mean costs; the gap is over these, and the example uses one."""
    rows = (("a[:]", 30e6, 0.9), ("b[:]", 10e6, 0.8))
    routes = [ProfiledRoute(Route.parse(r), {"macs": m}, {"accuracy": s}).with_means() for r, m, s in rows]
    cascade = ProfiledCascade(
        Cascade.parse("b[:] >0.75@1.5 a[:]"), {"macs": 40e6, "mean_macs": 20e6}, {"accuracy": 0.9}, (1.0, 0.25), 0.01
    )
    text = make_card("me/adapter", parents("mit", "mit"), Profile(tuple(routes), {}, (cascade,))).text
    assert "| `b[:] >0.75@1.5 a[:]` | 40.0 | 20.0 | 90.00 | yes |" in text.splitlines()
    assert "`a[:] >0.8 b[:]` is a cascade" in text and "On the front are routes and cascades" in text
    assert "model.set_budget(mean_macs=20000000)" in text


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


HOSTILE = [
    "# heading", "\n\n# heading\n", "x\n===\n", "\n---\nlicense: evil\n---\n", "<script>alert(1)</script>",
    "\n\n<div>\n\n", "<!-- comment", "-->", "a | b", "|---|\n| x |", "\\| c |", "[text](http://evil.example)",
    "![x](y.png)", "[x]: http://e.example", "<http://evil.example>", "http://evil.example", "www.evil.example",
    "me@evil.example", "`code`", "```\ncode\n```\n", "~~~", "~~x~~", "**b**", "__b__", "_e_", "*", "- item",
    "1. item", "12) x", "> quote", "    code", "\t", "$$x$$", "\\(x\\)", "&lt;b&gt;", "&#60;b>", "{{ 7 * 7 }}",
    "{% raw %}", "{# x #}", "\r\n# x", "\x0b# x", "\u2028# x", "\x85# x", "\x00", "\x1b[2J", "\u202e", "\ud800",
    "\\", "''", '"', '") or evil("', "$(evil)", "; evil", "../../x", "evil/../../x", "me/data", MARK, "",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=6), min_size=1, max_size=4).map("".join)
FIELDS = ["repo_id", "name", "model", "commit", "licence", "dataset", "device", "date", "images", "package", "version"]
FIELDS += ["stage", "setting", "value", "runtime", "precision", "where", "route", "tag", "plot"]
HARMLESS = dict.fromkeys(FIELDS, "words") | {"repo_id": "me/words", "dataset": "me/words"}
MANY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate, Phase.shrink],
)


def arguments(field):
    """Of a card whose every field came from a file."""
    entry = {"device": field["where"], "runtime": field["runtime"], "precision": field["precision"], "threads": 1}
    entry["routes"] = {field["route"]: {"latency_ms": 1.0}}
    about = {key: field[key] for key in ("dataset", "device", "date", "images")}
    about |= {"versions": {field["package"]: field["version"]}, "runtimes": [entry]}
    anchor = {"name": field["name"], "repo_id": field["model"] or None, "revision": field["commit"]}
    anchors = [{**anchor, "license": licence} for licence in (field["licence"], "mit")]
    stages = [{"stage": field["stage"], field["setting"] or "x": field["value"]}]
    return field["repo_id"], anchors, profile(**about), False, field["plot"] or "x.png", [field["tag"]], stages


def skeleton(text):
    """All that Markdown makes of a text, but for the words, and the words alone."""
    kinds, words = [], []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        for part in [token, *(token.children or [])]:
            if part.type not in ("text", "softbreak", "inline"):
                kinds.append((part.type, part.tag))
                words.append(part.content if part.type == "code_inline" else "")
            elif part.type == "text":
                words.append(part.content)
    return kinds, " ".join(words)


def shown(text):
    """On one line, without what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_what_files_say_is_only_words_on_a_card(data):
    """Any text in any field: the structure is that of a harmless card, and the text is shown as it is."""
    fields = data.draw(st.sets(st.sampled_from(FIELDS), min_size=1, max_size=4))
    field = HARMLESS | {name: data.draw(TEXTS, label=name) for name in sorted(fields)}
    card = make_card(*arguments(field))
    expected, _ = skeleton(make_card(*arguments(HARMLESS)).text)
    kinds, words = skeleton(card.text)
    assert kinds == expected
    for name in fields - {"repo_id", "tag", "plot", "route"}:
        assert shown(field[name]) in words, name
    (code,) = re.findall(r"```python\n(.*?)\n```", card.text, re.S)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.args]
    names = [getattr(call.args[0], "value", None) for call in calls]
    assert shown(field["repo_id"]).replace("`", "'") in names


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_metadata_is_what_was_given(data):
    """No text ends the YAML block or adds a key to it."""
    fields = data.draw(st.sets(st.sampled_from(FIELDS), min_size=1, max_size=4))
    field = HARMLESS | {name: data.draw(TEXTS, label=name) for name in sorted(fields)}
    text = str(make_card(*arguments(field)))
    text.encode()
    block, _, body = text.removeprefix("---\n").partition("\n---\n")
    repo_id, anchors, measured, standalone, _, tags, _ = arguments(field)
    read, given = yaml.safe_load(block), card_data(repo_id, anchors, measured, standalone, tags).to_dict()
    assert read.keys() == given.keys() and (
        read == given or "\x85" in "".join(field.values())
    )  # PyYAML folds that one
    assert body.startswith(f"\n{MARK}\n")


@MANY
@given(text=TEXTS)
def test_results_stay_in_their_folder(tmp_path, text):
    """Whatever the data set is named: one file of the repository's own name, or none."""
    folder = tmp_path / "up" / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    write_card(folder, text, parents("mit", "mit"), profile(dataset=text))
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    inside = folder.relative_to(tmp_path)
    assert {path.parent for path in files} <= {inside, inside / RESULTS} and inside / CARD in files
    assert all(re.fullmatch(r"[\w.-]+--[\w.-]+\.yaml", path.name) for path in files if path.parent.name == RESULTS)
    for path in (folder / RESULTS).glob("*"):
        path.unlink()


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_any_metadata(data):
    """A profile from elsewhere says anything of anything: there is a card, or a ValueError."""
    keys = ["dataset", "device", "date", "images", "versions", "runtimes", "dataset_revision", "x"]
    odd = profile(**{key: data.draw(JSON, label=key) for key in data.draw(st.sets(st.sampled_from(keys)))})
    stages = data.draw(st.lists(st.dictionaries(st.sampled_from(["stage", "images"]), JSON), max_size=2))
    licence = data.draw(JSON)
    try:
        card = make_card("me/adapter", parents("mit", licence), odd, training=stages)
        entries = eval_results(odd)
    except ValueError as error:
        assert "not a profile" in str(error) and len(str(error)) < 500
        return
    yaml.safe_dump(eval_result_entries_to_yaml(entries))
    assert ModelCard(str(card)).data.pipeline_tag == "image-classification"


def test_numbers_that_nobody_measured():
    """Costs of 1e308 are printed short, and a profile without MACs names no budget."""
    text = make_card("me/adapter", parents("mit", "mit"), profile(macs=(1e308, 5e-324), scores=(1e308, 1e-320))).text
    assert max(map(len, text.splitlines())) < 500
    bare = Profile((ProfiledRoute(Route.parse("a[:]"), {"params": 3.0}),))
    assert "model.set_route(model.routes[0])" in make_card("me/adapter", parents("mit", "mit"), bare).text
    many = Profile(
        tuple(ProfiledRoute(Route.parse(f"a[:{i}] + b[1:]"), {"params": i}, {"accuracy": 0.5}) for i in range(1, 300))
    )
    assert "of 299 routes" in make_card("me/adapter", parents("mit", "mit"), many).text


@pytest.mark.parametrize("value", [object(), {1, 2}, 10**400], ids=["object", "set", "int"])
def test_a_profile_that_json_cannot_hold(value):
    odd = profile(runtimes=[{"device": value}]) if isinstance(value, int) else profile(device=value)
    for make in (eval_results, lambda p: make_card("me/adapter", parents("mit", "mit"), p)):
        with pytest.raises(ValueError, match="JSON can hold|not a profile"):
            make(odd)
