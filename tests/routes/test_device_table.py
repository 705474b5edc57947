"""Tables of a device's latencies: told apart by name, bound to weights, put into a profile, and read strictly."""

import json
import random
from dataclasses import replace

import pytest
from mutations import ODD, places, put

from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.device_table import DeviceTable, slug
from restnet_hf.routes.profile import Profile, ProfiledCascade, ProfiledRoute
from restnet_hf.routes.route import Route


SMALL, STITCHED, LARGE = "a[:]", "a[:2] + b[3:]", "b[:]"
CASCADE = "a[:] >0.8 b[:]"
WEIGHTS = {"anchors.a": f"float32:{'a' * 64}", "anchors.b": f"float32:{'b' * 64}", "stitches.a_2__b_3": "c" * 64}
TABLE = DeviceTable(
    "Board 5 (Cortex-A76)", "onnx", "int8", 4, 2, {SMALL: 2.0, STITCHED: 5.0, LARGE: 8.0}, WEIGHTS,
    {CASCADE: [2.0, 8.5]}, "1.20.1", "aarch64", "2026-11-29", versions={"onnxruntime": "1.20.1"},
)  # fmt: skip


def row(text, accuracy, **costs):
    return ProfiledRoute(Route.parse(text), costs, {"accuracy": accuracy})


@pytest.fixture
def profile():
    rows = row(SMALL, 0.6, macs=1, latency_ms=90), row(STITCHED, 0.7, macs=5), row(LARGE, 0.8, macs=9, energy_j=3)
    costs = {"macs": 10, "mean_macs": 4, "latency_ms": 70, "mean_latency_ms": 60}
    cascade = ProfiledCascade(Cascade.parse("a[:] >0.7 b[:]"), costs, {"accuracy": 0.79}, (1.0, 0.25), 0.01)
    return Profile(rows, {"device": "cpu", "latency": {"device": "mine"}}, (cascade,))


def test_names_tell_tables_apart():
    """By device, runtime, precision, threads and batch size; each has a file of its own, and others replace theirs."""
    assert TABLE.name == "Board 5 (Cortex-A76), onnx, int8, 4 threads, batch 2"
    others = [{"device": "Board 5"}, {"runtime": "openvino"}, {"precision": "fp32"}, {"threads": 1}, {"threads": None}]
    tables = [TABLE, *(replace(TABLE, **each) for each in [*others, {"batch_size": 1}])]
    assert len({table.file_name for table in tables}) == len(tables)
    assert replace(TABLE, version="2", date="2027-01-01", routes={SMALL: 1.0}).file_name == TABLE.file_name
    assert TABLE.file_name.startswith(slug("Board 5 (Cortex-A76)") + "-onnx-int8-4-threads-batch-2-")
    assert replace(TABLE, threads=1).name.endswith("1 thread, batch 2")
    assert replace(TABLE, threads=None).name == "Board 5 (Cortex-A76), onnx, int8, batch 2"


@pytest.mark.parametrize(
    ("device", "fits"),
    [
        ("Board 5 (Cortex-A76)", True),
        ("Board 5 (Cortex-A76), onnx", True),
        ("Board 5 (Cortex-A76), onnx, int8, 4 threads, batch 2", True),
        ("Board 5", False),
        ("board 5 (cortex-a76)", False),
        ("Board 5 (Cortex-A76), int8", False),
        ("", False),
    ],
)
def test_a_device_is_named_exactly(device, fits):
    assert TABLE.is_named(device) is fits


def test_it_is_the_same_after_json():
    again = DeviceTable.from_dict(json.loads(json.dumps(TABLE.to_dict())), "me/adapter")
    assert again == replace(TABLE, cascades={CASCADE: (2.0, 8.5)}, repo_id="me/adapter")


def test_latencies_join_a_profile(profile):
    """Numbers by hand: means over the profile's own shares, whatever the thresholds; scores and MACs stay."""
    added = TABLE.add_to(profile)
    assert [r.costs["latency_ms"] for r in added.routes] == [2.0, 5.0, 8.0]
    assert [r.costs["mean_latency_ms"] for r in added.routes] == [2.0, 5.0, 8.0]
    assert [r.costs["macs"] for r in added.routes] == [1, 5, 9] and "energy_j" not in added.routes[2].costs
    (cascade,) = added.cascades
    assert cascade.costs == {
        "macs": 10, "mean_macs": 4, "latency_ms": 10.5, "mean_latency_ms": 2.0 + 0.25 * 8.5, "latency_p99_ms": 10.5,
    }  # fmt: skip
    assert cascade.stage_costs["latency_ms"] == (2.0, 8.5) and cascade.scores == {"accuracy": 0.79}
    assert str(added.best({"latency_ms": 5}).route) == STITCHED
    assert str(added.best({"mean_latency_ms": 5}).route) == "a[:] >0.7 b[:]"
    told = added.metadata["latency"]
    assert told["device"] == "Board 5 (Cortex-A76)" and told["version"] == "1.20.1" and told["threads"] == 4
    assert (told["runtime"], told["precision"], told["date"]) == ("onnx", "int8", "2026-11-29")
    assert (
        added.metadata["device"] == "cpu"
        and told["published"] == TABLE.file_name
        and not {"routes", "weights"} & told.keys()
    )
    assert Profile.from_dict(json.loads(json.dumps(added.to_dict()))).best({"latency_ms": 5}).costs["macs"] == 5


