"""How soon the explorer answers, in a real browser: ``python benchmarks/explore.py``.

Starts ``dcdit explore`` as a person does, with a browser that is open already, and measures the time from the command
to the page and to the first picture, of the page when it is loaded again, and of each move of a slider.
"""

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.table import Table

PORT, PATIENCE = 7999, 120
ADDRESS = f"http://127.0.0.1:{PORT}"


@contextmanager
def explorer(words: list[str]) -> Iterator[float]:
    """The command, running; when it was started."""
    command = [sys.executable, "-m", "dcdit.explore", f"port={PORT}", "browser=false", *words]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - our own words
    try:
        yield begin
    finally:
        process.terminate()
        process.wait()


def open_page(page: Any, begin: float) -> dict[str, float]:
    """Seconds from ``begin`` to the controls and to the first picture."""
    while True:  # a browser that tries would take the processor from what it waits for
        try:
            socket.create_connection(("127.0.0.1", PORT)).close()
            break
        except OSError:
            if time.perf_counter() - begin > PATIENCE:
                raise
            time.sleep(0.05)
    page.goto(ADDRESS)
    found = {}
    for what, selector in (("controls", "#drop_A"), ("picture", "#image_A img")):
        page.wait_for_selector(selector)
        found[what] = time.perf_counter() - begin
    page.wait_for_selector("#moment_B img")
    return found


def move(page: Any, key: str) -> float:
    """Seconds from a key on a slider to the picture that it changes."""
    slider = page.locator("#drop_B input[type=range]")
    slider.focus()
    before = page.locator("#image_B img").get_attribute("src")
    begin = time.perf_counter()
    slider.press(key)
    page.wait_for_function(
        "before => document.querySelector('#image_B img').getAttribute('src') !== before", arg=before, polling=10
    )
    seconds = time.perf_counter() - begin
    page.wait_for_timeout(500)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="for the command, such as checkpoint=runs/b_n4")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        times.setdefault(what, []).append(seconds)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for _ in range(options.rounds):
            page = browser.new_page()
            with explorer(options.words) as begin:
                for what, seconds in open_page(page, begin).items():
                    note(f"from the command to the first {what}", seconds)
                for what, seconds in open_page(page, time.perf_counter()).items():
                    note(f"the page again, to the {what}", seconds)
                for key in ("ArrowRight", "ArrowLeft") * 3:
                    note("a move of the slider", move(page, key))
            page.close()
        browser.close()
    table = Table(title="seconds", title_justify="left")
    for heading in ("", "median", "least", "greatest"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, found in times.items():
        table.add_row(what, *(f"{value:.2f}" for value in (statistics.median(found), min(found), max(found))))
    Console().print(table)


if __name__ == "__main__":
    main()
