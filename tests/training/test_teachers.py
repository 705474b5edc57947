"""Which classifier teaches, what it says for the model's classes, and what cannot teach."""

import copy
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor, make_model, save_model
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset
from trainings import FAST, ROUTES, Noisy, build, data, trained

from restnet_hf import StitchedModelForImageClassification, TrainArgs, load_anchor, train, train_heads
from restnet_hf.data.labels import find_classes
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.training.learner import Learner
from restnet_hf.training.loaders import first_images
from restnet_hf.training.outside import OutsideClassifier, ready_teacher
from restnet_hf.training.teachers import PROBE, confidence, load_teacher, make_teacher, mean_logits, score


NAMES = ("cat", "dog", "fish", "owl", "rose")
SHUFFLED = ("owl", "rose", "cat", "fish", "dog")


def held_out(size=24, labels=True):
    """A function that gives batches, as the loop has it."""

    def images():
        for batch in first_images(data(size), size, 8):
            yield batch if labels else {"pixel_values": batch["pixel_values"]}

    return images


def taught(model, teacher, **options):
    return make_teacher(model, TrainArgs(teacher=teacher, **options), held_out())


def named(name, names, seed=0, **options):
    """An anchor whose classes have names."""
    return load_anchor(
        make_model(name, seed),
        name=options.pop("called", name),
        preprocessing=options.pop("preprocessing", Preprocessing((SIZE, SIZE))),
        label_names=names,
    )


def build_named(names=NAMES):
    model = StitchedModelForImageClassification.from_anchors(
        named("resnet", names), named("vit", names, 1), order="given"
    )
    torch.manual_seed(3)
    model.add_stitches(ROUTES)
    return model


class Wide(nn.Module):
    """A plain classifier of many classes."""

    def __init__(self, classes=12):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def wide(names, seed=4, **preprocessing):
    torch.manual_seed(seed)
    options = {"image_size": (SIZE, SIZE), **preprocessing}
    return load_anchor(Wide(len(names)), name="wide", preprocessing=Preprocessing(**options), label_names=names)


# the model's anchors


def test_mean_by_hand(images):
    """In float64: the log of the mean of both probabilities; each anchor runs once for fronts and teacher."""
    model = build()
    teacher = taught(model, "mean")
    with torch.no_grad():
        both = [model.anchors[name](images).double().softmax(-1) for name in ("resnet", "vit")]
        found = teacher.logits(images)
    assert torch.allclose(found.double(), (sum(both) / 2).log(), atol=1e-5)
    assert (teacher.name, teacher.output, teacher.anchors) == ("mean", "teacher-mean", ("resnet", "vit"))
    assert teacher.reason == "mean of resnet, vit"
    runs = {name: 0 for name in model.anchors}
    for name, anchor in model.anchors.items():
        anchor.model.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    job = Learner(model, ROUTES, TrainArgs(teacher="mean"), teacher=teacher)
    outputs = job.frozen.compute(images, job.frozen.names(job.routes, matching=False))
    assert outputs.keys() == {"front-resnet-2", "front-resnet-4", "teacher-mean"} and runs == {"resnet": 1, "vit": 1}
    assert torch.allclose(outputs["teacher-mean"], found, atol=1e-6)


def test_mean_of_extreme_logits():
    """Neither overflow nor the log of 0."""
    found = mean_logits([torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])])
    assert torch.allclose(found, torch.tensor([[0.5, 0.5]]).log())


def test_auto_is_the_more_accurate_anchor(demo_model, clothes):
    """On real images, whichever is in front; the profile tells how accurate each is."""
    anchors = [*demo_model.anchors.values()]
    for order in ("large-to-small", "small-to-large"):
        model = StitchedModelForImageClassification.from_anchors(*anchors, order=order)
        rows = clothes(model, "test", 192)
        profile = model.profile(rows)
        accuracy = {row.route.segments[0].anchor: row.scores["accuracy"] for row in profile.routes}
        best, other = sorted(accuracy, key=accuracy.get, reverse=True)
        assert accuracy[best] > accuracy[other], "equal scores would show nothing"
        teacher = make_teacher(model, TrainArgs(), partial(first_images, rows, 192, 64))
        assert teacher.name == best and teacher.anchors == (best,)
        assert teacher.reason == (
            f"{best} ({100 * accuracy[best]:.1f} % of 192 held-out images, {other} {100 * accuracy[other]:.1f} %)"
        )


