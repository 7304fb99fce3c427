"""Turns a matplotlib figure into SVG that is a part of a page: it takes the page's colours and fonts, and has a text.

The colours of a drawn figure are names (`PALETTE`): the page says what they are in its light and its dark theme.
"""

import re
from io import BytesIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from orchestrator.record.figures import BLUE, GREY, VERMILION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED = "#000000", "#555555"
# The page's variables for the colours that figures are drawn in.
PALETTE = {
    INK: "--ink",
    MUTED: "--muted",
    GREY.lower(): "--grid",
    BLUE.lower(): "--blue",
    VERMILION.lower(): "--vermilion",
    "#009e73": "--green",
    "#cc79a7": "--purple",
    "#e69f00": "--orange",
    "#56b4e9": "--sky",
}
COLOUR = re.compile(r"#[0-9a-f]{6}", re.IGNORECASE)
FONT = re.compile(r"'[^;]*(?=;|$)")
REFERENCE = re.compile(r"url\(#([^)]+)\)")
# A number in a path has more digits than a screen can show.
LONG_NUMBER = re.compile(r"(\d+\.\d{2})\d+")


def svg_of(figure: "Figure", name: str, title: str, description: str) -> str:
    """Return a figure as an `<svg>` element with a title and a description for those who cannot see it.

    Args:
        figure: The figure; the same one gives the same text.
        name: Begins the ids in the element, so that no two figures of a page share one.
        title: What it shows.
        description: What one sees in it, in sentences.
    """
    root = ElementTree.fromstring(_drawn(figure))
    _drop(root, ("metadata", "style"))
    _rename_ids(root, name)
    for element in root.iter():
        _dress(element)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": view, "role": "img", "aria-labelledby": f"{name}-title {name}-description"}
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        words = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        words.text = text
        root.insert(place, words)
    return ElementTree.tostring(root, encoding="unicode")


def _drawn(figure: "Figure") -> bytes:
    """Return a figure as an SVG file."""
    from matplotlib import rc_context

    content = BytesIO()
    # These settings are no arguments of savefig.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "slimllm"}):
        figure.savefig(content, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    return content.getvalue()


def _drop(root: ElementTree.Element, tags: tuple[str, ...]) -> None:
    """Remove elements that a page does not need, wherever they are."""
    for parent in list(root.iter()):
        for child in [one for one in parent if _local(one.tag) in tags]:
            parent.remove(child)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Keep only the ids that something refers to, and begin each with the figure's name."""
    used: set[str] = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            used |= set(REFERENCE.findall(value)) | ({value[1:]} if _local(key) == "href" else set())
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                del element.attrib[key]
                if value in used:
                    element.attrib[key] = f"{name}-{value}"
            elif _local(key) == "href":
                del element.attrib[key]
                element.attrib["href"] = f"#{name}-{value[1:]}"
            else:
                element.attrib[key] = REFERENCE.sub(rf"url(#{name}-\1)", value)


def _dress(element: ElementTree.Element) -> None:
    """Give an element the page's colours and font, and no namespace, which HTML has none of."""
    element.tag = _local(element.tag)
    element.tail = None
    if element.text is not None and not element.text.strip():
        element.text = None
    if "style" in element.attrib:
        style = COLOUR.sub(_variable, element.attrib["style"])
        element.attrib["style"] = FONT.sub("inherit", style) if element.tag == "text" else style
    if "d" in element.attrib:
        element.attrib["d"] = LONG_NUMBER.sub(r"\1", " ".join(element.attrib["d"].split()))


def _variable(found: re.Match[str]) -> str:
    variable = PALETTE.get(found[0].lower())
    return f"var({variable})" if variable else found[0]


def _local(name: str) -> str:
    """Return a name without its namespace."""
    return name.rpartition("}")[2]
