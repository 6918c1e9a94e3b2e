"""The explorer in a real browser: what a person sees, and what it must not do."""

import base64
import io
import re
import shlex
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from support.configs import call, check, compose_config

from dcdit import explore, sample
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.evaluation.features import DigitsClassifier

pytest.importorskip("gradio", reason="the extra `explore` is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no browser")

from dcdit.explorer.page import Page
from dcdit.explorer.serving import serving
from dcdit.explorer.session import Session

PATIENCE = 60_000  # milliseconds; of a machine that does other things beside


@pytest.fixture(scope="module")
def address():
    config = check(explore, compose_config("sampler.steps=8", "seed=3", name="explore"))
    session = Session(config, [resolve_checkpoint("digits", config.paths.runs)], config.most_steps)
    blocks = Page(session, "dcdit: digits").blocks()
    with serving(blocks, "127.0.0.1", None, share=False) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def new_page(address, browser):
    """Opens the page as a browser of its own; whatever it logs as an error fails the test."""
    contexts, errors = [], []

    def open_page(width=1200, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.asked_for = []
        page.on("request", lambda request: page.asked_for.append(request.url))
        page.goto(address)
        page.wait_for_selector("#moment_B img")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def pixels(page, name):
    """The finished image of A or B as the browser has it."""
    source = page.locator(f"#image_{name} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def caption(page, name):
    return page.locator(f"#image_{name} figcaption").inner_text()


def gflops(page, name):
    return float(re.search(r"([\d.]+) GFLOPs", caption(page, name))[1])


def shows(page, name, words):
    """Wait until the words stand under an image: settings, cost."""
    page.wait_for_function(
        "([id, words]) => document.querySelector(id).innerText.includes(words)", arg=[f"#image_{name}", words]
    )


def move(page, name, steps):
    """Move the slider of ρ by the keyboard."""
    slider = page.locator(f"#drop_{name} input[type=range]")
    slider.focus()
    for _ in range(abs(steps)):
        slider.press("ArrowRight" if steps > 0 else "ArrowLeft")


def more(page, name):
    """Open the other controls of a side, and let them come to life."""
    page.get_by_text(f"{name}: more").click()
    page.locator(f"#steps_{name} input[type=number]").wait_for()
    page.wait_for_timeout(1000)


def choose(page, label, seed):
    """Another class and seed, by the keyboard."""

    page.locator("#seed input").fill(str(seed))
    box = page.locator("#label input")
    box.click()
    box.fill(str(label))
    box.press("Enter")
    page.wait_for_function(
        "words => document.querySelector('#image_B img').alt.includes(words)", arg=f"class {label}, seed {seed},"
    )


def test_nothing_is_fetched_from_outside(new_page, address):
    page = new_page()
    page.locator("#seven").click()
    page.wait_for_selector("#strip img")
    outside = [url for url in page.asked_for if not url.startswith((address, "data:", "blob:"))]
    assert outside == []
    assert len(page.asked_for) > 5


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1400, "light")])
def test_it_fits_a_telephone_and_a_screen(new_page, tmp_path, width, scheme):
    page = new_page(width, color_scheme=scheme)
    seen = page.evaluate(
        """() => ({
            wide: document.documentElement.scrollWidth > innerWidth,
            images: document.images.length,
            nameless: [...document.images].filter((each) => !each.alt).length,
            broken: [...document.images].filter((each) => each.complete && !each.naturalWidth).length,
            dark: getComputedStyle(document.body).backgroundColor,
        })"""
    )
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert not seen["wide"]
    assert seen["images"] >= 11
    assert seen["nameless"] == seen["broken"] == 0
    brightness = sum(map(int, re.findall(r"\d+", seen["dark"])[:3]))
    assert (brightness < 200) == (scheme == "dark")