@pytest.mark.parametrize("best", ["resnet", "vit"])
def test_auto_in_both_orders_and_what_is_recorded(best, caplog):
    """Labels that one anchor gets right: it teaches, be it the larger or not."""
    model = build()
    images = data().tensors[0]
    with torch.no_grad():
        labels = model.anchors[best](images).argmax(-1)
    caplog.set_level("INFO", "restnet_hf.training.teachers")
    result = train(model, TensorDataset(images, labels), TrainArgs(**FAST))
    assert result.teacher.startswith(f"{best} (100.0 % of 24 held-out images, ")
    assert model.config.training[-1]["teacher"] == result.teacher and f"teacher: {result.teacher}" in caplog.text
    json.dumps(model.config.to_dict())


def test_auto_without_labels():
    """The one whose logits stand out at one scale, however large the logits are."""
    model = build()
    teacher = make_teacher(model, TrainArgs(distillation=1.0), held_out(labels=False))
    images = data().tensors[0]
    sure = {}
    with torch.no_grad():
        for name, anchor in model.anchors.items():
            logits = anchor(images).double()
            logits -= logits.mean(1, keepdim=True)
            sure[name] = (logits / logits.square().mean().sqrt()).softmax(1).amax(1).mean().item()
    best, other = sorted(sure, key=sure.get, reverse=True)
    assert teacher.name == best
    assert teacher.reason == (
        f"{best} ({100 * sure[best]:.1f} % mean confidence on 24 held-out images without labels, {other} "
        f"{100 * sure[other]:.1f} %)"
    )
    ignored = [{"pixel_values": images, "labels": torch.full((24,), -100)}]
    assert make_teacher(model, TrainArgs(), lambda: ignored).reason == teacher.reason, "no label is known"


def test_confidence_does_not_depend_on_temperature():
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(200, 10, generator=rng)
    clear = plain + 4 * nn.functional.one_hot(torch.arange(200) % 10, 10)
    assert confidence(plain) == pytest.approx(confidence(30 * plain + 5), abs=1e-5)
    assert confidence(clear) > confidence(plain) + 0.05
    broken = clear.clone()
    broken[:100] = float("nan")
    assert confidence(broken) < 0.6 * confidence(clear) and confidence(torch.full((4, 3), float("inf"))) == 0
    assert confidence(torch.zeros(4, 5)) == pytest.approx(0.2)


def test_scores_by_hand():
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [float("nan"), 0, 0]])
    accuracy, sure = score(logits, torch.tensor([0, 1, 0, 0]))
    high, low = (torch.tensor([[2.0, 0, 0]]).softmax(1)[0, index].item() for index in (0, 1))
    assert accuracy == 0.5 and sure == pytest.approx((2 * high + low) / 4)
    soft = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1], [1.0, 0, 0]])
    assert score(logits, soft)[0] == pytest.approx(2.5 / 4)


def test_one_anchor_is_its_own_teacher():
    model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), routes="skip")
    assert taught(model, "auto").reason == "resnet (the only anchor)"
    x = data().tensors[0][:4]
    assert torch.allclose(
        taught(model, "mean").logits(x).softmax(-1), model.anchors["resnet"](x).softmax(-1), atol=1e-6
    )


def test_new_heads_of_all_anchors_that_may_teach_are_trained_first():
    for teacher, first in (("auto", ["resnet", "vit"]), ("vit", ["vit"]), (lambda x: x[:, 0, 0, :3], ["vit"])):
        torch.manual_seed(0)
        model = build(num_labels=3)
        train(model, data(classes=3), TrainArgs(**FAST, teacher=teacher))
        assert model.config.trained_heads == first


def test_a_teacher_stays_what_it_is_while_its_head_trains():
    """The end's own head is the teacher's and trains on: what it taught at first it teaches to the end."""
    torch.manual_seed(0)
    model = build(num_labels=3)
    train_heads(model, data(classes=3))
    teacher, x = taught(model, "vit"), data().tensors[0][:4]
    before = teacher.logits(x)
    assert torch.equal(before, model(x, route="vit[:]").logits)
    with torch.no_grad():
        model.heads["vit"].weight.mul_(2)
    assert torch.equal(teacher.logits(x), before) and not torch.equal(model(x, route="vit[:]").logits, before)


