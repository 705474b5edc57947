"""RowsInOrder: rows of batches come back in the order of the batches, from one process and from several."""

import pickle

import pytest
import torch
from several_processes import run_in_processes

from restnet_hf.data import collected as collected_rows
from restnet_hf.data.collected import LEAST_ROWS, RowsInOrder


SIZES = [3, 1, 700, 0, 900, 2, 5000, 4]  # of batches; the columns grow in between


def parts():
    """Batches of rows, as numbers in order and as pairs of them."""
    start = 0
    for number, size in enumerate(SIZES):
        rows = torch.arange(start, start + size)
        yield number, {"numbers": rows, "pairs": torch.stack([rows, -rows], 1).float()}
        start += size


def test_rows_come_back_in_the_order_of_batches():
    collected = RowsInOrder()
    assert collected.all() == {}
    for number, rows in reversed([*parts()]):
        collected.put(number, rows)
    found = collected.all()
    assert found["numbers"].tolist() == [*range(sum(SIZES))] and found["numbers"].dtype == torch.int64
    assert found["pairs"].tolist() == [[i, -i] for i in range(sum(SIZES))]
    assert collected.own()["numbers"][:4].tolist() == [6606, 6607, 6608, 6609], "as they came"


def test_a_column_has_room_for_more():
    collected = RowsInOrder()
    pointers = set()
    for number in range(LEAST_ROWS):
        collected.put(number, {"x": torch.tensor([number])})
        pointers.add(collected.columns["x"].data_ptr())
    assert len(pointers) == 1, "nothing is allocated for a batch"


def test_what_is_sent_has_no_unused_room(monkeypatch):
    sent = []
    monkeypatch.setattr(collected_rows, "gather", lambda value: sent.append(len(pickle.dumps(value))) or [value])
    collected = RowsInOrder()
    collected.put(0, {"x": torch.ones(3, 1000)})
    assert collected.all()["x"].shape == (3, 1000) and sent[0] < 1.1 * 3 * 1000 * 4


JOB = """
import json
from test_collected import parts
from restnet_hf.data.collected import RowsInOrder
from restnet_hf.distributed import own_items, this_process

collected = RowsInOrder()
for number, rows in own_items(parts()):
    collected.put(number, rows)
found = collected.all()
none = RowsInOrder()
if this_process().process_index == this_process().num_processes - 1:
    none.put(0, {"x": found["numbers"][:1]})
if this_process().is_main_process:
    print(json.dumps([found["numbers"].tolist(), found["pairs"].sum().item(), none.all()["x"].tolist()]))
else:
    none.all()
"""


@pytest.mark.slow
def test_processes_share_rows(tmp_path):
    for numbers, total, of_another in run_in_processes(JOB, tmp_path):
        assert numbers == [*range(sum(SIZES))] and total == 0 and of_another == [0]