def test_a_slider_changes_image_and_cost_of_its_side_alone(new_page):
    page = new_page()
    one, two, cost = pixels(page, "A"), pixels(page, "B"), gflops(page, "B")
    assert not np.array_equal(one, two)
    move(page, "B", 6)
    shows(page, "B", "ρ 0.8,")
    assert gflops(page, "B") < 0.95 * cost
    assert not np.array_equal(pixels(page, "B"), two)
    assert np.array_equal(pixels(page, "A"), one)
    move(page, "B", -16)
    shows(page, "B", "ρ 0,")  # both are the same then
    page.wait_for_function("() => document.querySelector('#difference').innerText.includes('0.00%')")
    assert np.array_equal(pixels(page, "B"), one)
    assert gflops(page, "B") == gflops(page, "A")


def test_numbers_are_those_of_the_images(new_page):
    page = new_page()
    rows = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in page.locator("#numbers tbody tr").all()
    }
    share = int(re.search(r"(\d+)% of the full", rows["work"][1])[1]) / 100
    assert share == pytest.approx(gflops(page, "B") / gflops(page, "A"), abs=0.01)
    assert rows["work"][0].endswith("100% of the full budget's")
    assert ["ρ 0, " in words for words in rows["settings"]] == [True, False]
    lost = float(re.search(r"([\d.]+)%", rows["differs from the full budget"][1])[1])
    one, two = (pixels(page, name).astype(float) for name in "AB")
    assert lost == pytest.approx(100 * np.abs(one - two).mean() / 255, abs=0.01)
    for time in rows["time here"]:
        assert re.match(r"\d+ ms \(median of \d+\), \d+% of the full budget's", time)


def test_the_difference_is_bright_enough_to_be_seen(new_page):
    page = new_page()
    one, two = (pixels(page, name).astype(int) for name in "AB")
    source = page.locator("#difference img").get_attribute("src")
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))).astype(int)
    brighter = float(re.search(r"([\d.]+) times brighter", page.locator("#difference").inner_text())[1])
    assert seen.max() == 255
    assert np.abs(seen - brighter * np.abs(one - two)).max() <= 2


@pytest.mark.parametrize("width", [390, 1400])
def test_no_column_of_the_table_is_cut(new_page, width):
    assert new_page(width).evaluate(
        "() => { const box = document.querySelector('.dcdit-wide'); return box.scrollWidth <= box.clientWidth + 1 }"
    )


def test_the_class_that_was_asked_for_appears(new_page):
    page = new_page()
    classifier, read = DigitsClassifier(), []
    for number in range(10):
        choose(page, (number * 3 + 1) % 10, 20 + number)
        seen = torch.from_numpy(pixels(page, "A")[::16, ::16, 0].copy())[None, None]
        read.append(int(classifier(seen).logits.argmax()) == (number * 3 + 1) % 10)
    assert sum(read) >= 9


def test_time_slider_and_plots(new_page):
    page = new_page()
    words = page.locator("#moment_A p").inner_text()
    noisy = int(re.search(r"t = (\d+)", page.locator("#moment_A").inner_text())[1])
    assert abs(noisy - 400) <= 1000 / 8 / 2  # time 60, to half a step
    assert "of 8" in words
    slider = page.locator("#place input[type=range]")
    slider.focus()
    slider.press("End")
    page.wait_for_function("() => document.querySelector('#moment_A').innerText.includes('evaluation 8 of 8')")
    assert page.locator("#moment_A img").count() == page.locator("#moment_B img").count() == 4
    assert page.locator("#curves svg").count() == 2
    assert all("time: 0 is noise" in each for each in page.locator("#curves svg").all_text_contents())
    assert "None" not in page.locator("#curves").inner_html()


