"""An anchor that was changed is never saved as the one that it was; one that was not raises no alarm."""

import copy
import pickle
import tempfile

import accelerate
import pytest
import torch
from conftest import CLASSES, make_anchor, save_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import TensorDataset

from restnet_hf import StitchConfig, StitchedModelForImageClassification, TrainArgs, hashing, train
from restnet_hf.hub.adapter_files import WEIGHTS
from restnet_hf.steps import run_steps
from restnet_hf.training.loop import set_checkpointing


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT asks by the old name
CHANGED = "anchor '{}' is no longer the network that the adapter names .* weights have changed.* Nothing was saved"
load = StitchedModelForImageClassification.from_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("anchors")
    for name in ("resnet", "vit"):
        save_model(name, path / name)
    make(path, "new").save_pretrained(path / "adapter")
    return path


def make(folder, state):
    """A model of two folders: new, saved once, or loaded."""
    if state == "loaded":
        return load(folder / "adapter")
    torch.manual_seed(0)
    model = StitchedModelForImageClassification.from_anchors(folder / "resnet", folder / "vit", order="given")
    model.set_route(model.add_stitch("resnet[:2] + vit[1:]"))
    if state == "saved":
        with tempfile.TemporaryDirectory() as name:
            model.save_pretrained(name)
    return model


@torch.no_grad()
def logits(model, images):
    return {str(route): run_steps(images, model.steps(route)) for route in model.all_routes}


def same(model, again, images, **tolerance):
    one, two = logits(model, images), logits(again, images)
    close = {
        route: torch.allclose(value, two[route], **{"rtol": 0, "atol": 0, **tolerance}) for route, value in one.items()
    }
    return one.keys() == two.keys() and all(close.values())


def with_lora(model, seed=0):
    """LoRA that changes what it is put on, in the whole end anchor."""
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=r"anchors\.vit\..*\.(q_proj|v_proj|query|value)", r=4, init_lora_weights=False)
    return get_peft_model(model, config)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("state", ["new", "saved", "loaded"])
def test_lora_merged_into_an_anchor(folder, tmp_path, images, state):
    """Refused with what to do, and nothing written; the whole checkpoint gives the merged logits."""
    model = make(folder, state)
    if state == "loaded":
        model.anchors["vit"].verify()  # what is merged into weights that were not read would be taken for others
    before = logits(model, images)
    merged = with_lora(model).merge_and_unload()
    assert merged is model and (logits(model, images)["vit[:]"] - before["vit[:]"]).abs().max() > 0.1
    entry = copy.deepcopy(model.config.anchors[1])
    make(folder, "new").save_pretrained(tmp_path / "out")
    old = contents(tmp_path / "out")
    for way in ({}, {"state_dict": model.state_dict()}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match=CHANGED.format("vit") + r": save with standalone=True.* with PEFT"):
            model.save_pretrained(tmp_path / "out", **way)
    assert contents(tmp_path / "out") == old
    model.save_pretrained(tmp_path / "out", standalone=True)
    again = load(tmp_path / "out")
    assert same(model, again, images)
    assert model.config.anchors[1] == entry and not model.config.standalone, "it is still what it was made of"
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    for changed in (model, again):
        with pytest.raises(ValueError, match=CHANGED.format("vit")):
            changed.save_pretrained(tmp_path / "third", standalone=False)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("state", ["new", "loaded"])
def test_lora_saved_beside(folder, tmp_path, images, state):
    """The adapter is what it was without LoRA, whenever it is saved; a whole checkpoint with it is refused."""
    model, expected = make(folder, state), make(folder, "new")
    with_lora(model)
    model.save_pretrained(tmp_path / "adapter")
    assert same(load(tmp_path / "adapter"), load(folder / "adapter"), images)
    assert [e["fingerprint"] for e in model.config.anchors] == [a.fingerprint() for a in expected.anchors.values()]
    with pytest.raises(ValueError, match="'vit' has other layers than its config .* merge_and_unload"):
        model.save_pretrained(tmp_path / "whole", standalone=True)
    assert not (tmp_path / "whole").exists()


def set_data(module, leaf, tensor):
    tensor.data = tensor.data + 1


def add_in_place(module, leaf, tensor):
    tensor.add_(1)


def add_to_data(module, leaf, tensor):
    tensor.data.view(-1)[-1:].add_(1)


def write_memory(module, leaf, tensor):
    tensor.detach().numpy().reshape(-1)[:1] += 1


def replace(module, leaf, tensor):
    setattr(module, leaf, nn.Parameter(tensor + 1) if isinstance(tensor, nn.Parameter) else tensor + 1)


def swap(module, leaf, tensor):
    tensor.copy_(tensor.flip(0)) if tensor.dim() and not torch.equal(tensor, tensor.flip(0)) else tensor.add_(1)