def test_an_anchor_of_the_model_is_found_by_its_object():
    first = make_anchor("resnet")
    model = StitchedModelForImageClassification.from_anchors(first, make_anchor("vit", seed=1), order="given")
    for given in (model.anchors["resnet"], first, first.model):
        assert taught(model, given).anchors == ("resnet",)
    other = copy.copy(first)
    other.preprocessing = Preprocessing((SIZE, SIZE), (0.5, 0.5, 0.5))
    assert taught(model, other).anchors == ()


# classifiers from outside


def test_a_narrower_task_of_a_wide_teacher_with_its_own_images():
    """By hand: the model's images are normalised and resized anew, and its classes chosen by name."""
    model = build_named()
    names = ["x", "Owl", "y", "rose", "z_z", "CAT", "fish", "a", "b", "c", "dog, hound", "d"]
    anchor = wide(names, image_size=(32, 48), mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    teacher = taught(model, anchor)
    x = data().tensors[0][:6]
    own = interpolate(x, size=(32, 48), mode="bilinear", antialias=True).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)))
    own = (own - mean) / std
    logits = own.mean((2, 3)) @ anchor.model.head.weight.double().T + anchor.model.head.bias.double()
    expected = logits[:, [5, 10, 6, 1, 3]]
    assert torch.allclose(teacher.logits(x).double(), expected, atol=1e-5)
    assert len(teacher.name) == 16 and int(teacher.name, 16) and teacher.output == f"teacher-{teacher.name}"
    with torch.no_grad():
        accuracy = (teacher.logits(data().tensors[0]).argmax(-1) == data().tensors[1]).double().mean().item()
    assert teacher.reason == f"'wide' ({100 * accuracy:.1f} % of 24 held-out images)"
    assert make_teacher(model, TrainArgs(teacher=anchor, distillation=1.0), held_out(labels=False)).reason == "'wide'"


def test_names_of_classes():
    tench = ["tench, Tinca tinca", "crane, bird", "crane, machine"]
    assert find_classes(["crane, machine", "tench, Tinca tinca"], tench) == [2, 0]
    assert find_classes(["Tench", "bus"], tench) == [0, None]
    assert find_classes(["crane"], tench) == [None], "either of two"
    assert find_classes(["n01440764"], tench) == [0], "an id of WordNet"
    assert find_classes(["tench", "tench"], tench) == [None, None]
    assert find_classes(["a_b", "c"], ["c", "a b"]) == [1, 0]


def test_a_folder_is_loaded_with_its_names_and_images(tmp_path):
    """As the Hub has it: its own processor, whose mean differs from the model's, and its own order of classes."""
    network = make_model("vit", 5)
    network.config.id2label = dict(enumerate(SHUFFLED))
    network.save_pretrained(tmp_path / "other")
    save_model("vit", tmp_path / "processor")
    (tmp_path / "processor" / "preprocessor_config.json").rename(tmp_path / "other" / "preprocessor_config.json")
    model = build_named()
    teacher, x = taught(model, str(tmp_path / "other")), data().tensors[0][:6]
    with torch.no_grad():
        expected = network((x - 0.5) / 0.5).logits[:, [SHUFFLED.index(name) for name in NAMES]]
    assert torch.allclose(teacher.logits(x), expected, atol=1e-5)
    assert taught(model, tmp_path / "other").name == teacher.name and str(tmp_path / "other") in teacher.reason
    loaded = type(network).from_pretrained(tmp_path / "other")  # a module knows its folder, and so its images
    assert torch.allclose(taught(model, loaded).logits(x), expected, atol=1e-5)


