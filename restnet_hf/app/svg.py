"""Figures of matplotlib as SVG for a page: marks that can be pressed, by keyboard too, in the page's own colours."""

from __future__ import annotations  # matplotlib takes long to import, and is imported only to draw

import io
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING
from xml.etree import ElementTree


if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
BLACK = ("#000000", "black")
DRAWING = Lock()  # matplotlib's settings are those of the whole process
PRESS = """
element.addEventListener('click', event => {
  const mark = event.target.closest('[data-mark]');
  if (mark) trigger('click', {mark: mark.dataset.mark});
});
element.addEventListener('keydown', event => {
  const mark = event.target.closest('[data-mark]');
  if (mark && (event.key === 'Enter' || event.key === ' ')) {
    event.preventDefault();
    trigger('click', {mark: mark.dataset.mark});
  }
});
"""  # for `gr.HTML(js_on_load=...)`


def as_svg(figure: Figure, description: str, marks: Mapping[str, str] | None = None) -> str:
    """A figure as SVG text, as wide as its place. All text in it is escaped.

    Args:
        figure: figure of matplotlib to convert.
        description: text for those who do not see it.
        marks: for the SVG id of each mark that can be pressed, its description, which is also shown on hover.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    with DRAWING, rc_context({"svg.fonttype": "none", "svg.hashsalt": "restnet_hf"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(file.getvalue())
    width = root.attrib.pop("width").removesuffix("pt")
    root.attrib.pop("height")
    # as large as it was drawn where there is room, else narrower
    style = f"width: 100%; max-width: {float(width) * 4 / 3:.0f}px; height: auto; color: inherit"
    root.attrib |= {"role": "group" if marks else "img", "aria-label": description, "style": style}
    for element in root.iter():
        _in_page_colours(element)
        text = (marks or {}).get(element.attrib.get("id", ""))
        if text is not None:
            _make_mark(element, text)
    return ElementTree.tostring(root, encoding="unicode")


def _in_page_colours(element: ElementTree.Element) -> None:
    """Draw what is black in the colour of the page's text, for dark pages."""
    if element.tag == f"{{{SVG}}}text":
        element.attrib.setdefault("fill", "currentColor")
    style = element.attrib.get("style", "")
    for colour in BLACK:
        style = style.replace(f"fill: {colour}", "fill: currentColor")
        style = style.replace(f"stroke: {colour}", "stroke: currentColor")
    style = style.replace("fill: #ffffff", "fill: none")  # of the legend
    if style:
        element.attrib["style"] = style


def _make_mark(element: ElementTree.Element, text: str) -> None:
    """Make an element one that can be focused and pressed, with a description."""
    mark = element.attrib["id"]
    element.attrib |= {"data-mark": mark, "tabindex": "0", "role": "button", "aria-label": text, "class": "mark"}
    title = ElementTree.Element(f"{{{SVG}}}title")
    title.text = text
    element.insert(0, title)
