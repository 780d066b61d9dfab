"""The report of 5,000 solutions in a real browser: opened from disk, filtered, read by axe-core.

Needs Chromium. The accessibility test also needs axe-core: AXE names its axe.min.js (`npm pack
axe-core` has it). Times are those of the page's main thread: a busy machine does not change them.
"""

import json
import os
import random
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from stepwiser_jax.report.collect import Contents
from stepwiser_jax.report.page import write_page
from stepwiser_jax.report.solutions import Judged, ShownSolution

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]
SOLUTIONS = 5000
AXE = os.environ.get("AXE")
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    "</script><script>window.hacked = 1</script>",
    "half of a pair \ud800",
    "$$\\frac{1}{ and \\boxed{ and \\[ never closed",
    "$\\href{javascript:window.hacked=1}{x}$ \\(\\def\\a{\\a\\a}\\a\\) $\\style{color:red}{x}$",
    "x" * 1_000_000,
    "\\boxed{" * 3000,
    "\\[ " * 4000,
)
WORDS = (
    "we add both sides of $x^2 + 3x = \\frac{1}{2}$ and so the sum of all angles is 180 thus".split(
        " "
    )
)


def solution(i, rng):
    def words(count):
        return " ".join(rng.choices(WORDS, k=count))

    count = rng.randint(3, 9)
    chunks, first_error = [words(60) for _ in range(count)], rng.randint(-1, count - 1)
    if i < len(HOSTILE):
        chunks[0] = HOSTILE[i]
    judged = {}
    for judge in (0, 1):
        verdicts = rng.choices(("Positive", "Negative", "Unparsed"), k=count)
        written = [[(v, rng.random(), words(40) + " \\boxed{Positive}")] for v in verdicts]
        judged[judge] = Judged(written, predicted=rng.randint(-1, 1))
    if i < len(HOSTILE):
        judged[0].chunks[0] = [("Positive", 0.5, HOSTILE[i])]
    return ShownSolution(
        f"set/{i:06d}#0",
        "heldout",
        rng.choice(("gsm8k", "math")),
        HOSTILE[i] if i < len(HOSTILE) else words(30),
        chunks,
        answer="3",
        is_correct=rng.random() < 0.5,
        truth=[first_error == -1 or j < first_error for j in range(count)],
        first_error=first_error,
        values=[[rng.randint(0, 16), 16] for _ in range(count + 1)],
        labels=[rng.random() < 0.7 for _ in range(count)],
        judged=judged,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    rng = random.Random(0)
    solutions = [solution(i, rng) for i in range(SOLUTIONS)]
    part = {
        "items": SOLUTIONS, "f1_a": 0.5, "f1_b": 0.6, "difference": 0.1,
        "difference_interval": [0.05, 0.15], "difference_p": 0.0002, "right_by_a_alone": 10,
        "right_by_b_alone": 20, "mcnemar_p": 0.01, "auc_a": 0.7, "auc_b": 0.8,
        "auc_difference_interval": [0.05, 0.15],
    }  # fmt: skip
    statistics = {"counted_a": "greedy", "counted_b": "greedy", "subsets": {"math": part}}
    cells = [
        2 * (s.judged[0].predicted != s.first_error) + (s.judged[1].predicted != s.first_error)
        for s in solutions
    ]
    comparison = {"a": 0, "b": 1, "cells": cells, "statistics": statistics | {"average": part}}
    found = Contents("synthetic", solutions=solutions, judges=["a", "b"], comparisons=[comparison])
    found.notices = list(HOSTILE)
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_page(found, file)
    return file


@pytest.fixture
def browser():
    browser = Browser()
    yield browser
    browser.close()
    assert not browser.errors


def set_filter(browser, selector, value):
    """Sets a filter; returns how many solutions are left, and the seconds of the main thread."""
    before = browser.cpu_seconds()
    left = browser.run(f"""(async () => {{
        const node = document.querySelector(".filters " + {json.dumps(selector)});
        const count = document.querySelector(".count");
        if (node.type === "checkbox") node.checked = {json.dumps(value)};
        else node.value = {json.dumps(value)};
        count.textContent = "";
        node.dispatchEvent(new Event("input", {{ bubbles: true }}));
        while (!count.textContent) await new Promise((resolve) => setTimeout(resolve, 5));
        await new Promise((resolve) => requestAnimationFrame(resolve));
        return Number(count.textContent.replace(/\\D/g, ""));
    }})()""")
    return left, browser.cpu_seconds() - before


def test_it_opens_and_filters_at_once(report, browser):
    before = browser.cpu_seconds()
    browser.open(report, "solutions?item=set/000100%230", ".detail article")
    assert browser.cpu_seconds() - before < 2
    assert browser.run("document.querySelector('.detail h2').textContent") == "set/000100#0"
    assert browser.run("document.querySelectorAll('.row').length") < 60, "only the rows in sight"

    for selector, value in (
        ("[name=subset]", "1"),
        ("[name=only][value=missed]", True),
        ("[name=min]", "6"),
        ("[name=order]", "wrong"),
    ):
        left, seconds = set_filter(browser, selector, value)
        assert 0 < left < SOLUTIONS and seconds < 0.2, selector
    for selector in ("[name=subset]", "[name=min]"):
        set_filter(browser, selector, "")
    set_filter(browser, "[name=only][value=missed]", False)
    set_filter(browser, "[name=q]", "angles")  # unpacks all texts, once
    left, seconds = set_filter(browser, "[name=q]", "onerror=")
    assert left == 1 and seconds < 0.2


def test_hostile_texts_are_texts(report, browser):
    browser.open(report, "solutions", ".detail article")
    browser.run("document.querySelector('.list').focus()")
    browser.press("Home")
    for i in range(len(HOSTILE)):
        browser.wait(f"document.querySelector('.detail h2').textContent === 'set/{i:06d}#0'")
        shown = browser.run("document.querySelector('.said').textContent")
        assert shown.startswith(HOSTILE[i][:20]) or "$" in HOSTILE[i]
        made = "document.querySelectorAll('.detail :is(img, script, [onerror], a:not(.permalink))')"
        assert browser.run(f"{made}.length") == 0
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "layout holds"
        browser.press("ArrowDown")
    assert browser.run("window.hacked === undefined")
    assert browser.run("document.querySelectorAll('.detail math').length > 0")


def test_a_cell_of_mcnemar_shows_its_items(report, browser):
    browser.open(report, "compare", ".detail article")
    assert browser.run("document.querySelector('.headline').textContent").startswith("B − A: +10.0")
    first = browser.run("document.querySelector('.row').textContent")
    assert "only A right" in first or "only B right" in first, "disagreements first"
    browser.run("document.querySelector('.cell.c2').click()")
    cell = "document.querySelector('.cell.c2 strong').textContent"
    browser.wait(f"document.querySelector('.count').textContent === {cell} + ' solutions'")
    assert "only B right" in browser.run("document.querySelector('.row').textContent")


def test_arrow_keys_walk_through_the_list(report, browser):
    browser.open(report, "solutions", ".detail article")
    browser.run("document.querySelector('.list').focus()")
    browser.press("End")
    browser.wait(
        f"document.querySelector('.detail h2').textContent === 'set/{SOLUTIONS - 1:06d}#0'"
    )
    active = "document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))"
    assert browser.run(f"{active}.getAttribute('aria-posinset')") == str(SOLUTIONS)
    link = browser.run("location.hash")
    browser.open(report, link.removeprefix("#"), ".detail article")
    assert browser.run("document.querySelector('.detail h2').textContent").startswith("set/004999")


@pytest.mark.skipif(AXE is None, reason="needs axe-core: AXE is to name its axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1360])
def test_axe_finds_nothing_serious(report, browser, scheme, width):
    browser.emulate(width=width, height=844, scheme=scheme)
    for view in ("overview", "solutions", "compare"):
        browser.open(report, view, "#nav a")
        browser.wait("document.querySelector('#main > div') !== null")
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        browser.run(Path(str(AXE)).read_text() + "; undefined")
        found = browser.run("axe.run().then((r) => r.violations.map((v) => [v.impact, v.id]))")
        assert not [v for v in found if v[0] in ("serious", "critical")], (view, found)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), view
