"""load_demo: the embedded anchors with stitches and cascades that the demo trained, ready to run."""

from restnet_hf.demo.paths import ADAPTER, END, FRONT
from restnet_hf.modeling_restnet import StitchedModelForImageClassification


def load_demo() -> StitchedModelForImageClassification:
    """The model that ``restnet-hf demo`` makes, from files of the package: no network, a second.

    Its anchors are a ResNet and a ViT for the ten classes of Fashion-MNIST; its profile has the accuracy of each route
    and cascade on the 1,500 test images that come with the package.
    """
    anchors = {folder.name: str(folder) for folder in (FRONT, END)}
    return StitchedModelForImageClassification.from_pretrained(ADAPTER, anchors=anchors)
