"""Features on disk: what comes back is what was put, and nothing half written, damaged or foreign is taken for it."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from restnet_hf.training.feature_cache import DTYPES, FeatureCache


IMAGES = 11
IDENTITY = {"network": "float32:5f70", "size": [32, 32]}
SPECS = {
    "stage-1.2": ((3, 4, 2), torch.float16),
    "tokens": ((5, 6), torch.bfloat16),
    "small": ((3, 4, 2), torch.int8),
    "logits": ((10,), torch.float32),
    "labels": ((), torch.int64),
}
HUGE = {"huge": ((2**55,), torch.float16)}


def values(dtype=torch.float32):
    noise = torch.Generator().manual_seed(3)
    rows = {name: torch.randn(IMAGES, *shape, generator=noise, dtype=dtype) for name, (shape, _) in SPECS.items()}
    return rows | {"labels": torch.arange(IMAGES) * 2**40}


def fill(cache, rows=None, specs=SPECS, places=range(0, IMAGES, 4), **process):
    rows = rows or values()
    with cache.write(specs, **process) as writer:
        for start in places:
            writer.put(start, {name: rows[name][start : start + 4] for name in specs})
    return cache


@pytest.fixture
def cache(tmp_path):
    return fill(FeatureCache(tmp_path, IDENTITY, IMAGES))


def bfloat16_bits(numbers):
    """Float32 rounded to its upper half, ties to even, in whole numbers."""
    bits = numbers.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def int8_bytes(numbers):
    """The largest value of each channel is 127, ties to even; the scales of an image lie before its numbers."""
    scales = np.abs(numbers).max((2, 3)) / np.float32(127)
    whole = np.rint(numbers / scales[:, :, None, None]).astype(np.int8)
    return np.concatenate([scales.view(np.uint8).reshape(IMAGES, -1), whole.view(np.uint8).reshape(IMAGES, -1)], 1)


def expected_row(name, index):
    """What an item holds of a tensor."""
    value = values()[name][index]
    if SPECS[name][1] != torch.int8:
        return value.to(SPECS[name][1])
    scales = value.abs().amax((1, 2), keepdim=True) / 127
    return (value / scales).round() * scales


CASTS = {
    "int8": int8_bytes,
    "float16": lambda x: x.astype(np.float16).view(np.uint16),
    "bfloat16": bfloat16_bits,
    "float32": lambda x: x,
    "int64": lambda x: x,
}


@pytest.mark.parametrize("name", SPECS)
def test_files_hold_the_values_cast(cache, name):
    """By numpy and by hand, from the raw file; and the json describes it."""
    shape, dtype = SPECS[name]
    expected = CASTS[str(dtype).removeprefix("torch.")](values()[name].numpy())
    raw = (cache.folder / f"{name}.bin").read_bytes()
    assert raw == expected.tobytes() and len(raw) == cache.nbytes({name: SPECS[name]})
    assert json.loads((cache.folder / f"{name}.json").read_text()) == {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "images": IMAGES,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "identity": IDENTITY,
    }
    for index in (0, 7, -1):
        row = cache[index][name]
        assert row.dtype == (torch.float32 if dtype == torch.int8 else dtype)
        assert torch.equal(row, expected_row(name, index))


def test_int8_of_zeros_and_of_few_axes(tmp_path):
    """A channel of zeros stays so, rows of one axis or none have one scale, and the error is half a step at most."""
    specs = {"map": ((2, 3, 3), torch.int8), "features": ((7,), torch.int8), "number": ((), torch.int8)}
    generator = torch.Generator().manual_seed(0)
    rows = {name: 100 * torch.randn(2, *shape, generator=generator) for name, (shape, _) in specs.items()}
    rows["map"][0, 1] = 0
    cache = FeatureCache(tmp_path, IDENTITY, 2)
    assert cache.nbytes(specs) == 2 * (18 + 2 * 4 + 7 + 4 + 1 + 4)
    with cache.write(specs) as writer:
        writer.put(0, {name: value.half() if name == "features" else value for name, value in rows.items()})
    for index in range(2):
        row = cache[index]
        assert row["map"].shape == (2, 3, 3) and torch.equal(row["number"], rows["number"][index])
        largest = rows["map"][index].abs().amax((1, 2), keepdim=True)
        assert ((row["map"] - rows["map"][index]).abs() <= largest / 254 * 1.0001).all()
        features = rows["features"][index].half().float()
        assert (row["features"] - features).abs().max() <= features.abs().max() / 254 * 1.0001
    assert not cache[0]["map"][1].any()
    with pytest.raises(ValueError, match=r"are \(7,\) torch.int64, not \(7,\) torch.int8"):
        fill(FeatureCache(tmp_path, {}, 4), {"x": torch.zeros(4, 7).long()}, {"x": specs["features"]}, (0,))
    with pytest.raises(ValueError, match="not finite in torch.float32"):
        fill(FeatureCache(tmp_path, {}, 4), {"x": torch.full((4, 7), torch.inf)}, {"x": specs["features"]}, (0,))


def test_types():
    assert CASTS.keys() == DTYPES.keys() == {str(dtype).removeprefix("torch.") for _, dtype in SPECS.values()}


def test_a_dataset(cache):
    assert len(cache) == len(list(cache)) == IMAGES  # iteration ends
    assert set(cache[0]) == set(SPECS) == set(cache.names)
    with pytest.raises(IndexError):
        cache[IMAGES]
    rows = cache.__getitems__([5, 2, 5, 0])
    assert [row["labels"].item() >> 40 for row in rows] == [5, 2, 5, 0]
    rows[0]["logits"].zero_()  # an own copy
    assert torch.equal(rows[2]["logits"], values()["logits"][5]) and torch.equal(cache[5]["logits"], rows[2]["logits"])
    cache.verify()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on forks, here short ones
@pytest.mark.parametrize("name", SPECS)
def test_all_rows_of_a_name(cache, name):
    shape, dtype = SPECS[name]
    found = cache.rows(name)
    stored = torch.stack([cache[index][name] for index in range(IMAGES)])  # int8 comes back in float32
    assert (found.shape, found.dtype) == ((IMAGES, *shape), torch.float32 if dtype == torch.int8 else dtype)
    assert torch.equal(found, stored) and (dtype == torch.int8 or torch.equal(found, values()[name].to(dtype)))
    found.zero_()
    assert cache.rows(name).any(), "what is returned is a copy"
    with pytest.raises(ValueError, match="no complete"):
        cache.rows("other")


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders(cache, workers):
    loader = DataLoader(
        Subset(cache.select(["labels", "tokens"]), range(1, IMAGES)),
        batch_size=3,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator().manual_seed(1),
    )
    seen = []
    for batch in loader:
        assert set(batch) == {"labels", "tokens"}
        for label, tokens in zip(batch["labels"], batch["tokens"], strict=True):
            seen.append(label.item() >> 40)
            assert torch.equal(tokens, values()["tokens"][seen[-1]].bfloat16())
    assert sorted(seen) == list(range(1, IMAGES)) != seen


def test_no_maps_travel(cache):
    empty = len(pickle.dumps(cache))
    cache[0]
    assert len(pickle.dumps(cache)) == empty


def test_next_run_finds_it(cache, tmp_path):
    again = FeatureCache(tmp_path, dict(reversed(IDENTITY.items())), IMAGES)
    assert again.missing(SPECS) == [] and again.missing(["tokens", "other"]) == ["other"]
    assert torch.equal(again[3]["tokens"], cache[3]["tokens"])
    for other in (FeatureCache(tmp_path, IDENTITY | {"size": [32, 33]}, IMAGES), FeatureCache(tmp_path, IDENTITY, 10)):
        assert other.missing(SPECS) == list(SPECS) and other.names == ()
    assert again.missing({"tokens": ((5, 6), torch.float16), "logits": ((5, 2), torch.float32)}) == [
        "tokens",
        "logits",
    ]
    with pytest.raises(FileExistsError, match=r"\['labels', 'logits', 'small', 'stage-1.2', 'tokens'\] are complete"):
        fill(again)
    again.verify()


def test_more_names_later(cache, tmp_path):
    """Other routes add what they need, and a file of another type takes the place of the old one."""
    specs = {"more": SPECS["logits"], "tokens": ((5, 6), torch.float32)}
    cache[0]
    fill(cache, values() | {"more": values()["logits"]}, specs)
    assert set(cache[0]) == {*SPECS, "more"}
    assert torch.equal(cache[4]["tokens"], values()["tokens"][4]) and cache.missing(specs) == []
    cache.verify()


def test_selection(cache, tmp_path):
    assert list(cache.select(["logits"])[0]) == ["logits"]
    with pytest.raises(ValueError, match=r"no complete \['stage'\]; there are \['labels', 'logits'"):
        cache.select(["labels", "stage"])
    with pytest.raises(ValueError, match="holds no complete tensor; fill it with write"):
        FeatureCache(tmp_path, {}, 1)[0]
    with pytest.raises(ValueError, match="images=0 must be at least 1"):
        FeatureCache(tmp_path, {}, 0)


def test_damage(cache, tmp_path):
    file = cache.folder / "tokens.bin"
    raw = bytearray(file.read_bytes())
    raw[17] ^= 1
    file.write_bytes(raw)
    cache.select(["logits", "labels"]).verify()
    with pytest.raises(ValueError, match="tokens.bin is damaged.*delete it"):
        cache.verify()
    file.unlink()
    assert cache.missing(SPECS) == ["tokens"]
    fill(cache, specs={"tokens": SPECS["tokens"]}).verify()


def test_truncated(cache, tmp_path):
    view = cache.select(["tokens"])
    os.truncate(cache.folder / "tokens.bin", 100)
    again = FeatureCache(tmp_path, IDENTITY, IMAGES)
    assert again.missing(SPECS) == ["tokens"] and "tokens" not in again[0]
    with pytest.raises(ValueError, match="tokens.bin is damaged"):
        again.verify()
    with pytest.raises(ValueError, match="tokens.bin is not complete any more"):
        view[0]


FOREIGN = {
    "identity": {"identity": IDENTITY | {"network": "float32:0000"}},
    "images": {"images": IMAGES + 1},
    "shape": {"shape": [5, 7]},
    "shape of the same size": {"shape": [-5, -6]},
    "shape that is none": {"shape": "56"},
    "type": {"dtype": "float32"},
    "type that is none": {"dtype": "load"},
    "checksum": {"sha256": None},
}


@pytest.mark.parametrize("change", FOREIGN)
def test_foreign_json(cache, tmp_path, change):
    file = cache.folder / "tokens.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | FOREIGN[change]))
    assert cache.missing(SPECS) == ["tokens"] and "tokens" not in cache.names
    fill(cache, specs={"tokens": SPECS["tokens"]}).verify()
    assert json.loads(file.read_text()) == about


@pytest.mark.parametrize("text", ["", "[1]", "3", "{}", '{"shape": [5, 6]'])
def test_no_json(cache, text):
    (cache.folder / "tokens.json").write_text(text)
    assert cache.missing(SPECS) == ["tokens"]


@pytest.mark.parametrize("wrong", [7e4, float("nan"), float("-inf")])
def test_values_that_do_not_fit(tmp_path, wrong):
    cache, rows = FeatureCache(tmp_path, IDENTITY, IMAGES), values()
    rows["stage-1.2"][9, 1, 1, 1] = wrong
    with pytest.raises(ValueError, match=r"'stage-1.2' has values that are not finite in torch.float16.*bfloat16"):
        fill(cache, rows)
    assert cache.missing(SPECS) == list(SPECS) and not list(cache.folder.glob("*.*i*n"))
    if wrong == 7e4:
        fill(cache, rows, {"stage-1.2": ((3, 4, 2), torch.bfloat16)})
        assert cache[9]["stage-1.2"][1, 1, 1] == 70144  # 137 * 2**9, the nearest


def test_images_left_out(tmp_path):
    cache = FeatureCache(tmp_path, IDENTITY, IMAGES)
    with pytest.raises(ValueError, match="3 of 11 images were not put.*drop_last=False"):
        fill(cache, places=(0, 4))
    assert not list(cache.folder.glob("*.bin")) and cache.missing(SPECS) == list(SPECS)
    fill(cache, places=(4, 0, 7, 4)).verify()  # in any order, some twice
    assert torch.equal(torch.stack([row["logits"] for row in cache]), values()["logits"])


PUTS = {
    "not every name": (0, {"x": torch.zeros(1, 2)}, "all of .* must be put together"),
    "another shape": (
        0,
        {"x": torch.zeros(1, 3), "y": torch.zeros(1).long()},
        r"are \(3,\) torch.float32, not \(2,\)",
    ),
    "another kind": (
        0,
        {"x": torch.zeros(1, 2), "y": torch.zeros(1)},
        r"'y' are \(\) torch.float32, not \(\) torch.i",
    ),
    "beyond the end": (2, {"x": torch.zeros(2, 2), "y": torch.zeros(2).long()}, r"\[2\] images came for place 2 of 3"),
    "before the start": (-1, {"x": torch.zeros(1, 2), "y": torch.zeros(1).long()}, "for place -1 of 3"),
    "unequal": (0, {"x": torch.zeros(1, 2), "y": torch.zeros(2).long()}, r"\[1, 2\] images came"),
}


@pytest.mark.parametrize("case", PUTS)
def test_wrong_rows(tmp_path, case):
    start, rows, message = PUTS[case]
    cache = FeatureCache(tmp_path, IDENTITY, 3)
    specs = {"x": ((2,), torch.float16), "y": ((), torch.int64)}
    with pytest.raises(ValueError, match=message), cache.write(specs) as writer:
        writer.put(0, {"x": torch.zeros(3, 2), "y": torch.zeros(3).long()})
        writer.put(start, rows)
    assert not list(cache.folder.glob("*.bin"))


NAMES = ["../x", "a/b", "..", ".hidden", "", "a\n", "a\\b", "-x", "ä", "/tmp/x"]


@pytest.mark.parametrize("name", NAMES)
def test_names_stay_in_the_folder(tmp_path, name):
    cache = FeatureCache(tmp_path / "in", IDENTITY, 3)
    for use in (cache.missing, cache.select, lambda names: cache.write({names[0]: SPECS["labels"]}).__enter__()):
        with pytest.raises(ValueError, match="cannot be the name of a file here"):
            use([name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", [((0,), torch.float16), ((-2, -2), torch.float16), ((2,), torch.float64)])
def test_what_cannot_be_kept(tmp_path, spec):
    with pytest.raises(ValueError, match="rows of 'x' cannot be stored with shape"):
        FeatureCache(tmp_path, IDENTITY, 3).nbytes({"x": spec})


def test_more_than_the_disk_holds(cache):
    """Refused by the estimate; what is there stays."""
    before = sorted(cache.folder.glob("*.*"))
    with pytest.raises(
        OSError, match="11 images take .* MB and .* MB are free in .* give another cache_dir"
    ) as raised:
        fill(cache, specs=HUGE)
    assert raised.value.errno == errno.ENOSPC
    assert sorted(cache.folder.glob("*.*")) == before
    cache.verify()


def on_a_small_disk(folder):
    """In a namespace of its own, on a disk of 3 MB: what fits is written, what does not is refused untouched."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder], check=True)
    cache = FeatureCache(folder, IDENTITY, IMAGES)
    fill(cache)
    free = shutil.disk_usage(folder).free
    big = FeatureCache(folder, {"big": True}, 1024)
    for width, dtype in ((1024, torch.float32), (free * 97 // 100 // 2048, torch.float16)):  # the second but for 3 %
        specs = {"x": ((width,), dtype)}
        with pytest.raises(OSError, match="1024 images take .* MB and 3.. MB are free") as raised, big.write(specs):
            raise AssertionError("the block was entered")
        assert raised.value.errno == errno.ENOSPC and shutil.disk_usage(folder).free >= free - 8192
    with big.write({"x": ((1024,), torch.float16)}) as writer:
        assert shutil.disk_usage(folder).free < free - 2**21 + 1  # taken before anything is put
        writer.put(0, {"x": torch.ones(1024, 1024)})
    big.verify()
    cache.verify()


def under_a_limit(folder):
    """The system refuses the place that the estimate thought was there."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    cache = FeatureCache(folder, IDENTITY, 100)
    specs = {"small": ((), torch.int64), "large": ((100,), torch.float16)}
    with (
        pytest.raises(OSError, match="100 images take 0.0 MB and .* work without a cache") as raised,
        cache.write(specs),
    ):
        raise AssertionError("the block was entered")
    assert raised.value.errno == errno.EFBIG and not list(cache.folder.glob("*.bin"))


def killed(folder):
    cache = FeatureCache(folder, IDENTITY, IMAGES)
    with cache.write(SPECS | {"other": SPECS["labels"]}) as writer:
        writer.put(0, values() | {"other": values()["labels"]})  # every row is there, only the end is not
        os._exit(9)


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """What became of the three functions above, each in a process of its own; and their folders."""
    folder, unshare = tmp_path_factory.mktemp("processes"), shutil.which("unshare")
    alone = [unshare, "-Urm"] if unshare and not subprocess.run([unshare, "-Urm", "true"]).returncode else []
    command = [*alone, sys.executable, "-W", "error", __file__, folder, str(len(alone))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, folder


@pytest.mark.slow
def test_small_disk(codes):
    if "on_a_small_disk" not in codes[0]:
        pytest.skip("no disk can be mounted here")
    assert codes[0]["on_a_small_disk"] == 0, codes[1]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system takes no place beforehand")
def test_no_place_after_all(codes):
    assert codes[0]["under_a_limit"] == 0, codes[1]


def test_killed_half_way(codes):
    found, errors, folder = codes
    assert found["killed"] == 9, errors
    cache = FeatureCache(folder / "killed", IDENTITY, IMAGES)
    left = {file.name for file in cache.folder.iterdir()}
    assert {f"{name}.bin" for name in [*SPECS, "other"]} <= left, "nothing was left, so this shows nothing"
    assert cache.missing(SPECS) == list(SPECS) and cache.names == ()
    fill(cache).verify()
    assert not (cache.folder / "other.bin").exists()
    assert torch.equal(torch.stack([row["logits"] for row in cache]), values()["logits"])


def test_failed_half_way(tmp_path):
    cache = FeatureCache(tmp_path, IDENTITY, IMAGES)
    with pytest.raises(KeyboardInterrupt), cache.write(SPECS) as writer:
        writer.put(0, values())
        raise KeyboardInterrupt
    assert not list(cache.folder.glob("*.bin")) and cache.missing(SPECS) == list(SPECS)


def test_two_runs_at_once(tmp_path):
    """The second is refused, and does not touch what the first is writing."""
    first, second = (FeatureCache(tmp_path, IDENTITY, IMAGES) for _ in range(2))
    with first.write(SPECS) as writer:
        writer.put(0, values())
        with pytest.raises(BlockingIOError, match="another run is writing into .*; wait until it is done"):
            fill(second)
        assert second.missing(SPECS) == list(SPECS)
    second.verify()
    assert torch.equal(second[10]["logits"], values()["logits"][10])


def take_turn(folder, answers):
    cache = FeatureCache(folder, IDENTITY, IMAGES)
    with cache.turn(SPECS) as missing:
        answers.put(len(missing))
        if missing:
            time.sleep(2)
            fill(cache)
    cache.verify()


@pytest.mark.slow
def test_runs_with_one_folder_take_turns(tmp_path):
    """The first writes everything, the others wait, and find it."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    runs = [context.Process(target=take_turn, args=(tmp_path, answers)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert sorted(answers.get(timeout=10) for _ in runs) == [0, 0, len(SPECS)]


@pytest.mark.slow
def test_a_turn_says_that_it_waits(tmp_path, caplog):
    cache = FeatureCache(tmp_path, IDENTITY, IMAGES)
    waiting = threading.Thread(target=lambda: cache.turn(SPECS).__enter__())
    with cache.turn(SPECS) as missing:
        assert missing == list(SPECS)
        waiting.start()
        waiting.join(2)
        assert waiting.is_alive()
        fill(cache)
    waiting.join(60)
    assert not waiting.is_alive() and "another run is writing into" in caplog.text


def test_a_whole_folder_may_be_read_only(cache):
    (cache.folder / ".turn").unlink(missing_ok=True)
    with cache.turn(SPECS) as missing:
        assert missing == [] and not (cache.folder / ".turn").exists()


def rank(number, barrier, folder, answers, other):
    """One of two processes: fills a cache with the other, then goes through failures of either."""
    answers.put((number, "reads", other[5]["labels"].item() >> 40))
    wait = partial(barrier.wait, 120)
    turns = range(0, IMAGES, 4)[number::2]
    fill(FeatureCache(folder, IDENTITY, IMAGES), places=turns, main=number == 0, barrier=wait)
    for failing in (0, 1):
        cache = FeatureCache(folder, {"failing": failing}, IMAGES)
        try:
            with cache.write(SPECS, number == 0, wait) as writer:
                for start in turns if number != failing else ():
                    writer.put(start, {name: rows[start : start + 4] for name, rows in values().items()})
                if number == failing:
                    raise ZeroDivisionError
        except Exception as error:
            answers.put((number, f"rank {failing} fails", repr(error)))
    try:
        fill(FeatureCache(folder, {"disk": "full"}, IMAGES), specs=HUGE, main=number == 0, barrier=wait)
    except Exception as error:
        answers.put((number, "disk full", repr(error)))


@pytest.mark.slow
def test_two_processes(cache, tmp_path):
    """They write what one does alone; if one fails, both raise and nothing remains; no process waits for ever."""
    together, spawn = tmp_path / "together", multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    cache[0]  # it travels after its maps were opened
    ranks = [spawn.Process(target=rank, args=(number, barrier, together, answers, cache)) for number in (0, 1)]
    for process in ranks:
        process.start()
    found = {(number, case): text for number, case, text in (answers.get(timeout=200) for _ in range(8))}
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    both = FeatureCache(together, IDENTITY, IMAGES)
    both.verify()
    for file in sorted(cache.folder.glob("[!.]*")):
        assert (both.folder / file.name).read_bytes() == file.read_bytes()
    assert found.pop((0, "reads")) == found.pop((1, "reads")) == 5
    assert found.pop((0, "rank 0 fails")) == found.pop((1, "rank 1 fails")) == "ZeroDivisionError()"
    assert "see the error of the main process" in found.pop((1, "rank 0 fails"))
    assert "4 of 11 images were not put" in found.pop((0, "rank 1 fails"))
    assert "MB are free" in found[0, "disk full"]
    assert "see the error of the main process" in found[1, "disk full"]
    assert {file.parent for file in together.glob("*/*.bin")} == {both.folder}


def test_larger_than_the_memory(tmp_path):
    """A file of holes, twice the size of the machine's memory, is read like any other."""
    images = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    cache = FeatureCache(tmp_path, IDENTITY, images)
    cache.folder.mkdir()
    about = {"shape": [2**20], "dtype": "float16", "images": images, "identity": IDENTITY, "sha256": 64 * "0"}
    (cache.folder / "x.json").write_text(json.dumps(about))
    with (cache.folder / "x.bin").open("wb") as file:
        file.truncate(2 * 2**20 * images)
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\x3c")  # 1 as float16
    row = cache[images - 1]["x"]
    assert row[-1] == 1 and row.count_nonzero() == 1


if __name__ == "__main__":
    made = {}
    for act in [under_a_limit, killed] + [on_a_small_disk] * (sys.argv[2] != "0"):
        (place := Path(sys.argv[1], act.__name__)).mkdir()
        if not (child := os.fork()):
            act(place)
            sys.exit()
        made[act.__name__] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(made))  # noqa: T201
