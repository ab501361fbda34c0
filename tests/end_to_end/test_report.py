"""`nnunet_cfcl report` on two real trainings, read in a real browser without a network."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.conftest import PLANS, TRAINER

pytestmark = pytest.mark.end_to_end

DATASET, SCRATCH = "Dataset012_ChestXraysPool", "nnUNetTrainerCFCLScratch"
GENERATOR = {"epochs": 1, "iterations_per_epoch": 2, "images_per_step": 2, "width": 8, "blocks": 1,
             "finetune_epochs": 0}
GATE = {"predictor_steps": 5, "segmenter_steps": 2, "cases": 8, "enabled": False}
WIDE, NARROW = 1300, 400


@pytest.fixture(scope="module")
def pages(chest_xrays_with_pool, tmp_path_factory) -> dict[str, Path]:
    """A report of a training with a generator, and one that compares it with a training from scratch."""
    nnunet = chest_xrays_with_pool.copy(tmp_path_factory.mktemp("report"))
    nnunet.settings(counterfactual={"source": "auto", "count": 2, "interventions": ["scanner"]}, generator=GENERATOR,
                    gate=GATE)
    for trainer in (TRAINER, SCRATCH):
        nnunet.run("nnUNetv2_train", "12", "2d", "0", "-p", PLANS, "-device", "cpu", "-tr", trainer)
    folds = [str(nnunet.fold(DATASET, "2d", trainer)) for trainer in (TRAINER, SCRATCH)]
    found = {"one": Path(folds[0]) / "cfcl" / "report" / "report.html", "two": nnunet.root / "report.html"}
    for command, page in zip((folds[:1], folds), found.values()):
        assert f"Look at {page}" in nnunet.run("nnunet_cfcl", "report", *command, "-device", "cpu", "-np", "1")
        assert page.stat().st_size < 15e6
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e .[dev])")
    from selenium.webdriver.chrome.service import Service

    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        pytest.skip("there is no chromium with a chromedriver to look at the page with")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def _show(browser: Any, page: Path, width: int, scheme: str) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    browser.get(page.as_uri())


def _requests(browser: Any, page: Path) -> set[str]:
    """What the page asked for since the last call; the browser's own start page asks for much."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {one["request"]["url"] for one in sent if one["documentURL"] == page.as_uri()}


def _screenshot(browser: Any, file: Path) -> np.ndarray:
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": min(4000, size["height"]), "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    content = base64.b64decode(taken["data"])
    file.write_bytes(content)
    return np.asarray(Image.open(BytesIO(content)).convert("L"))


@pytest.mark.parametrize(("name", "width", "scheme"), [
    ("one", WIDE, "light"), ("one", NARROW, "dark"), ("two", WIDE, "dark"), ("two", NARROW, "light")])
def test_a_browser_shows_the_page_whole_quietly_and_alone(pages, browser, tmp_path, name, width, scheme):
    _requests(browser, pages[name]), browser.get_log("browser")
    _show(browser, pages[name], width, scheme)
    assert {url for url in _requests(browser, pages[name]) if not url.startswith("data:")} == {pages[name].as_uri()}
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # what is folded away is part of the page
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    images = browser.execute_script(
        "return [...document.images].map(one => [one.alt, one.complete, one.naturalWidth, one.width])")
    # two figures of curves, views, the gate's two, maps of both validation cases, metrics
    assert len(images) >= 8 and all(alt and complete and natural > 0 and shown > 0
                                   for alt, complete, natural, shown in images)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    picture = _screenshot(browser, tmp_path / f"{name}_{width}_{scheme}.png")
    corner = int(picture[2, 2])
    assert picture.std() > 10 and (corner > 200 if scheme == "light" else corner < 60)


def test_the_page_tells_what_the_trainings_did(pages, browser):
    def text(name: str, section: str) -> str:
        _show(browser, pages[name], WIDE, "light")
        return browser.execute_script(f"return document.getElementById('{section}').textContent")

    assert "2 of 2 epochs" in text("one", "fold1-overview") and "2 masks" in text("one", "fold1-overview")
    assert "switched off" in text("one", "fold1-gate") and "scanner" in text("one", "fold1-gate")
    assert "could be computed" not in text("one", "fold1-chromaps")
    assert "By scanner" in text("one", "fold1-metrics") and "left lung" in text("one", "fold1-metrics")
    differences = text("two", "comparison-differences")
    assert f"{TRAINER} minus each other trainer" in differences and SCRATCH in differences
    # also that without a pretraining says what it was asked for
    assert "All recorded settings are the same" in text("two", "comparison-compared-settings")


def test_the_pages_policy_lets_no_script_run_and_nothing_be_loaded(pages, browser, tmp_path):
    source = pages["one"].read_text(encoding="utf-8")
    marked = tmp_path / "marked.html"
    marked.write_text(source.replace("</main>", "<script>document.title = 'ran'</script>"
                                     "<img id=other src='http://127.0.0.1:9/x.png'></main>"), encoding="utf-8")
    browser.get_log("browser")
    _show(browser, marked, WIDE, "light")
    assert browser.title != "ran"
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert len([line for line in said if "Content Security Policy" in line]) == 2, said