@pytest.fixture(scope="module")
def sealed(folder):
    models = {state: make(folder, state) for state in ("new", "saved", "loaded")}
    return lambda state: models[state]  # what hypothesis prints stays short


@given(
    state=st.sampled_from(["new", "saved", "loaded"]),
    anchor=st.sampled_from(["resnet", "vit"]),
    place=st.integers(0, 10**6),
    change=st.sampled_from([set_data, add_in_place, add_to_data, write_memory, replace, swap]),
)
@example(state="saved", anchor="vit", place=0, change=add_to_data)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@torch.no_grad()
def test_every_change_is_noticed(sealed, state, anchor, place, change):
    """Of any weight or saved buffer, also where no version counter tells of it; set right again, it is none."""
    model = sealed(state)
    network = model.anchors[anchor].model
    names = sorted(network.state_dict())
    path, _, leaf = names[place % len(names)].rpartition(".")
    module = network.get_submodule(path)
    tensor = getattr(module, leaf)
    values = tensor.clone()
    change(module, leaf, tensor)
    with tempfile.TemporaryDirectory() as out:
        with pytest.raises(ValueError, match=CHANGED.format(anchor)):
            model.save_pretrained(out)
        setattr(module, leaf, tensor)
        tensor.data = values
        model.save_pretrained(out)


def trained(model, images, folder):
    labels = torch.arange(len(images)) % CLASSES
    train(model, TensorDataset(images, labels), TrainArgs(num_train_epochs=1))
    model.train().eval()


def accelerated(model, images, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model.train())
    accelerator.backward(prepared(pixel_values=images, labels=torch.zeros(len(images), dtype=torch.long)).loss)
    model.save_pretrained(folder / "during", state_dict=accelerator.get_state_dict(prepared))
    assert accelerator.unwrap_model(prepared) is model.eval()


def paged(model, images, folder):
    model.page_to(folder / "pages")
    for route in (*model.all_routes, model.active_route):
        model.set_route(route)


def offloaded(model, images, folder):
    model.save_pretrained(folder / "before")
    for anchor in model.anchors.values():
        accelerate.cpu_offload(anchor.model, offload_buffers=True)
    assert all(tensor.is_meta for tensor in model.anchors.parameters())


def run_all(model, images, folder):
    model.fit_stitches(images)
    model.profile([(images, torch.zeros(len(images), dtype=torch.long))])
    set_checkpointing(model, True)
    model.bake()(images)
    with torch.inference_mode():
        model(images)


# What a user may do with a model; True where the result is another one.
HARMLESS = {
    "moved": lambda model, *_: model.to("cpu", memory_format=torch.channels_last),
    "copied": lambda model, *_: copy.deepcopy(model),
    "pickled": lambda model, *_: pickle.loads(pickle.dumps(model)),
    "compiled": lambda model, *_: torch.compile(model, backend="eager"),
    "own weights": lambda model, *_: model.load_state_dict(copy.deepcopy(model.state_dict())) and None,
    "other memory": lambda model, *_: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True) and None,
    "trained": trained,
    "accelerated": accelerated,
    "run": run_all,
    "pruned": lambda model, *_: model.prune_to([model.active_route]),
    "paged": paged,
    "offloaded": offloaded,
    "shared": lambda model, *_: model.share_memory(),
}


@pytest.mark.parametrize("what", HARMLESS)
@pytest.mark.parametrize("state", ["new", "loaded"])
def test_no_false_alarm(folder, tmp_path, images, state, what):
    model = make(folder, state)
    result = HARMLESS[what](model, images, tmp_path)
    model = result if isinstance(result, nn.Module) else model
    model.save_pretrained(tmp_path / "adapter")
    model = getattr(model, "_orig_mod", model)  # compiling it would take long
    again = load(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again(images).logits, model(images).logits, atol=1e-5)
    assert again.config.anchors == load(folder / "adapter").config.anchors, "the same on disk"


@pytest.mark.parametrize("state", ["new", "saved", "loaded"])
def test_casts(folder, tmp_path, images, state):
    """An anchor only cast is the same network; what is written of it whole is what it was cast to."""
    model = make(folder, state)
    model.to(torch.bfloat16)
    for whole in (False, True):
        model.save_pretrained(tmp_path / "adapter", standalone=whole)
        again = load(tmp_path / "adapter")
        assert again.dtype == torch.bfloat16 and same(model, again, images.bfloat16())
        again.save_pretrained(tmp_path / "again", standalone=False)
        assert same(model, load(tmp_path / "again"), images.bfloat16())
    model.to(torch.float32)
    model.save_pretrained(tmp_path / "back")
    model.save_pretrained(tmp_path / "whole", standalone=True)
    assert same(model, load(tmp_path / "whole"), images)
    with torch.no_grad():
        next(model.anchors["resnet"].parameters()).add_(1)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=CHANGED.format("resnet")):
        model.save_pretrained(tmp_path / "back")