def test_a_module_is_ordered_by_name_and_left_as_it_was():
    network = make_model("vit", 5)
    network.config.id2label = dict(enumerate(SHUFFLED))
    network.train()
    network.vit.eval()
    next(network.parameters()).requires_grad_(False)
    modes = [part.training for part in network.modules()]
    gradients = [p.requires_grad for p in network.parameters()]
    weights = copy.deepcopy(network.state_dict())
    model, seen = build_named(), []
    hook = network.register_forward_hook(lambda module, args, out: seen.append((module.training, out.logits)))
    result = train(model, data(), TrainArgs(**FAST, teacher=network))
    hook.remove()
    assert "ViTForImageClassification" in result.teacher and not any(training for training, _ in seen)
    assert not any(logits.requires_grad for _, logits in seen)
    assert [part.training for part in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == gradients
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in weights.items())
    assert all(p.grad is None for p in network.parameters())
    assert not any("teacher" in key or "vit.vit" in key for key in model.adapter_state_dict())
    x = data().tensors[0][:6]
    with torch.no_grad():
        expected = network.eval()(x).logits[:, [SHUFFLED.index(name) for name in NAMES]]
    assert torch.equal(taught(model, network).logits(x), expected)


def test_a_module_on_another_device_comes_back():
    """Also after an error; one that is there already is not moved."""
    moves = []

    class Movable(Wide):
        def to(self, device):
            moves.append(device)
            return self

    network = Movable(CLASSES)
    classifier = OutsideClassifier(network, "movable", CLASSES, network)
    with pytest.raises(KeyError), ready_teacher(classifier, torch.device("meta")):
        assert not network.training and not network.head.weight.requires_grad
        raise KeyError
    assert moves == [torch.device("meta"), torch.device("cpu")]
    assert network.training and network.head.weight.requires_grad
    with ready_teacher(classifier, torch.device("cpu")):
        assert len(moves) == 2


def test_a_function_in_float16():
    """It gets the model's images; a module those of its own type."""
    model = build()
    model.half()
    network = Wide(CLASSES)
    x = data().tensors[0][:4].half()
    held = [{"pixel_values": x}]
    found = make_teacher(model, TrainArgs(teacher=network), lambda: held).logits(x)
    assert found.dtype == torch.float32 and torch.equal(found, network(x.float()))
    seen = []

    def function(images):
        seen.append(images.dtype)
        return network(images.float())

    make_teacher(model, TrainArgs(teacher=function), lambda: held)
    assert set(seen) == {torch.float16}


def oracle(images):
    """A plain function: logits from the images' channels."""
    return 5 * torch.stack([images[:, 0, 0, index] for index in range(CLASSES)], 1)


def test_loss_from_outside_by_hand():
    """In float64; an output with ``.logits`` as well."""
    model, (images, labels) = build(), data()[:8]
    for function in (oracle, lambda x: type("Output", (), {"logits": oracle(x)})()):
        args = TrainArgs(distillation=0.3, temperature=3.0, teacher=function)
        job = Learner(model, ROUTES, args, teacher=make_teacher(model, args, held_out()))
        with torch.no_grad():
            losses = job.losses({"pixel_values": images, "labels": labels}, job.routes, False, False, nullcontext)
            for route, loss in zip(job.routes, losses, strict=True):
                student = model(images, route=route).logits.double()
                p, q = (oracle(images).double() / 3).softmax(-1), (student / 3).softmax(-1)
                divergence = (p * (p / q).log()).sum(-1).mean()
                truth = -student.softmax(-1)[torch.arange(8), labels].log().mean()
                assert loss.item() == pytest.approx((0.7 * truth + 0.3 * 9 * divergence).item(), rel=1e-4)


def test_cached_is_uncached_and_two_teachers_share_a_folder(tmp_path):
    """Each teacher's logits have a file of their own; those that were cached are not computed again."""
    options = {**FAST, "cache_dir": str(tmp_path), "distillation": 1.0}
    flipped = lambda x: -oracle(x)  # noqa: E731
    seen = []

    def counted(x):
        seen.append(len(x))
        return oracle(x)

    for teacher, computed in ((counted, 24), (flipped, 0), ("mean", 0), (counted, 0), ("vit", 0)):
        plain, cached = build(), build()
        train(plain, data(), TrainArgs(**{**options, "cache_dir": None}, teacher=teacher))
        seen.clear()
        train(cached, data(), TrainArgs(**options, teacher=teacher))
        assert sum(seen) == computed + (32 + PROBE if teacher is counted else 0)
        for name, value in trained(plain).items():
            assert torch.allclose(value, trained(cached)[name], atol=2e-3), (teacher, name)
    files = {file.stem for file in tmp_path.glob("*/teacher-*.bin")}
    assert len(files) == 4 and {"teacher-mean", "teacher-vit"} < files


