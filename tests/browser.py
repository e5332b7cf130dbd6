"""The Prefect UI in a headless Chromium, for the tests that look at what a person looks at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

PATIENCE_MS = 120_000


@contextmanager
def chromium_page() -> Iterator[Page]:
    """Open a page of the system's Chromium for the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, which tests are in a container.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        yield page
        browser.close()


def form_of(page: Page, url: str, asks: str) -> Locator:
    """Open the page of a suspended run, and the form in which it `asks`; return the form once it is there.

    Until the server has said what is asked, the same dialog has a button and no form.
    """
    page.goto(url)
    page.get_by_role("button", name="Resume").click()
    form = page.locator(".p-modal__card")
    form.get_by_text(asks).wait_for()
    return form


def choose(page: Page, form: Locator, option: str) -> None:
    """Choose from the form's only list, by the keyboard."""
    form.locator(".p-select-button__control").focus()
    page.keyboard.press("ArrowDown")
    page.locator(".p-select-option", has_text=option).click()