def test_given_weights(folder, tmp_path, images):
    """Those of ``state_dict`` count, not the model's own."""
    model, other = make(folder, "saved"), make(folder, "saved")
    key = next(key for key in model.state_dict() if key.startswith("anchors.vit.") and key.endswith("weight"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state[key] += 1
    with pytest.raises(ValueError, match=CHANGED.format("vit")):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    model.save_pretrained(tmp_path / "adapter", state_dict=state, standalone=True)
    other.load_state_dict(state)
    assert same(other, load(tmp_path / "adapter"), images)
    model.save_pretrained(tmp_path / "adapter", state_dict={k: v for k, v in state.items() if "anchors" not in k})
    assert same(model, load(tmp_path / "adapter"), images)


def test_made_in_code(tmp_path):
    """Where no config could rebuild it there is another way; until it is first saved its weights may change."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("plain"), make_anchor("vit"), order="given")
    with torch.no_grad():
        model.anchors["plain"].model.classifier.weight.add_(1)
        model.save_pretrained(tmp_path)
        model.anchors["plain"].model.classifier.weight.add_(1)
    with pytest.raises(ValueError, match=CHANGED.format("plain") + ": it was made in code.*from_anchors"):
        model.save_pretrained(tmp_path)
    StitchedModelForImageClassification.from_anchors(*model.anchors.values(), order="given")


def test_built_from_a_config(folder, tmp_path, images):
    """Its anchors are random until their weights are loaded."""
    real = make(folder, "saved")
    model = StitchedModelForImageClassification(copy.deepcopy(real.config)).eval()
    for _ in range(2):
        with pytest.raises(ValueError, match=CHANGED.format("resnet")):
            model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole", standalone=True)
    assert same(model, load(tmp_path / "whole"), images)
    model.load_state_dict(real.state_dict())
    model.save_pretrained(tmp_path / "adapter")
    assert same(real, load(tmp_path / "adapter"), images)
    with torch.device("meta"):
        empty = StitchedModelForImageClassification(copy.deepcopy(real.config))
    with pytest.raises(ValueError, match="weights on the meta device have no values"):
        empty.save_pretrained(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_what_was_measured_before(folder, tmp_path, images):
    """Scores, similarities and features of the network that an anchor was are not taken for those of what it is."""
    model = make(folder, "saved")
    labelled = [(images, torch.arange(len(images)) % CLASSES)]
    model.profile(labelled)
    about = model.identity()
    with torch.no_grad():
        model.anchors["resnet"].model.classifier[-1].weight.mul_(2)
    assert model.identity() != about
    model.save_pretrained(tmp_path / "whole", standalone=True)
    scored = {str(row.route): bool(row.scores) for row in load(tmp_path / "whole").profiled.routes}
    assert scored == {"resnet[:]": False, "vit[:]": True, "resnet[:2] + vit[1:]": False}
    model.profile(labelled)
    model.save_pretrained(tmp_path / "whole", standalone=True)
    again = load(tmp_path / "whole")
    assert all(row.scores for row in again.profiled.routes) and again.valid_profile() == again.profiled
    with pytest.raises(ValueError, match="is for an anchor 'resnet' .* that this model does not have"):
        model.load_stitch(folder / "adapter", "night")


def test_changed_and_put_into_files(folder, tmp_path):
    model = make(folder, "saved")
    with torch.no_grad():
        next(model.anchors["vit"].parameters()).add_(1)
    model.page_to(tmp_path / "pages")
    model.set_route("resnet[:]")  # nothing of the other is in memory
    with pytest.raises(ValueError, match=CHANGED.format("vit")):
        model.save_pretrained(tmp_path / "adapter")


def test_what_saving_reads(folder, tmp_path, monkeypatch):
    """A model that was saved once is not hashed again; of weights that no route has run, once."""
    hashed = []
    compute = hashing._sha256s
    monkeypatch.setattr(hashing, "_sha256s", lambda t: hashed.append(t) or compute(t))
    for state, most in (("new", 100), ("saved", 0), ("loaded", 100)):
        model = make(folder, state)
        hashed.clear()
        model.save_pretrained(tmp_path)
        assert len(hashed) <= most and bool(hashed) == bool(most)
        hashed.clear()
        for kind in ("linear", "mlp"):
            model.set_route(model.add_stitch(f"resnet[:3] +{kind} vit[2:]", StitchConfig(kind)))
            model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, standalone=True)
        assert not hashed
