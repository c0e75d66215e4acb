"""The page: nothing of it comes from elsewhere or becomes HTML, and it works in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from ahn.serve.api.operations import PAGE

HTML = PAGE.read_text(encoding="utf-8")
ROOT = Path(__file__).parents[2]


def test_nothing_comes_from_elsewhere() -> None:
    assert not re.findall(r"https?:|//\w+\.\w|@import|url\(", HTML)


def test_nothing_that_is_said_becomes_html() -> None:
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", HTML)
    assert not re.findall(r"\son\w+=|\sstyle=", HTML)  # the policy would not run them


def test_everything_one_can_change_has_a_label() -> None:
    for kind, attributes in re.findall(r"<(input|textarea|progress)\b([^>]*)>", HTML):
        found = re.search(r'id="([\w-]+)"', attributes)
        assert found is not None, kind
        inside = re.search(rf'<label[^>]*>[^<]+<{kind}[^>]*id="{found[1]}"', HTML)
        assert inside or f'for="{found[1]}"' in HTML, found[1]


def test_the_dashboard_asks_for_metrics_that_are_there(served: Any) -> None:
    served.chat("x")
    there = set(re.findall(r"^# TYPE (\w+)", served.client.get("/metrics").text, flags=re.M))
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    asked = {
        name.removesuffix("_bucket")
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bahn_\w+", target["expr"])
    }
    assert asked and asked <= there


@pytest.mark.slow
def test_a_conversation_in_a_browser(live: Any, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium")
    story = tmp_path / "story.txt"
    story.write_text("The cellist found a key in the case of her cello. " * 300)
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        page = browser.new_page(viewport={"width": 390, "height": 700})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: wrong.append(asked.url) if live.url not in asked.url else None)
        page.goto(live.url)
        assert page.inner_text("#model") == "tiny"
        page.set_input_files("#file", str(story))
        page.fill("#most", "8")
        page.fill("#text", "<img src=x onerror=alert(1)> What did she find?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#reading:visible", timeout=60_000)
        page.wait_for_selector("#status:has-text('8 tokens written')", timeout=120_000)
        assert page.locator("#log img").count() == 0 and page.locator("#log .turn").count() == 2
        tokens = int(page.inner_text("#tokens").replace(",", ""))
        assert tokens > 4000 and "MiB" in page.inner_text("#bytes-full")
        page.wait_for_timeout(400)  # until the bars have their width
        full, exact = (page.locator(f"#bar-{name}").bounding_box()["width"] for name in ("full", "exact"))
        assert full > 10 * exact > 0
        page.click("#fork")
        assert page.locator("#list li").count() == 2
        page.fill("#text", "And then?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:disabled", timeout=60_000)
        assert int(page.inner_text("#cached").split()[0].replace(",", "")) >= tokens - 2
        with page.expect_download() as saved:
            page.click("#save")
        assert saved.value.suggested_filename.endswith(".safetensors")
        saved.value.save_as(tmp_path / "saved.safetensors")
        page.set_input_files("#open", str(tmp_path / "saved.safetensors"))
        page.wait_for_selector("#status:has-text('Opened')", timeout=60_000)
        assert page.locator("#list li").count() == 3 and page.locator("#log .turn").count() == 4
        page.fill("#text", "And after that?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:disabled", timeout=60_000)
        assert int(page.inner_text("#cached").split()[0].replace(",", "")) > tokens
        page.fill("#most", "4000")
        page.fill("#text", "Go on.")
        page.keyboard.press("Enter")
        page.wait_for_selector("#status:has-text('Writing')", timeout=60_000)
        page.keyboard.press("Escape")
        page.wait_for_selector("#status:has-text('Stopped')", timeout=10_000)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert not wrong
        browser.close()