@pytest.mark.parametrize("sampler", ["sandwich", "uniform"])
def test_samplers_with_a_teacher_from_outside(sampler):
    result = train(build(), data(), TrainArgs(**FAST, teacher=oracle, sampler=sampler))
    assert result.losses and "'oracle'" in result.teacher


# errors


def nan_at(step):
    """A function that returns NaN for one image from its so many-th call on."""
    calls = []

    def broken(x):
        calls.append(1)
        logits = oracle(x).clone()
        if len(calls) > step:
            logits[0, 0] = float("nan")
        return logits

    return broken


ERRORS = {
    "unknown": ("resnet5", OSError, r"'resnet5' is not 'auto', 'mean' or the name of an anchor \(resnet, vit\), and"),
    "folder": (Path("no/such"), OSError, "there is no classifier of that folder or Hub id"),
    "columns": (lambda x: oracle(x)[:, :3], ValueError, r"shape \(8, 3\) for 8 images, and \(8, 5\) are needed"),
    "rows": (lambda x: oracle(x)[:1], ValueError, r"shape \(1, 5\) for 8 images"),
    "text": (lambda x: "cat", ValueError, "is no classifier: for images it returns str"),
    "classes": (lambda x: oracle(x).argmax(-1), ValueError, "is no classifier: for images it returns Tensor"),
    "fails": (lambda x: x[:, 7], ValueError, r"cannot classify images \(8, 3, 64, 64\): index 7 is out of bounds"),
    "inputs": (lambda: None, ValueError, "cannot classify images .* takes 0 positional arguments but 1 was given"),
    "nan": (nan_at(0), ValueError, r"returns logits that are not finite \(NaN or inf\) for 1 of 8 images"),
    "inf": (lambda x: oracle(x) / 0, ValueError, "not finite .NaN or inf. for 8 of 8 images"),
    "later": (nan_at(7), ValueError, "teacher 'broken' returns logits that are not finite"),
    "wide": (Wide(7), ValueError, "'Wide' returns logits of shape .*narrowed to the model's classes"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_teach(name):
    teacher, error, message = ERRORS[name]
    model = build()
    start = trained(model)
    with pytest.raises(error, match=message):
        train(model, data(), TrainArgs(**FAST, teacher=teacher))
    assert all(torch.equal(value, start[key]) for key, value in trained(model).items()) and not model.training


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("cat", "dog", "fish", "bus", "car"),
            r"'wide' lacks 2 of the model's 5 classes \(owl, rose\); its 5 classes",
        ),
        (
            ("a", "b", "c", "d", "e"),
            r"'wide' has none of the model's 5 classes \(cat, dog, fish, ...\); its 5 classes",
        ),
        (("owl", *NAMES), r"lacks 1 of the model's 5 classes \(owl\)"),
    ],
)
def test_classes_that_a_teacher_lacks(names, message):
    """Before anything is fitted or trained."""
    with pytest.raises(ValueError, match=message):
        train(build_named(), [], TrainArgs(teacher=wide(names)))


def test_classes_without_names():
    with pytest.raises(ValueError, match="the model's classes have no names. Name them with id2label="):
        load_teacher(build(), TrainArgs(teacher=wide(NAMES)))
    nameless = load_anchor(Wide(CLASSES), name="wide", preprocessing=Preprocessing((SIZE, SIZE)))
    with pytest.raises(ValueError, match="those of teacher 'wide' have no names"):
        load_teacher(build_named(), TrainArgs(teacher=nameless))
    assert taught(build(), nameless).logits(data().tensors[0]).shape == (24, CLASSES)


def test_a_teacher_that_trains_itself_is_refused():
    model = build()
    with pytest.raises(ValueError, match="shares weights with the model, which train.*copy.deepcopy"):
        train(model, data(), TrainArgs(teacher=model))
    twin = copy.deepcopy(model)
    twin.set_route(ROUTES[0])
    twin.fit_stitches(data().tensors[0])
    assert train(model, data(), TrainArgs(**FAST, teacher=twin)).teacher


@pytest.mark.parametrize("teacher", [None, 3, {"name": "vit"}, Wide])
def test_options_that_are_no_classifier(teacher):
    with pytest.raises(ValueError, match="is no classifier: give 'auto', 'mean'"):
        TrainArgs(teacher=teacher)


