"""Export a cascade of the demo with its answers; and compare with them where torch is not installed."""

import json
import sys
from pathlib import Path


CASCADE = "vit_fashion[:] >0.8 resnet_fashion[:]"
PICTURES = 8


def export(folder: Path) -> None:
    """Write an exported folder, and beside it pictures with the answers of PyTorch."""
    from restnet_hf import StitchedModelForImageClassification, export_routes, load_images
    from restnet_hf.demo.paths import DATA, END, FRONT

    model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
    images = load_images(DATA, "test").select(range(256))
    model.profile(images)
    export_routes(model, folder, cascades=CASCADE, data=images)
    pictures = images[:PICTURES]["image"]
    for index, picture in enumerate(pictures):
        picture.save(folder.parent / f"{index}.png")
    answers = [each[0] for each in model.predict(pictures, cascade=CASCADE)]
    (folder.parent / "answers.json").write_text(json.dumps(answers))


def run(folder: Path) -> None:
    """Run the folder on these pictures, and follow a budget."""
    from restnet_hf import Budget, Controller, ExportedModel, train

    board = ExportedModel.from_pretrained(folder)
    board.set_cascade(CASCADE)
    expected = json.loads((folder.parent / "answers.json").read_text())
    for index, answer in enumerate(expected):
        (now, *_) = board.predict(str(folder.parent / f"{index}.png"))
        assert now["label"] == answer["label"] and abs(now["score"] - answer["score"]) < 1e-3, (index, now, answer)
    limit = min(row.costs["macs"] for row in board.profiled.routes)
    assert str(Controller(board.profiled, Budget(macs=limit)).observe(0.0).route) == str(board.set_budget(macs=limit))
    assert "torch" not in sys.modules
    try:
        train()
    except ImportError as error:
        assert "pip install restnet-hf" in str(error), error
    else:
        raise AssertionError("torch is installed here")
    sys.stdout.write(f"{len(expected)} answers as in PyTorch\n")


if __name__ == "__main__":
    {"export": export, "run": run}[sys.argv[1]](Path(sys.argv[2]))
