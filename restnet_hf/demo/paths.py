"""Where the parts of the demo lie."""

from pathlib import Path


DEMO = Path(__file__).parent
FRONT, END, DATA, RECIPE = DEMO / "resnet_fashion", DEMO / "vit_fashion", DEMO / "data", DEMO / "demo.yaml"
ADAPTER = DEMO / "adapter"
