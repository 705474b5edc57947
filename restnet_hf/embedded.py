"""Where the embedded demo lies: two trained anchors, real images and a recipe."""

from pathlib import Path


DEMO = Path(__file__).parent / "demo"
FRONT, END, DATA, RECIPE = DEMO / "resnet_fashion", DEMO / "vit_fashion", DEMO / "data", DEMO / "demo.yaml"
