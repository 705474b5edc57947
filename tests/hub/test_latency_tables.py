"""Latency tables on a Hub, over HTTP by the real client: pushed by others, chosen by device, refused or left out."""

import json
from dataclasses import replace

import pytest
from versions import needs_export

from restnet_hf.hub.latency_tables import FILE_NAME, FOLDER, MAX_TABLE_BYTES, list_tables, table_files
from restnet_hf.routes.device_table import DeviceTable
from restnet_hf.routes.profile import Profile


PUSH = """
from restnet_hf import push_latency
from restnet_hf.profiling import timing
timing.MAX_SPREAD = float("inf")  # other tests run beside this one
model = Model.from_pretrained("me/adapter")
table = model.device_table(model.measure_latency(seconds=0.1))
commit = push_latency(table, create_pr=json.loads(sys.argv[2]))
print(json.dumps([table.to_dict(), table.name, table.file_name, commit.pr_url, model.adapter_identity()]))
"""
LOAD = """
import logging
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("restnet_hf").addHandler(Keep())
answers = []
for options in json.loads(sys.argv[2]):
    try:
        loaded = Model.from_pretrained(options.pop("repo_id", "me/adapter"), **options)
        costs = {str(row.route): row.costs.get("latency_ms") for row in loaded.profiled}
        answers.append([str(loaded.active_route), costs, loaded.profiled.metadata.get("latency")])
    except (ValueError, OSError) as error:
        answers.append(str(error))
print(json.dumps([answers, said]))
"""
FIND = """
import logging
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("restnet_hf").addHandler(Keep())
from restnet_hf import find_adapters
found = [[[a.repo_id, str(a.best.route), a.table and a.table.name, a.best.costs.get("latency_ms")]
          for a in find_adapters(**each)] for each in json.loads(sys.argv[2])]
print(json.dumps([found, said]))
"""


@pytest.fixture(scope="module")
def measured(world):
    """The table of this machine, measured in a process of its own and committed; and the facts of that."""
    repo = world.hub.repos["me/adapter"]
    before = [*repo.commits]
    data, name, file_name, url, identity = world.run(PUSH, "owner", ["null"])
    yield DeviceTable.from_dict(data), name, file_name, url, identity
    repo.commits[:] = before


@pytest.fixture
def shelf(world, measured):
    """Commits tables to the adapter's repository; the repository is as before afterwards."""
    repo = world.hub.repos["me/adapter"]
    before = [*repo.commits]

    def put(*tables, **files):
        content = {f"{FOLDER}/{table.file_name}": json.dumps(table.to_dict()).encode() for table in tables}
        content |= {f"{FOLDER}/{name}.json": data for name, data in files.items()}
        return repo.commit(repo.commits[-1][1] | content)

    yield put
    repo.commits[:] = before


def boards(table):
    """Two devices on which other routes are fast."""
    slow = {route: 10.0 * (1 + at) for at, route in enumerate(table.routes)}
    fast = {route: 10.0 - at for at, route in enumerate(table.routes)}
    one = replace(table, device="Board One", threads=4, routes=slow, date="2026-11-01")
    return one, replace(one, device="Board Two", threads=2, routes=fast)


def test_a_table_is_committed_beside_the_adapter(world, measured):
    """One file, whose digests are those of the adapter's own parts; everything else in the repository stays."""
    table, name, file_name, url, identity = measured
    (before, after) = (files for _, files in world.hub.repos["me/adapter"].commits[-2:])
    assert {*after} - {*before} == {f"latency/{file_name}"} and url is None
    assert all(after[path] == content for path, content in before.items())
    written = DeviceTable.from_dict(json.loads(after[f"latency/{file_name}"]))
    assert written == table and written.name == name and FILE_NAME.fullmatch(file_name)
    assert [*table.routes] == world.routes and all(ms > 0 for ms in table.routes.values())
    assert table.runtime == "torch eager" and table.precision == "fp32" and table.batch_size == 1
    config, stated = json.loads(after["config.json"]), json.loads(after["profile.json"])["metadata"]["weights"]
    anchors = {f"anchors.{entry['name']}": entry["fingerprint"] for entry in config["anchors"]}
    assert table.weights == anchors | stated and identity == {"repo_id": "me/adapter", "weights": dict(table.weights)}