def test_a_warm_device_and_its_power(profile):
    warm = replace(TABLE, watts=4.0, sustained={"minutes": 10.0, "first_ms": 2.0, "last_ms": 3.0}).add_to(profile)
    assert [r.costs["latency_ms"] for r in warm.routes] == pytest.approx([3.0, 7.5, 12.0])
    assert [r.costs["energy_j"] for r in warm.routes] == pytest.approx([0.012, 0.03, 0.048])
    assert warm.cascades[0].costs["energy_j"] == pytest.approx(4.0 * 15.75 / 1e3)


def test_what_was_not_measured_is_left_out(profile):
    """So that every row has a latency, and budgets can be met."""
    added = replace(TABLE, routes={SMALL: 2.0, STITCHED: 5.0}, cascades={}).add_to(profile)
    assert [str(r.route) for r in added.rows] == [SMALL, STITCHED]
    with pytest.raises(ValueError, match="none of which is profiled"):
        replace(TABLE, routes={"c[:]": 2.0}, cascades={}).add_to(profile)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({}, []),
        ({"stitches.a_2__b_3": "d" * 64}, [STITCHED]),
        ({"stitches.a_2__b_3": None}, [STITCHED]),
        ({"stitches.a_5__b_6": "d" * 64}, []),
        ({"anchors.a": f"float32:{'d' * 64}"}, [SMALL, STITCHED]),
        ({"anchors.a": f"float16:{'a' * 64}"}, [SMALL, STITCHED]),
        ({"heads.b": "d" * 64}, [STITCHED, LARGE]),
        ({"tuned.lora~b": "d" * 64}, [STITCHED]),
        (dict.fromkeys(WEIGHTS), [SMALL, STITCHED, LARGE]),
    ],
)
def test_only_routes_of_the_same_weights_count(profile, change, stale):
    weights = {part: digest for part, digest in (WEIGHTS | change).items() if digest is not None}
    assert TABLE.stale_routes(weights) == stale
    if len(stale) == 3:
        with pytest.raises(ValueError, match=r"measured with other weights .*anchors.a"):
            TABLE.current(weights)
        return
    current = TABLE.current(weights)
    assert [*current.routes] == [text for text in TABLE.routes if text not in stale]
    assert [*current.cascades] == ([] if {SMALL, LARGE} & {*stale} else [CASCADE])


def test_weights_that_are_not_named_are_other_weights():
    with pytest.raises(ValueError, match="its parts are not named"):
        replace(TABLE, weights={}).current(WEIGHTS)


def test_a_later_format_is_named():
    with pytest.raises(ValueError, match=r"its format is 2, and this restnet_hf reads format 1; upgrade it"):
        DeviceTable.from_dict({**TABLE.to_dict(), "format": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": ""}, "must not be empty"),
        ({"device": "a\x1b[31m"}, "printable"),
        ({"device": "x" * 201}, "printable"),
        ({"threads": 0}, "threads=0"),
        ({"threads": True}, "threads=True"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"routes": {}}, "0 routes"),
        ({"routes": {"../x": 1.0}}, "not a latency table"),
        ({"routes": {"a[:]": 0}}, "milliseconds"),
        ({"routes": {"a[:]": float("nan")}}, "milliseconds"),
        ({"routes": {"a[:]": 10**400}}, "milliseconds"),
        ({"routes": [1]}, "not a latency table"),
        ({"cascades": {CASCADE: [1.0]}}, "stages"),
        ({"cascades": {"a[:] >0.8 c[:]": [1.0, 2.0]}}, "no latency"),
        ({"cascades": {"a[:] > b[:]": [1.0, 2.0]}}, "no thresholds"),
        ({"weights": {"stitches.x": "../../etc"}}, "SHA-256"),
        ({"weights": None}, "not a latency table"),
        ({"watts": -1}, "watts=-1"),
        ({"sustained": {"minutes": 1}}, "first_ms"),
        ({"versions": {"torch": 2}}, "a version"),
        ({"precision": None}, "precision is None"),
    ],
)
def test_what_is_no_table(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        DeviceTable.from_dict({**TABLE.to_dict(), **change})
    assert len(str(caught.value)) < 500


def test_any_json_is_a_table_or_a_short_error(profile):
    """Values of all kinds in all places; what is accepted can be used."""
    rng, refused = random.Random(0), 0
    whole = json.loads(json.dumps(TABLE.to_dict()))
    for _ in range(400):
        data = put(whole, rng.choice(places(whole)), rng.choice(ODD))
        try:
            table = DeviceTable.from_dict(data)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 500
            continue
        assert table.file_name.endswith(".json") and "/" not in table.file_name
        json.dumps(table.to_dict())
        if not table.stale_routes(WEIGHTS):
            table.add_to(profile)
    assert 50 < refused < 400
