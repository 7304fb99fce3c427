"""A page has what a run did, escapes what it reads, and needs nothing but itself."""

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orchestrator.reports.page import TEMPLATES, render_report
from orchestrator.reports.parts import Continuation
from orchestrator.reports.sources import read_directory
from orchestrator.reports.svg import PALETTE
from tests.orchestrator.reports.conftest import WritePlan, decision, layer

EVALUATION = {
    "format": 1,
    "models": [
        {"model": "models/dense", "perplexity": [], "tasks": [{"task": "piqa", "metric": "acc", "value": 0.71}]},
        {
            "model": "somewhere/pruned",
            "perplexity": [{"data": "held-out.txt", "length": 64, "value": 12.5, "kl": 0.125}],
            "tasks": [{"task": "piqa", "metric": "acc", "value": 0.625, "stderr": 0.01}],
        },
    ],
}
SPEED = {
    "format": 1,
    "rows": [
        {"model": "pruned", "batch_size": 8, "prompt_length": 128, "prefill_tokens_per_second": 4321.5},
        {"model": "dense", "batch_size": 8, "prompt_length": 128, "prefill_tokens_per_second": None},
    ],
}


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and elements that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.wrong, self._open = "", list[str](), list[str]()
        self.feed(page)
        self.close()
        self.wrong += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]


def page_of(directory: Path) -> Page:
    return Page(render_report(read_directory(directory)))


def test_it_says_what_the_run_did(write_plan: WritePlan) -> None:
    text = page_of(write_plan()).text
    for said in ("dense, pruned by 20.0%", "1,000 → 800", "10.00 → 12.50", "d1ce5t", "from_pretrained", "vllm serve"):
        assert said in text
    assert "2 of 3" in text
    assert "5 of 6 key/value heads are kept. Layer 0 keeps the smallest share: 2 of 3." in text
    assert "gram has 12.5 at 20.0%" in text


def test_what_lies_beside_the_plan_is_shown(write_plan: WritePlan) -> None:
    directory = write_plan()
    (directory / "evaluation.json").write_text(json.dumps(EVALUATION))
    (directory / "pruning" / "bench.json").write_text(json.dumps(SPEED))
    text = page_of(directory).text
    for said in ("0.6250", "The dense model has 0.71", "0.1250", "pruned, batch 8, prompt 128: 4,321.5"):
        assert said in text


def test_a_layer_that_is_removed_whole_keeps_nothing(write_plan: WritePlan) -> None:
    kept = layer(decision([0, 1], 2), decision([0, 1], 2))
    text = page_of(write_plan(layers=[kept, layer(None, None, dropped=True)])).text
    assert "These layers are removed whole: 1." in text
    assert "2 of 4 channels are kept" in text


def test_a_training_is_shown_after_the_pruning(write_plan: WritePlan) -> None:
    totals = {"steps": 200, "loss_before": 3.25, "loss_after": 2.75, "loss_dense": 2.5, "recovered": 2 / 3}
    sizes = {"evaluated": {"held-out.txt": {"tokens": 256, "block_length": 64}}}
    perplexity = {"perplexity": {"held-out.txt": [10.0, 12.5, 11.0]}}
    tuned = {"params": {"method": "distil", "rank": 8}, "totals": totals | sizes | perplexity}
    text = page_of(write_plan(tuned=[tuned])).text
    for said in ("gram, then distil", "2.7500", "66.7%", "gram, then distil has 11 at 20.0%", "rank"):
        assert said in text


def test_continuations_stand_side_by_side(write_plan: WritePlan) -> None:
    told = [Continuation("Once", (("dense", " upon a time"), ("gram", " on a time")))]
    text = Page(render_report(read_directory(write_plan()), told)).text
    assert "Once upon a time" in text
    assert "Once on a time" in text


def test_what_comes_from_files_is_escaped(write_plan: WritePlan) -> None:
    bad = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    directory = write_plan(
        params={"model": bad, "method": bad, bad: bad},
        totals={"sparsity": 0.2, "parameters_before": bad, "perplexity": {bad: [bad, 2.0]}},
    )
    (directory / "evaluation.json").write_text(json.dumps({"models": [{"model": bad, "tasks": [{"task": bad}]}]}))
    (directory / "bench.json").write_text(json.dumps({"rows": [{"model": bad, "decode_tokens_per_second": 2.5}]}))
    page = Page(render_report(read_directory(directory), [Continuation(bad, ((bad, bad),))]))
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.wrong == []


def test_it_loads_nothing_and_runs_nothing(sweep: Path) -> None:
    page = page_of(sweep)
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in page.elements
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
    style = (TEMPLATES / "report.css").read_text()
    assert not re.search(r"url\(|@import", style)


def test_every_figure_has_a_text_and_a_table(sweep: Path) -> None:
    page = page_of(sweep)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    figures = [attributes for tag, attributes in page.elements if tag == "svg"]
    # The curve, and for each run a map at least, its errors and its seconds.
    assert len(figures) >= 1 + 2 * 3
    for attributes in figures:
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) < set(ids)
    assert [tag for tag, _ in page.elements].count("details") >= len(figures)
    linked = {str(attributes["href"])[1:] for _, attributes in page.elements if "href" in attributes}
    assert linked <= set(ids)
    assert page.wrong == []


def test_the_same_run_gives_the_same_page(write_plan: WritePlan) -> None:
    directory = write_plan()
    first, second = (render_report(read_directory(directory)) for _ in range(2))
    assert first == second


def themes() -> dict[str, Mapping[str, str]]:
    """The colours of each theme by variable."""
    style = (TEMPLATES / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    return dict(
        zip(("light", "dark", "print"), (dict(re.findall(r"(--\w+): (#\w+)", one)) for one in blocks), strict=True)
    )


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_and_curves_stand_out(theme: str) -> None:
    colours = themes()[theme]
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert set(PALETTE.values()) <= colours.keys()
    for name in colours.keys() - {"--grid", "--paper", "--panel"}:
        assert contrast(colours[name], colours["--paper"]) >= 4.5, name
    for name in ("--ink", "--muted"):
        assert contrast(colours[name], colours["--panel"]) >= 4.5, name
