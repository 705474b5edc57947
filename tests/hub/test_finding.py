"""Repositories that cannot be read are counted and left out; the others are found, over HTTP by the real client."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import TOKEN, Refused, running
from many_profiles import profiles

from restnet_hf.hub.cards import MARK, make_card
from restnet_hf.limits import MAX_BYTES


CLIENT = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers"): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())  # neither finding nor pushing needs them, and they take long to import
import json, time, warnings
from pathlib import Path
from restnet_hf.hub.repository import find_adapters, push_folder
time.sleep = lambda seconds: None  # the client of the Hub waits between its tries

def find(**options):
    return sorted(adapter.repo_id for adapter in find_adapters(**options))

def push(folder, repo_id, revision):
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text("{}")
    push_folder(Path(folder), repo_id, [{"name": "net", "repo_id": "me/net", "revision": revision}], None)

for line in sys.stdin:
    name, arguments = json.loads(line)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            answer = {"find": find, "push": push}[name](**arguments)
        except OSError as error:
            answer = f"{type(error).__name__}: {error}"
    messages = [[str(w.message), w.filename] for w in caught if "left out" in str(w.message)]
    print(json.dumps([answer, messages]), flush=True)
"""
TAGS = "---\ntags: [restnet]\n"
CONFIG = b'{"model_type": "restnet"}'
# Cards that the client cannot make an object of, or that Python's JSON does not read; the whole page fails with them.
RAW = {
    "argument": '{"ignore_metadata_errors": true}',
    "self": '{"self": 1}',
    "digits": '{"restnet": {"routes": [], "metadata": {"x": ' + "9" * 5000 + "}}}",
    "deep": '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "cut": '{"x": ',
}
ODD = {  # by repository: what its card holds instead of a profile, and what the warning says of it
    "huge-number": '{"routes": [{"route": "a[:]", "costs": {"macs": 1'
    + "0" * 400
    + '}, "scores": {}}], "metadata": {}}',
    "number": "3",
    "list": "[]",
    "text": '"x"',
    "nested": '{"routes": [], "metadata": {"x": ' + "[" * 90 + "]" * 90 + "}}",
    "not-a-route": '{"routes": [{"route": "../x", "costs": 3}], "metadata": {}}',
}
METHODS = '{"get": 1, "to_dict": 2, "restnet": null}'  # they hide those of the client's object


class Shop:
    """A Hub and a process that talks to it."""

    def __init__(self, hub, folder) -> None:
        self.hub, self.folder, self.count = hub, folder, 0
        keep = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_ASSETS_CACHE")}
        keep |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
        keep |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.client = subprocess.Popen([sys.executable, "-c", CLIENT], env=keep, **pipes)

    def _ask(self, name, **arguments):
        print(json.dumps([name, arguments]), file=self.client.stdin, flush=True)
        return json.loads(self.client.stdout.readline())

    def find(self, **options):
        """The names, or the error; and the warnings, with the file that they name."""
        return self._ask("find", **options)

    def push(self, revision, repo_id="me/mine"):
        """The error, if any."""
        self.count += 1
        return self._ask(
            "push", folder=str(self.folder / f"adapter-{self.count}"), repo_id=repo_id, revision=revision
        )[0]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with running() as hub:
        shop = Shop(hub, tmp_path_factory.mktemp("shop"))
        yield shop
        shop.client.communicate()


@pytest.fixture
def shop(hub):
    """A Hub with three good adapters, and nothing of another test."""
    hub.hub.repos = {}
    hub.hub.refused, hub.hub.raw_cards, hub.hub.cut_short = {}, {}, None
    hub.hub.last, hub.hub.gone = None, False
    for repo_id, profile in profiles(3).items():
        hub.hub.put(repo_id, {"README.md": str(make_card(repo_id, [], profile)).encode()})
    return hub


GOOD = ["me/found-00", "me/found-01", "me/found-02"]


def test_odd_profiles_are_left_out(shop):
    """One warning, where the user's own line is, with the number and the first three."""
    for name, given in ODD.items():
        shop.hub.put(f"odd/{name}", {"README.md": (TAGS + f"restnet: {given}\n---\n").encode()})
    found, ((message, place),) = shop.find()
    assert found == GOOD and place == "<string>", "the user's own line"
    assert message.startswith("6 repositories were left out, as they cannot be read: odd/huge-number (ValueError: ")
    assert message.endswith(", 3 more") and len(message) < 1000
    assert shop.find(macs=1e12)[0] == GOOD, "the server's filter by tags leaves them out already"


def test_profiles_that_cannot_be_fetched(shop):
    """Gated, forbidden, failing, damaged, too large, cut short: each is that repository's own affair."""
    hub = shop.hub
    for name in ("gated", "forbidden", "failing", "gone", "damaged", "latin", "large", "short"):
        hub.put(f"odd/{name}", {"config.json": CONFIG, "profile.json": b'{"routes": [], "metadata": {}}' + b" " * 99})
    hub.put("odd/damaged", {"config.json": CONFIG, "profile.json": b'{"routes": ['})
    hub.put("odd/latin", {"config.json": CONFIG, "profile.json": b'{"\xff'})
    hub.put("odd/large", {"config.json": CONFIG, "profile.json": bytes(MAX_BYTES + 1)})
    hub.put("odd/empty", {"config.json": CONFIG, "profile.json": b'{"routes": [], "metadata": {}}'})
    hub.put("odd/none", {"config.json": CONFIG, "README.md": b"---\n{ no: yaml: [\n---\n"})
    for name, refused in {
        "gated": Refused(403, "GatedRepo", "ask its owner"),
        "forbidden": Refused(403, "", "no"),
        "failing": Refused(500, "", "broken"),
        "gone": Refused(404, "RepoNotFound", "gone"),
    }.items():
        hub.refused[f"odd/{name}/resolve/{hub.repos[f'odd/{name}'].commits[-1][0]}/profile.json"] = refused
    hub.cut_short = f"{hub.repos['odd/short'].commits[-1][0]}/profile.json"
    hub.log.clear()
    found, ((message, _),) = shop.find()
    assert found == GOOD
    assert message.startswith("8 repositories were left out, as they cannot be read: ") and message.endswith("5 more")
    assert not [sent for method, path, sent in hub.log if "odd/large/resolve" in path and method == "GET"]
    hub.refused = {key: refused for key, refused in hub.refused.items() if "gated" in key}
    hub.repos = {name: hub.repos[name] for name in [*GOOD, "odd/gated", "odd/none", "odd/empty"]}
    found, ((message, _),) = shop.find()
    assert found == GOOD
    assert message == ("1 repository was left out, as they cannot be read: odd/gated (GatedRepoError: status 403)"), (
        "one without a profile is no failure"
    )


@pytest.mark.parametrize("kind", RAW)
def test_a_card_that_spoils_the_page(shop, kind):
    """Each of the others is asked for by itself."""
    shop.hub.put("odd/raw", {"config.json": CONFIG})
    shop.hub.raw_cards["odd/raw"] = RAW[kind]
    if kind == "cut":
        shop.hub.raw_cards["odd/raw"] += '"}'  # of the whole list nothing can be read, of the others all
    found, messages = shop.find()
    assert found == GOOD
    assert [
        message.startswith("1 repository was left out, as they cannot be read: odd/raw (") for message, _ in messages
    ] == [True]


@pytest.mark.parametrize("raw", [METHODS, "[1]", '"text"', "7", "null"])
def test_a_card_of_another_kind(shop, raw):
    """It holds no profile, and there is no file: nothing to find, and nothing that failed."""
    shop.hub.put("odd/raw", {"config.json": CONFIG})
    shop.hub.raw_cards["odd/raw"] = raw
    assert shop.find() == [GOOD, []]


def test_a_hub_that_is_gone_is_an_error(shop):
    """From the start, or after the list; and too many requests are not a repository's own affair."""
    for index in range(3):
        shop.hub.put(f"odd/{index}", {"config.json": CONFIG, "profile.json": b"{}"})
    shop.hub.last = "/profile.json"
    assert "Error: " in shop.find()[0] and shop.hub.gone
    assert "Error: " in shop.find()[0]
    shop.hub.last, shop.hub.gone = None, False
    shop.hub.refused["profile.json"] = Refused(429, "", "slow down")
    assert "Error: " in shop.find()[0]


@pytest.mark.parametrize(
    ("card", "stays"),
    [
        (b"---\ntags: 3\n---\nmine", True),
        (b"---\ntags: {a: generated_from_trainer}\n---\nmine", True),
        (b"---\nignore_metadata_errors: true\nself: 1\n---\nmine", True),
        (b"---\n{ no: yaml: [\n---\nmine", True),
        (b"---\n- 1\n---\nmine", True),
        (b"---\nx: " + b"[" * 3000 + b"\n---\n", True),
        (b"\xff\xfe mine", True),
        (b"---\ntags: [generated_from_trainer]\n---\nits", False),
        (b"\xff" + MARK.encode(), False),
    ],
)
def test_a_card_that_cannot_be_read_is_somebodys_own(shop, card, stays):
    """It is left alone when an adapter is pushed."""
    sha = shop.hub.put("me/net", {"README.md": b"---\nlicense: mit\n---\n"})
    shop.hub.put("me/mine", {"README.md": card})
    assert shop.push(sha) is None
    files = shop.hub.repos["me/mine"].commits[-1][1]
    assert (files["README.md"] == card) is stays and "config.json" in files


def test_a_card_that_cannot_be_fetched_is_not_replaced(shop):
    """As long as nobody knows whose it is."""
    sha = shop.hub.put("me/net", {"README.md": b"---\nlicense: mit\n---\n"})
    shop.hub.put("me/never-read", {"README.md": b"my own"})
    shop.hub.refused["README.md"] = Refused(500, "", "broken")
    assert "Error: " in shop.push(sha, "me/never-read")
    assert len(shop.hub.repos["me/never-read"].commits) == 1


@pytest.mark.parametrize(
    ("raw", "licence"),
    [
        ('{"license": {"a": 1}}', "not stated"),
        ('{"license": ["mit", 3, ["x"]]}', "mit"),
        ('{"license": 7, "get": 3}', "not stated"),
        ('{"license": "mit", "self": 1}', "not stated"),
        ("[3]", "not stated"),
        ('{"license": "mit | <b>"}', "mit &#124; &#60;b&#62;"),
    ],
)
def test_licences_of_odd_cards(shop, raw, licence):
    """An anchor's card cannot keep others from pushing what they made of it."""
    sha = shop.hub.put("me/net", {"config.json": b"{}"})
    shop.hub.raw_cards["me/net"] = raw
    assert shop.push(sha) is None
    card = shop.hub.repos["me/mine"].commits[-1][1]["README.md"].decode()
    assert f"| net | me/net | {sha} | {licence} |" in card.splitlines()
