"""Pages as a real browser shows them: console, requests, sideways scrolling, pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

WIDTHS = (1280, 390)


def chromium() -> str:
    """The system's Chromium; skips the test, with the reason, where there is none to drive."""
    pytest.importorskip("playwright", reason="playwright is not installed (pip install .[docs])")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium on the PATH")


def faults(pages: Iterable[Path], widths: Iterable[int] = WIDTHS) -> list[str]:
    """What is wrong with the pages at each width; an empty list if nothing is."""
    program = chromium()
    from playwright.sync_api import sync_playwright

    found: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for width in widths:
            context = browser.new_context(viewport={"width": width, "height": 900})
            for path in pages:
                page, told = context.new_page(), []
                page.on("console", lambda m, t=told: t.append(f"console {m.type}: {m.text}"))
                page.on("pageerror", lambda e, t=told: t.append(f"error {e}"))
                page.on("request", lambda r, t=told: t.append(r.url))
                page.goto(path.resolve().as_uri())
                page.wait_for_load_state("load")
                told = [t for t in told if not t.startswith(("file:", "data:", "console log"))]
                wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                if wide > 0:
                    told.append(f"{wide} px wider than the window")
                broken = page.evaluate(
                    """async () => {
                        const images = [...document.images];
                        for (const image of images) {
                            image.loading = "eager";
                            await image.decode().catch(() => {});
                        }
                        return images.filter((image) => !image.naturalWidth).length;
                    }"""
                )
                if broken:
                    told.append(f"{broken} pictures did not load")
                found += [f"{path.name} at {width}: {t}" for t in told]
                page.close()
        browser.close()
    return found
