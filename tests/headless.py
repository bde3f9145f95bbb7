"""A browser without a screen: Debian's Chromium, driven by selenium."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
LACKS = None if CHROMIUM and DRIVER else "needs Chromium and its driver: apt-get install chromium chromium-driver"

# Whether the page of pairs has still to draw what its address asks for.
_BUSY = """
return typeof pairs === "undefined" || !pairs || hashOf(state) !== hashOf({ ...readHash(), page: state.page })
  || read < 1 || document.getElementById("list").ariaBusy === "true";
"""


@contextmanager
def headless() -> Iterator:
    """A `selenium.webdriver.Chrome` of 1280 x 900 pixels that keeps what the console and the network say."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["headless=new", "disable-dev-shm-usage", "window-size=1280,900"]
    for flag in [*flags, *(["no-sandbox"] if os.geteuid() == 0 else [])]:  # which Chromium wants of root
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def settle(browser) -> None:
    """Wait until the page of pairs has drawn what its address asks for."""
    deadline = time.monotonic() + 60
    while browser.execute_script(_BUSY):
        assert time.monotonic() < deadline, browser.find_element("id", "count").text
        time.sleep(0.01)


def open_page(browser, file: Path, address: str = "") -> None:
    """Open a page of pairs anew, at an address behind "#"."""
    browser.get("about:blank")
    browser.get(f"{file.resolve().as_uri()}{address}")
    settle(browser)