@pytest.mark.parametrize("create_pr", ["null", "true"])
def test_others_open_a_pull_request(world, measured, create_pr):
    """Where they may not write, or ask for it; what is in it can be tried at its reference."""
    repo, table = world.hub.repos["me/adapter"], measured[0]
    count = len(repo.commits)
    world.hub.read_only = {"me/adapter"} if create_pr == "null" else set()
    try:
        _, _, file_name, url, _ = world.run(PUSH, "another", [create_pr])
        assert url.endswith("/discussions/1") and len(repo.commits) == count
        assert f"latency/{file_name}" in repo.pulls["refs/pr/1"][1]
        asked = {"device": table.name, "budget": {"latency_ms": 1e9}, "revision": "refs/pr/1"}
        ((answer,), _) = world.run(LOAD, "another", [json.dumps([asked])])
        assert answer[2]["device"] == table.device and {*answer[1]} == {*world.routes}
    finally:
        world.hub.read_only = set()
        repo.pulls.clear()


def test_no_pull_request_where_it_is_refused(world, measured):
    world.hub.read_only = {"me/adapter"}
    code = PUSH.replace("commit = ", "try:\n    commit = ").replace("\nprint", "\nexcept OSError as error:\n    print")
    code = code[: code.rindex("    print")] + "    print(json.dumps(str(error)))\n"
    try:
        assert "403" in world.run(code, "another", ["false"])
    finally:
        world.hub.read_only = set()


def test_a_budget_on_a_device_that_others_measured(world, measured, shelf):
    """Two devices choose other routes; the profile then has their latencies, and where these are from."""
    one, two = boards(measured[0])
    shelf(one, two)
    first, *_, last = measured[0].routes
    asked = [
        {"device": "Board One", "budget": {"latency_ms": 15}},
        {"device": "Board Two, torch eager, fp32, 2 threads", "budget": {"latency_ms": 10.0 - len(one.routes) + 1}},
        {"device": "Board Two"},
        {"device": "cpu"},
    ]
    answers, said = world.run(LOAD, "user", [json.dumps(asked)])
    assert [answers[0][0], answers[1][0]] == [first, last] and not said
    assert answers[0][1] == dict(one.routes) and answers[1][1] == dict(two.routes) == answers[2][1]
    assert answers[0][2]["device"] == "Board One" and answers[0][2]["date"] == "2026-11-01"
    assert (answers[1][2]["runtime"], answers[1][2]["precision"], answers[1][2]["threads"]) == (
        "torch eager",
        "fp32",
        2,
    )
    assert answers[3][2] is None, "the profile's own device, which it names as torch does"


@pytest.mark.slow
def test_a_table_that_was_fetched_before_is_used_offline(world, measured, shelf):
    shelf(*boards(measured[0]))
    asked = [json.dumps([{"device": "Board One", "budget": {"latency_ms": 15}}])]
    online = world.run(LOAD, "traveller", asked)
    world.hub.log.clear()
    assert world.run(LOAD, "traveller", asked, HF_HUB_OFFLINE="1") == online and world.asked() == []


def test_a_device_without_a_table(world, measured, shelf):
    """The error lists what there is; one device with several tables asks for more of the name."""
    one, two = boards(measured[0])
    shelf(one, two, replace(one, threads=1))
    asked = [
        {"device": "cuda"},
        {"device": "Board"},
        {"device": "Board One"},
        {"device": "Board One, torch eager, int8"},
    ]
    answers, _ = world.run(LOAD, "user", [json.dumps(asked)])
    for answer in (answers[0], answers[1], answers[3]):
        assert "me/adapter has no latencies of device=" in answer and "device_map=" in answer
        assert all(table.name in answer for table in (one, two, measured[0]))
    assert "has 2 tables of device='Board One'; name one of" in answers[2] and "1 thread, batch 1" in answers[2]


def test_other_weights_are_refused(world, measured, shelf):
    """All of them, or of one stitch: then the other routes still count."""
    one, two = boards(measured[0])
    (changed, *_) = (part for part in one.weights if part.startswith("stitches."))
    shelf(
        replace(one, weights={part: "float32:" * ("anchors" in part) + "0" * 64 for part in one.weights}),
        replace(two, weights={**two.weights, changed: "0" * 64}),
    )
    answers, _ = world.run(LOAD, "user", [json.dumps([{"device": "Board One"}, {"device": "Board Two"}])])
    assert "'Board One, torch eager" in answers[0] and "other weights" in answers[0] and changed in answers[0]
    assert {*answers[1][1]} < {*two.routes} and len(answers[1][1]) == len(two.routes) - 1


def test_another_version_of_the_runtime_is_marked(world, measured, shelf):
    one, two = boards(measured[0])
    shelf(replace(one, version="1.0.0"), replace(two, runtime="made up", version="3"))
    answers, said = world.run(LOAD, "user", [json.dumps([{"device": "Board One"}, {"device": "Board Two"}])])
    assert answers[0][2]["version"] == "1.0.0" and answers[1][2]["runtime"] == "made up"
    (warning,) = said
    assert "are of torch eager 1.0.0, and " in warning and "Board One" in warning


