"""A fingerprint says which network it is, and each piece is checked when it first runs."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from conftest import MODELS, make_anchor
from torch import nn
from versions import needs_new_names

from restnet_hf.hashing import Piece, weights_sha256


def test_hash_of_weights_by_hand():
    tensors = {"b": torch.arange(4.0), "a": torch.tensor([[1, 2]], dtype=torch.int16)}
    of_a = hashlib.sha256(bytes([1, 0, 2, 0])).hexdigest()
    of_b = hashlib.sha256(tensors["b"].numpy().tobytes()).hexdigest()
    text = f"a torch.int16 (1, 2) {of_a}\nb torch.float32 (4,) {of_b}"
    assert weights_sha256(tensors) == hashlib.sha256(text.encode()).hexdigest()
    strided = {"b": torch.arange(8.0)[::2] / 2, "a": tensors["a"]}
    assert weights_sha256(strided) == weights_sha256(tensors)
    large = {str(k): torch.full((1 << 21,), float(k)) for k in range(3)}
    lines = (f"{k} torch.float32 ({1 << 21},) {hashlib.sha256(t.numpy()).hexdigest()}" for k, t in large.items())
    assert weights_sha256(large) == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert weights_sha256({"half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0)})


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_counts(name):
    """A change of any parameter or saved buffer changes the fingerprint; equal networks have equal ones."""
    anchor = make_anchor(name)
    before = anchor.fingerprint()
    assert before == make_anchor(name).fingerprint() and before.startswith("float32:")
    for key, value in list(anchor.model.state_dict().items())[:: 1 if name == "plain" else 7]:
        kept = value.clone()
        value += 1
        assert anchor.fingerprint() != before, key
        value.copy_(kept)
    assert anchor.fingerprint() == before


def test_cuts_count():
    blocks, modules = make_anchor("vit"), make_anchor("vit")
    modules.granularity = "module"
    assert blocks.fingerprint() != modules.fingerprint()


def test_pieces_survive_json():
    pieces = make_anchor("vit").pieces()
    assert [piece.cut for piece in pieces][-1] is None and len(pieces) == 4
    assert [Piece.from_dict(json.loads(json.dumps(asdict(piece)))) for piece in pieces] == pieces


def test_pieces_are_checked_when_they_first_run(images):
    anchor = make_anchor("resnet")
    anchor.expect_weights(anchor.pieces())
    last = f"resnet.{anchor.cuts[-1].name.removeprefix('resnet.')}"
    with torch.no_grad():
        next(p for n, p in anchor.model.named_parameters() if n.startswith(last)).add_(1)
        hidden = anchor(images, stop=3)
        anchor(hidden, 3, anchor.depth - 1)
        for use in (
            lambda: anchor(hidden, start=3),
            lambda: anchor(images),
            lambda: anchor.logits(images),
            lambda: anchor.bake(3),
            lambda: anchor.capture(images, [2, anchor.depth]),
        ):
            with pytest.raises(
                ValueError, match=f"of anchor 'resnet' from cut {anchor.depth - 1} to {anchor.depth} have"
            ):
                use()


def test_checked_once(images, monkeypatch):
    anchor = make_anchor("vit")
    anchor.expect_weights(anchor.pieces())
    anchor.verify()
    monkeypatch.setattr("restnet_hf.hashing._sha256s", None)  # would not be callable
    with torch.no_grad():
        anchor(anchor(images, stop=1), start=1)


def test_threads_check_at_once(images):
    anchor = make_anchor("resnet")
    anchor.expect_weights(anchor.pieces())
    with torch.no_grad():
        expected = make_anchor("resnet")(images[:1])

        def work(_):
            with torch.no_grad():
                return anchor(images[:1])

        with ThreadPoolExecutor(8) as pool:
            assert all(torch.allclose(result, expected, atol=1e-5) for result in pool.map(work, range(8)))
    assert not anchor._expected


@needs_new_names
def test_modules_put_into_a_network_are_no_change_of_its_weights(images):
    """As adapters such as LoRA do: the layer moves into another one, with the same weights."""

    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.more(x)

    anchor = make_anchor("vit")
    anchor.expect_weights(anchor.pieces())
    layer = anchor.model.vit.layers[1]
    layer.mlp.fc1 = Wrapped(layer.mlp.fc1)
    with torch.no_grad():
        anchor(images)
    assert not anchor._expected
