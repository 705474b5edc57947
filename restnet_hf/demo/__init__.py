"""The embedded demo: two trained anchors, real images and a recipe."""

from restnet_hf.demo.paths import DATA, DEMO, END, FRONT, RECIPE


__all__ = ["DATA", "DEMO", "END", "FRONT", "RECIPE"]