def test_what_others_wrote_is_not_trusted(world, measured, shelf):
    """No table, too large, under another's name, out of the folder: one line each, and the others are used."""
    _, two = boards(measured[0])
    fake = json.dumps(replace(two, device="Board One").to_dict()).encode()
    shelf(two, **{
        "board-one-nothing": b"[]",
        "board-one-cut": b'{"format": 1',
        "board-one-deep": b"[" * 100_000,
        "board-one-large": b" " * (MAX_TABLE_BYTES + 1),
        "board-one-renamed": fake,
        "board-one-\x1b[31m": fake,
        "../board-one-up": fake,
    })  # fmt: skip
    world.hub.log.clear()
    answers, said = world.run(LOAD, "user", [json.dumps([{"device": "Board One"}, {"device": "Board Two"}])])
    assert answers[0].startswith("the latencies of 'Board One' in me/adapter cannot be used: board-one-cut.json: ")
    assert len(answers[0]) < 2500 and answers[1][1] == dict(two.routes)
    assert {line.split(": ")[1] for line in said} == {
        f"board-one-{name}.json" for name in ("nothing", "cut", "deep", "large", "renamed")
    }
    assert not [path for method, path, _ in world.asked() if "board-one-large" in path and method == "GET"]


@pytest.mark.parametrize(
    "name", ["../x.json", "a/b.json", "X.json", ".json", "x.txt", "x" * 200 + ".json", "x\n.json"]
)
def test_names_of_tables_stay_in_their_folder(name):
    assert table_files([f"{FOLDER}/{name}"]) == []


def test_tables_in_a_local_folder(saved, tmp_path):
    """A copy of a repository has them too; links that lead elsewhere are not followed."""
    model, folder, *_ = saved
    table = replace(
        DeviceTable("Board", "onnx", "int8", 1, 1, {"vit[:]": 3.0}, model.adapter_identity()["weights"]), version="1"
    )
    (folder / FOLDER).mkdir()
    (folder / FOLDER / table.file_name).write_text(json.dumps(table.to_dict()))
    loaded = type(model).from_pretrained(folder, device="Board", budget={"latency_ms": 4})
    assert str(loaded.active_route) == "vit[:]" and len(loaded.profiled) == 1
    loaded.save_pretrained(tmp_path / "saved")
    own, again = (Profile.load(place / "profile.json") for place in (folder, tmp_path / "saved"))
    assert again == own and len(own) > 1, "the adapter keeps what it measured of all routes"
    (folder / FOLDER / table.file_name).rename(tmp_path / table.file_name)
    (folder / FOLDER / table.file_name).symlink_to(tmp_path / table.file_name)
    assert list_tables(str(folder), {}) == [table.file_name]
    with pytest.raises(ValueError, match="not in the folder"):
        type(model).from_pretrained(folder, device="Board")
    (folder / FOLDER / table.file_name).unlink()
    (folder / FOLDER).rmdir()
    (folder / FOLDER).symlink_to(tmp_path)
    with pytest.raises(ValueError, match="not in the folder"):
        type(model).from_pretrained(folder, device="Board")
    (folder / FOLDER).unlink()
    with pytest.raises(ValueError, match="has no latencies of device='Board', and of no other one"):
        type(model).from_pretrained(folder, device="Board")


def test_a_model_in_memory_has_no_tables(saved):
    model, *_ = saved
    with pytest.raises(ValueError, match=r"has no profile to which the latencies of device='Board' belong"):
        type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), device="Board")


def test_find_by_a_device_that_others_measured(world, measured, shelf):
    """By the table's latencies, whatever the tags of the adapter; stale and invalid tables are left out."""
    one, two = boards(measured[0])
    stale = replace(one, device="Board Three", weights=dict.fromkeys(one.weights, "0" * 64))
    shelf(one, two, stale, **{"board-two-odd": b"3"})
    asked = [
        {"device": "Board One", "latency_ms": 15},
        {"device": "Board Two", "latency_ms": 10.5 - len(one.routes)},
        {"device": "Board Two", "macs": 1e12},
        {"device": "Board One", "latency_ms": 1},
        {"device": "Board Three"},
        {"device": "Board"},
        {"device": "cpu", "latency_ms": 1e9},
        {"device": "cpu", "macs": 1e12},
    ]
    found, said = world.run(FIND, "user", [json.dumps(asked)])
    mine = [[each for each in case if each[0] == "me/adapter"] for case in found]
    assert mine[0] == [["me/adapter", next(iter(one.routes)), one.name, 10.0]]
    assert mine[1] == [] and mine[3:7] == [[], [], [], []]
    ((_, _, name, ms),) = mine[2]
    assert name == two.name and ms in two.routes.values()
    assert mine[7] and mine[7][0][2] is None, "its own profile"
    assert len([line for line in said if "board-two-odd.json" in line]) == 3, "its name fits three of the devices"
    assert len([line for line in said if "other weights" in line]) == 1


