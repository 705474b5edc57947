"""What a route computes at its cuts comes out as hidden states, and changes nothing else."""

import pytest
import torch
from conftest import MODELS, make_anchor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from restnet_hf import StitchConfig, StitchedModelForImageClassification
from restnet_hf.steps import run_steps, split_at_cuts
from restnet_hf.stitches.tuning import SHARED_KINDS, TunedConfig, tuned_keys
from restnet_hf.training.loop import set_checkpointing


@torch.no_grad()
@pytest.mark.parametrize("end", ["vit", "swin_nhwc", "mobilenet", "tnt"])
def test_states_are_the_activations_at_the_cuts(images, end):
    """In the layouts of their anchors, and the logits are the same to the last bit."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor(end), order="given")
    front, back = model.anchors.values()
    model.set_route(model.add_stitch(f"resnet[:3] + {end}[2:]"))
    out = model(images, output_hidden_states=True)
    assert torch.equal(out.logits, model(images).logits) and model(images).hidden_states is None
    (point,) = model.active_route.stitch_points
    entered = model.stitches[point.name](front(images, stop=3))
    seen = [*front.capture(images, [1, 2, 3]).values(), entered]
    seen += [back(entered, start=2, stop=cut) for cut in range(3, back.depth + 1)]
    assert len(out.hidden_states) == len(seen)
    assert all(torch.equal(*pair) for pair in zip(out.hidden_states, seen, strict=True))
    layouts = [front.layout(cut) for cut in (1, 2, 3)] + [back.layout(cut) for cut in range(2, back.depth + 1)]
    assert [state.shape for state in out.hidden_states] == [layout.shape(len(images)) for layout in layouts]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_anchor_alone(anchors, images, name):
    model = StitchedModelForImageClassification.from_anchors(anchors[name])
    out = model(images, output_hidden_states=True)
    assert len(out.hidden_states) == anchors[name].depth and torch.equal(out.logits, model(images).logits)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(positions=st.lists(st.integers(-5, 4)))
@torch.no_grad()
def test_some_of_the_states(pair, images, positions):
    every = pair(images[:1], output_hidden_states=True).hidden_states
    some = pair(images[:1], output_hidden_states=positions).hidden_states
    assert len(every) == len(some) == 5
    for index, (state, all_of_them) in enumerate(zip(some, every, strict=True)):
        wanted = index in positions or index - 5 in positions
        assert torch.equal(state, all_of_them) if wanted else state is None


def test_states_that_are_not_there(pair, images):
    with pytest.raises(IndexError):
        pair(images, output_hidden_states=[5])
    for option in ("output_attentions", "interpolate_pos_encoding"):
        with pytest.raises(TypeError, match=option):
            pair(images, **{option: True})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_what_follows_the_first_stitch(pair, images, checkpointing):
    pair.train()
    if checkpointing:
        set_checkpointing(pair, True)
    states = pair(images, output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in states] == [False, False, False, True, True]
    for state in states[3:]:
        state.retain_grad()
    pair(images, torch.zeros(len(images), dtype=torch.long)).loss.backward()
    expected = [parameter.grad.clone() for parameter in pair.stitches.parameters()]
    pair.zero_grad()
    pair.config.output_hidden_states = True  # as by the argument
    out = pair(images, torch.zeros(len(images), dtype=torch.long))
    for state in out.hidden_states[3:]:
        state.retain_grad()
    out.loss.backward()
    assert all(bool(state.grad.any()) for state in out.hidden_states[3:])
    for parameter, gradient in zip(pair.stitches.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient)


def test_as_tuple(pair, images):
    logits, states = pair(images, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, pair(images).logits) and len(states) == 5


@torch.no_grad()
def test_branches(images):
    model = StitchedModelForImageClassification.from_anchors(make_anchor("vit"))
    model.set_route(model.add_stitch("vit[:1] + vit[2:]", StitchConfig("branch")))
    out = model(images, output_hidden_states=True)
    assert torch.equal(out.logits, model(images).logits) and len(out.hidden_states) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["norm", "lora"])
def test_tuned_anchors(pair, images, kind):
    """Pieces from cut to cut run with what is tuned, as the whole does."""
    before = pair(images).logits
    key = next(key for key in tuned_keys(pair.active_route)[-1] if key.kind == kind)
    tuned = pair.add_tuned(key, TunedConfig(kind, "vit", 0 if kind in SHARED_KINDS else 2))
    for parameter in tuned.parameters():
        parameter.add_(0.1)
    out = pair(images, output_hidden_states=True)
    assert torch.equal(out.logits, pair(images).logits) and not torch.equal(out.logits, before)
    steps = pair.steps(pair.active_route)
    assert [str(step.segment) for step in split_at_cuts(steps) if step.segment] == [
        *("resnet[:1]", "resnet[1:2]", "resnet[2:3]", "vit[2:3]", "vit[3:]")
    ]
    assert torch.equal(run_steps(images, split_at_cuts(steps)), out.logits)