@pytest.mark.parametrize("options", [{"distillation": 0}, {"num_train_epochs": 0, "matching_epochs": 1}])
def test_a_teacher_is_never_ignored(options):
    with pytest.raises(ValueError, match="teacher='vit' teaches nothing with distillation="):
        TrainArgs(teacher="vit", **options)
    assert TrainArgs(**options).teacher == "auto"
    assert make_teacher(build(), TrainArgs(**options), list) is None
    with pytest.raises(ValueError, match="train_heads trains new heads alone.*teacher"):
        train_heads(build(num_labels=3), data(classes=3), TrainArgs(teacher="vit"))


def test_an_anchor_called_mean():
    model = StitchedModelForImageClassification.from_anchors(
        load_anchor(make_model("resnet"), name="mean", preprocessing=Preprocessing((SIZE, SIZE))), make_anchor("vit")
    )
    with pytest.raises(ValueError, match="teacher='mean' is the name of an anchor and has a meaning of its own"):
        taught(model, "mean")
    assert taught(model, "auto").name in ("mean", "vit")


# resuming


def stopped(out, teacher, **options):
    """A run whose data fail in the last epoch, so that it left checkpoints."""
    rows = Noisy(data())
    args = {**FAST, "output_dir": str(out), "save_steps": 1, "teacher": teacher, **options}
    train(build(), rows, TrainArgs(**{**args, "output_dir": None, "save_steps": None}))
    with pytest.raises(KeyboardInterrupt):
        train(build(), Noisy(data(), 10**9 - rows.left - 4), TrainArgs(**args))
    return {**args, "resume_from_checkpoint": True}


def test_another_teacher_does_not_go_on(tmp_path):
    args = stopped(tmp_path, oracle)
    place = json.loads(sorted(tmp_path.glob("checkpoint-*/training.json"))[-1].read_text())
    assert place["teacher"]["reason"].startswith("'oracle' (") and len(place["teacher"]["logits"]) == 2
    for other in ("auto", "mean", "vit", lambda x: -oracle(x)):
        with pytest.raises(ValueError, match=r"belong to a training with the teacher 'oracle' \(.*Give the same"):
            train(build(), Noisy(data()), TrainArgs(**{**args, "teacher": other}))
    rounded = lambda x: oracle(x) * (1 + 1e-6)  # noqa: E731
    whole, again = build(), build()
    train(whole, Noisy(data()), TrainArgs(**FAST, teacher=oracle))
    result = train(again, Noisy(data()), TrainArgs(**{**args, "teacher": rounded}))
    assert result.steps == 6 and result.teacher, "the same but for rounding, on augmented images"
    assert all(torch.allclose(value, trained(again)[key], atol=1e-5) for key, value in trained(whole).items())


def test_auto_keeps_its_choice(tmp_path, monkeypatch):
    """Also where the held-out images would now choose the other one."""
    from restnet_hf.training import teachers

    args = stopped(tmp_path, "auto")
    place = json.loads(sorted(tmp_path.glob("checkpoint-*/training.json"))[-1].read_text())
    chosen = place["teacher"]["name"]
    other = {"resnet": "vit", "vit": "resnet"}[chosen]
    monkeypatch.setattr(teachers, "_best_anchor", lambda *_: (other, other))
    result = train(build(), Noisy(data()), TrainArgs(**args))
    assert result.teacher == place["teacher"]["reason"] and result.teacher.startswith(chosen)


def test_a_loader_and_nan_images():
    """Images that are not finite are the images' fault, and the loss says so."""
    rows = data()
    rows.tensors[0][16:] = float("nan")
    with pytest.raises(ValueError, match=r"the loss of route .* is nan at step 2"):
        train(build(), DataLoader(rows, batch_size=8), TrainArgs(**FAST))


def test_a_classifier_from_outside_has_one_name():
    """Whatever images are held out: what is cached for it serves all trainings."""
    names = []
    for seed in range(3):
        model = build()
        args = load_teacher(model, TrainArgs(teacher=lambda x: x.flatten(1)[:, :CLASSES] * 3.0, seed=seed))
        images = data(40).tensors[0]
        batches = [{"pixel_values": images[seed * 10 :]}]
        names.append(make_teacher(model, args, lambda batches=batches: batches).name)
    assert len({*names}) == 1