COMMANDS = """
from restnet_hf.cli import app
from restnet_hf.profiling import timing
timing.MAX_SPREAD = float("inf")
def run(*words):
    try:
        app([*words], standalone_mode=False)
    except BaseException as error:
        print(type(error).__name__, error)
run("measure", "me/adapter", "--push", "--seconds", "0.1")
run("measure", "me/adapter", "--push", "--seconds", "0.1", "--overwrite", "--create-pr", "--threads", "1")
run("find", "--device", sys.argv[2], "--latency-ms", "1e6")
Model.from_pretrained("me/adapter").save_pretrained("mine")
run("measure", "mine", "--push")
run("measure", "mine", "--create-pr")
other = Model.from_pretrained("me/adapter")
with torch.no_grad():
    next(iter(other.stitches.parameters())).add_(1)
other.save_pretrained("other")
sys.stderr = sys.stdout
for to in ("me/adapter", "me/nothing"):
    run("measure", "other", "--push", "--repo-id", to, "--out", "other.json")
print("measured", Path("other.json").exists())
print(json.dumps(1))
"""


def test_by_command(world, measured, shelf):
    repo, table = world.hub.repos["me/adapter"], measured[0]
    count = len(repo.commits)
    try:
        printed = world.run(COMMANDS, "commands", [table.device], whole=True)
        assert len(repo.commits) == count + 1 and len(repo.pulls) == 1, printed
    finally:
        repo.pulls.clear()
    assert f"'{table.name}' is published: {world.hub.url}/me/adapter/commit/" in printed
    assert "1 thread, batch 1' is published: " in printed and "/me/adapter/discussions/1" in printed
    assert "latency," in printed and f"latencies: {table.name} (torch eager {table.version}, " in printed
    assert "name the repository of the adapter with --repo-id" in printed and "are for --push" in printed
    assert "ran other weights here than those in me/adapter" in printed and "me/nothing" in printed
    assert "measured False" in printed, "what could not be published is refused before it is measured"


EXPORTED = """
from dataclasses import replace
from restnet_hf import DeviceTable, ExportedModel, export_routes, push_latency
from restnet_hf.cli import app
model = Model.from_pretrained("me/adapter")
export_routes(model, "board", model.all_routes[:3], runtime="onnx")
board = ExportedModel("board", threads=1)
told = board.profiled.metadata["adapter"] == model.adapter_identity()
app(["measure", "board", "--push", "--seconds", "0.1", "--threads", "1"], standalone_mode=False)
with torch.no_grad():
    next(iter(model.stitches.values())).load_state_dict(
        {k: v + 1 for k, v in next(iter(model.stitches.values())).state_dict().items()})
export_routes(model, "changed", model.all_routes[:3], runtime="onnx")
try:
    push_latency(DeviceTable.of_export(ExportedModel("changed").profiled))
except ValueError as error:
    message = str(error)
table = DeviceTable.of_export(board.profiled)
push_latency(replace(table, device="Board", routes={"small-vit[:]": 1.0, "big-resnet[:]": 9.0}))
app(["export", "me/adapter", "--out", "there", "--budget", "latency_ms=5", "--device", "Board"], standalone_mode=False)
print(json.dumps([told, message, *map(str, ExportedModel("there").routes)]))
"""


@needs_export
@pytest.mark.slow
def test_what_was_exported_has_a_table_too(world, shelf):
    """It names its adapter; its routes alone are then offered; a folder of other weights is not published."""
    told, message, route = world.run(EXPORTED, "exporter")
    assert told and route == "small-vit[:]" and "ran other weights here than those in me/adapter" in message
    files = world.hub.repos["me/adapter"].commits[-1][1]
    (table,) = (
        DeviceTable.from_dict(json.loads(data))
        for path, data in files.items()
        if path.startswith(FOLDER) and json.loads(data)["runtime"] == "onnx" and json.loads(data)["device"] != "Board"
    )
    assert (table.precision, table.threads, table.batch_size) == ("fp32", 1, 1) and table.version and table.machine
    asked = {"device": f"{table.device}, onnx", "budget": {"latency_ms": 1e6}}
    ((answer,), said) = world.run(LOAD, "user", [json.dumps([asked])])
    assert answer[1] == dict(table.routes) and len(answer[1]) == 3 and not said
