"""The page in a real browser: drawn, quiet, and alone with its one file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerwise.report import write_report
from layerwise.scores import Status
from tests.report import factory

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = factory.report(methods=3)
    base = factory.with_missing(base, "encoder.layer.2", Status.FAILED, "the score came out as nan")
    report = replace(base, removal=factory.removal(base))
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, report, result=factory.result(), reproduce=["layerwise analyze vit"]).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390)])
def test_the_page_draws_everything_and_asks_for_nothing(browser: Any, address: str, scheme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-drawn]")
    assert page.locator(".chart .cartesianlayer .subplot").count() == 4
    assert page.locator(".chart .heatmaplayer image").count() == 2
    assert page.locator("[data-figure=agreement] .points path.point").count() == 3
    assert page.locator("[data-figure=agreement] .errorbar .xerror").count() == 3
    assert page.locator("[data-figure=removal] .points path.point").count() == 5
    assert page.locator("[data-figure=pareto] .points path.point").count() == 5
    assert page.locator("[data-figure=heatmap] .shapelayer path").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
    assert asked == [address]
    page.close()


def test_the_charts_follow_the_theme(browser: Any, address: str) -> None:
    from playwright.sync_api import expect

    page = browser.new_page(color_scheme="light")
    page.goto(address)
    page.wait_for_selector("html[data-drawn]")
    tick = page.locator("[data-figure=removal] .xtick text").first
    expect(tick).to_have_css("fill", "rgb(27, 31, 36)")
    page.emulate_media(color_scheme="dark")
    expect(tick).to_have_css("fill", "rgb(232, 234, 237)")
    page.close()


def test_paper_gets_the_drawings(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("html[data-drawn]")
    assert not page.locator(".drawing svg").first.is_visible()
    page.emulate_media(media="print")
    assert page.locator(".drawing svg").count() == 4
    assert all(drawing.is_visible() for drawing in page.locator(".drawing svg").all())
    assert not page.locator(".chart").first.is_visible()
    page.close()


def test_without_scripts_the_drawings_stand_in(browser: Any, address: str) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(address)
    assert page.locator(".drawing svg").first.is_visible()
    page.context.close()


def test_the_commands_can_be_copied(browser: Any, address: str) -> None:
    from playwright.sync_api import expect

    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(address)
    page.click(".commands button")
    expect(page.locator(".commands button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "layerwise analyze vit"
    context.close()