def test_mistakes_are_told_in_words_and_nothing_is_lost(new_page):
    page = new_page()
    before = pixels(page, "B")
    page.locator("#seed input").fill("")
    page.wait_for_selector("#status .problem")
    assert "seed: there is nothing, give a value" in page.locator("#status").inner_text()
    assert np.array_equal(pixels(page, "B"), before)
    page.locator("#seed input").fill("3")
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('Done')")
    more(page, "B")
    page.locator("#meet_B").get_by_label("TFLOPs per image").check()
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('Done')")
    before = pixels(page, "B")
    field = page.locator("#tflops_B input")
    for typed, words in (
        ("3", ("budget.tflops=3 cannot be met by drops and reuse together", "ask for something in between")),
        ("-1", ("tflops=-1 is not positive",)),
        ("", ("B: TFLOPs per image: there is nothing",)),
    ):
        field.fill(typed)
        page.wait_for_function("words => document.querySelector('#status').innerText.includes(words)", arg=words[0])
        assert all(each in page.locator("#status").inner_text() for each in words)
    page.locator("#meet_B").get_by_label("drop fraction ρ").check()  # what is empty is hidden now, and asked no more
    shows(page, "B", "ρ 0.5, ")
    steps = page.locator("#steps_B input[type=number]")
    steps.fill("100000")
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('steps=100000')")
    steps.press("Tab")  # the browser brings it back within its bounds
    shows(page, "B", "ρ 0.5, ")


def test_two_browsers_see_their_own(new_page):
    one, two = new_page(), new_page()
    for page, label, seed in ((one, 4, 11), (two, 7, 12), (one, 2, 13), (two, 5, 14)):
        choose(page, label, seed)
    for page, words in ((one, "class 2, seed 13,"), (two, "class 5, seed 14,")):
        assert all(words in page.locator(f"#image_{name} img").get_attribute("alt") for name in "AB")
    move(one, "B", 2)
    move(two, "B", 4)
    for page, words in ((one, "ρ 0.6,"), (two, "ρ 0.7,")):
        shows(page, "B", words)


def test_a_job_can_be_stopped(new_page):
    page = new_page()
    more(page, "A")
    steps = page.locator("#steps_A input[type=number]")
    for number in (250, 249, 248, 247):  # a control that has just come may not listen yet
        steps.fill(str(number))
        steps.press("Enter")
        with suppress(sync_api.TimeoutError):
            page.wait_for_function(
                "words => document.querySelector('#status').innerText.includes(words)", arg=f"/{number}", timeout=15_000
            )
            break
    page.locator("#stop").click()
    page.wait_for_selector("#status .problem")
    assert "Stopped" in page.locator("#status").inner_text()
    assert "8 steps" in page.locator("#numbers").inner_text()


def test_animations_and_strip_can_be_saved(new_page):
    page = new_page()
    page.locator("#animate").click()
    page.wait_for_selector("#animation_B img")
    for name in "AB":
        link = page.locator(f"#animation_{name} a")
        assert link.get_attribute("download") == f"class_0_seed_3_{name}.gif"
        moving = Image.open(io.BytesIO(base64.b64decode(link.get_attribute("href").partition(",")[2])))
        assert moving.n_frames == 9  # 8 evaluations, and the image
    page.locator("#seven").click()
    page.wait_for_selector("#strip img")
    assert page.locator("#strip img").count() == 7
    assert page.locator("#strip a").get_attribute("download") == "seven_budgets.png"


def test_the_commands_make_the_same_images(new_page, tmp_path, monkeypatch):
    page = new_page()
    move(page, "B", -2)
    shows(page, "B", "ρ 0.4,")
    monkeypatch.chdir(tmp_path)
    for name, line in zip("AB", page.locator("#commands textarea").input_value().splitlines(), strict=True):
        program, command, *words = shlex.split(line)
        assert (program, command) == ("dcdit", "sample")
        out = call(sample, compose_config(*words, "frames=0", name="sample"))
        assert out.resolve() == tmp_path / "explored" / name
        stored = torch.from_numpy(np.load(out / "latents.npz")["latents"])[0, 0]
        expected = ((stored + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).numpy()
        assert np.array_equal(pixels(page, name)[::16, ::16, 0], expected)
