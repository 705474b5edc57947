"""Processes share what training and adapt compute besides steps: features, statistics, teachers, scores and races."""

import numpy as np
import pytest
from several_processes import run_in_processes


# 25 images in batches of 12: of the last one, two of three processes have none
JOB = """
import json
import torch
from accelerate import PartialState
from conftest import CLASSES, make_anchor
from trainings import Noisy, data
from restnet_hf import StitchedModelForImageClassification, TrainArgs, train, train_heads
from restnet_hf.adaptation.adapt import adapt
from restnet_hf.adaptation.scorer import Scorer
from restnet_hf.distributed import gather

COMMON = {"batch_size": 12, "num_train_epochs": 1, "learning_rate": 1e-3}


def build(**options):
    anchors = make_anchor("vit"), make_anchor("resnet", seed=1)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given", **options)
    torch.manual_seed(3)
    model.add_stitches(["vit[:1] + resnet[1:]", "vit[:2] + resnet[3:]"])
    return model


def state(model):
    parts = torch.nn.ModuleDict({"stitches": model.stitches, "heads": model.heads, "tuned": model.tuned})
    return {key: value.double().flatten().tolist() for key, value in parts.state_dict().items()}


found, scores = {}, {}
model = build()
result = train(model, data(25), TrainArgs(**COMMON, tuning="norm", least_squares_images=25, max_steps=1))
found["norms"], scores["norms"] = state(model), [result.held_out_images, result.teacher]
scores["held out"] = {r: [s.metric, s.start, s.best] for r, s in result.scores.items()}
model = build()
train(model, Noisy(data(25)), TrainArgs(num_train_epochs=0, least_squares_images=25))
found["noisy"] = state(model)
model = build(num_labels=CLASSES)
train_heads(model, data(24), TrainArgs(**{**COMMON, "num_train_epochs": 3}))
found["heads"] = state(model)
scores["heads"] = model.profile(data(25)).metadata["images"]
model = build()
model.fit_stitches(data(48).tensors[0])
for labels in (data(48), data(48).tensors[0]):
    adapted = adapt(model, labels, {"macs": 1e12}, batch_size=5, state=None)
    rejected = [[str(row.route), row.why, row.detail] for row in adapted.rejected]
    scores[f"adapt {adapted.score}"] = [str(adapted.best.route), dict(adapted.best.scores), rejected]
read = []
scorer = Scorer(model, data(25), 5, exact=True)
scorer.fits = model.routes
prepared, scorer._prepared = scorer._prepared, lambda batch: read.append(len(batch["labels"])) or prepared(batch)
predict, spent = scorer.make_predictor("few_images", 8)
found["few images"] = {str(route): [predict(route)] for route in scorer.fits}
scores["few images"] = [scorer.images, spent, sum(gather(sum(read)))]
if PartialState().is_main_process:
    print(json.dumps([PartialState().num_processes, found, scores]))
"""


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path):
    """Scores exactly, and weights and statistics to the rounding of float32."""
    (one, expected, scores), *others = run_in_processes(JOB, tmp_path)
    assert one == 1 and any("running_mean" in key for key in expected["norms"])
    for number, (processes, found, other_scores) in enumerate(others, 2):
        assert processes == number
        for name, value in scores.items():
            assert other_scores[name] == value, name
        for name, tensors in expected.items():
            for key, values in tensors.items():
                if values:
                    scale = max(1e-2, *map(abs, values))
                    assert np.allclose(found[name][key], values, rtol=0, atol=1e-5 * scale), f"{name}: {key}"
