"""The explorers show what plain jprob gives, compile once, work by keyboard, and send nothing off the machine."""

import contextlib
import functools
import importlib
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.explore import _page
from experiments.explore.__main__ import index, pages

ROOT = Path(__file__).parent.parent
PAGES = list(pages())
# The pages of the three lessons that are asked for most run each time; the others are run by `make test-slow`.
FIRST = ("gaussian", "softmax", "cross_entropy")
SOME = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in PAGES]
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SHOTS = os.environ.get("EXPLORE_SHOTS")  # a folder for pictures of all pages


@pytest.fixture(autouse=True)
def _as_a_user():
    """A program of a person who sets nothing."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def load(name):
    return importlib.import_module(f"experiments.explore.{name}")


@functools.cache
def start(name):
    """A page as it opens: the HTML of its cells, its controls, and their values."""
    cells, defined = run(name)
    controls = defined["controls"].elements
    return cells, controls, {key: element.value for key, element in controls.items()}


def run(name, values=None):
    """The HTML of the cells of a page, and what they define; with these values of the controls, if any are given."""
    given = {} if values is None else {"controls": SimpleNamespace(value=values)}
    outputs, defined = load(name).app.run(defs=given)
    return [each.text for each in outputs if hasattr(each, "text")], defined


def shown(cells):
    """Name -> text of each number on a page."""
    return dict(re.findall(r'<output data-name="(\w+)"[^>]*>([^<]*)</output>', "".join(cells)))


def settings(control):
    """The low end, the high end and a middle value of a control."""
    if hasattr(control, "options"):
        options = list(control.options)
        return [options[0], options[-1], options[len(options) // 2]]
    if not hasattr(control, "stop"):
        return [False, True, False]
    return [control.start, control.stop, middle(control)[0]]


def middle(control):
    """A value near the middle, and how to come there by keys from the low end."""
    steps = round((control.stop - control.start) / control.step) // 2
    tens, ones = divmod(steps, 10)
    digits = len(str(control.step).partition(".")[2])
    return round(control.start + steps * control.step, digits), ["PageUp"] * tens + ["ArrowRight"] * ones


def by_plain_jprob(program, name):
    """The number of that name, in the names that the program of a page has left."""
    base, _, place = name.rpartition("_")
    if name in program:
        return program[name]
    return program[base][int(place)] if place.isdigit() and base in program else None


@pytest.mark.parametrize("name", SOME)
def test_a_page_shows_what_its_code_gives(name):
    cells, controls, values = start(name)
    assert len(controls) == len({element.text for element in controls.values()})
    for at in (None, 0, 1):
        if at is not None:
            values = {key: settings(element)[at] for key, element in controls.items()}
            cells = run(name, values)[0]
        program, out = {}, io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(load(name).code(values), name, "exec"), program)
        found = shown(cells)
        compared = {each: by_plain_jprob(program, each) for each in found}
        compared = {each: value for each, value in compared.items() if value is not None}
        assert compared
        assert {each: _page.text(np.asarray(value)[()]) for each, value in compared.items()} == {
            each: found[each] for each in compared
        }


@pytest.mark.parametrize("name", SOME)
def test_a_slider_compiles_nothing(name, caplog):
    (_, controls, values), compute = start(name), load(name).compute
    compute(values)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for key, element in controls.items():
            for value in settings(element):
                compute(values | {key: value})
    assert not [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]


@pytest.mark.parametrize("name", SOME)
def test_a_page_opens_with_three_sentences_and_one_formula(name):
    first = next(text for text in start(name)[0] if "<h1" in text)
    paragraph = re.search(r'<span class="paragraph">(.*?)</span>', first, re.DOTALL)[1]
    sentences = re.split(r"(?<=\.)\s+", re.sub(r"<.*?>", "", paragraph).strip())
    assert len(sentences) == 3
    assert all(len(sentence.split()) <= 20 for sentence in sentences)
    assert first.count("<marimo-tex") == 1
    assert f'href="{name}/"' in index()


@contextlib.contextmanager
def serving(*options):
    """The address of a server, and its process."""
    command = [sys.executable, "-m", "experiments.explore", "--no-browser", *options]
    # Without what conftest sets: one device, and no strict promotion.
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and "NUMPY" not in name}
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, env=kept | {"PYTHONPATH": "."}) as server:
        try:
            yield re.search(r"http://\S+/", server.stdout.readline())[0], server
        finally:
            server.kill()


@pytest.mark.slow
def test_a_port_in_use_picks_the_next_and_ctrl_c_ends_cleanly():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving("--port", str(port)) as (address, server):
            assert address != f"http://127.0.0.1:{port}/"
            time.sleep(1)
            server.send_signal(signal.SIGINT)
            said = server.communicate(timeout=60)[1]
    assert server.returncode == 130
    assert f"port {port} is in use" in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no browser: {CHROMIUM} is missing")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address():
    with serving("--port", "27180") as (address, _):
        yield address


READ = "Object.fromEntries([...document.querySelectorAll('output')].map(e => [e.dataset.name, e.textContent]))"


# Milliseconds from the next key or choice to the first number that differs, as the page has it.
WATCH = """() => {
  const shown = () => [...document.querySelectorAll('output')].map(e => e.textContent).join()
  const before = shown(); let began; window.stepped = 0
  for (const kind of ['keydown', 'input'])
    document.addEventListener(kind, () => { began = performance.now() }, {once: true, capture: true})
  window.watcher?.disconnect()
  window.watcher = new MutationObserver(() => {
    if (!window.stepped && shown() != before) window.stepped = performance.now() - began
  })
  window.watcher.observe(document.body, {subtree: true, childList: true, characterData: true})
}"""


def until(page, want, read=READ):
    """Waits until the page shows these numbers, or this text."""
    end, found = time.perf_counter() + 60, None
    while time.perf_counter() < end:
        found = page.evaluate(read)
        if found == want:
            return
        time.sleep(0.002)
    assert found == want


@contextlib.contextmanager
def opened(browser, address, name, **options):
    """A page in a new window, which asks nobody but the server, and reports no error."""
    window = browser.new_context(**options)
    page, asked, errors = window.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{address}{name}/")
    page.locator("output").first.wait_for(timeout=60_000)
    yield page
    window.close()
    assert not [url for url in asked if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))]
    assert not errors


def keys(control, value):
    """(value, keys) of each position: the ends and the middle of a slider, the words of a list, or a switch."""
    if hasattr(control, "options"):
        return [(option, []) for option in control.options]
    if not hasattr(control, "stop"):
        return [(not value, ["Space"]), (value, ["Space"])]
    half, presses = middle(control)
    return [(control.stop, ["End"]), (control.start, ["Home"]), (half, ["Home", *presses])]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(browser, address, name):
    cells, controls, values = start(name)
    values, began, steps = dict(values), time.perf_counter(), []
    with opened(browser, address, name, viewport={"width": 1280, "height": 900}) as page:
        painted = time.perf_counter() - began
        seen = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3
        until(page, shown(cells))
        for key, element in controls.items():
            role = "combobox" if hasattr(element, "options") else "slider" if hasattr(element, "stop") else "switch"
            widget = page.get_by_role(role, name=key, exact=True)
            assert widget.count() == 1, key
            for value, presses in keys(element, values[key]):
                values[key] = value
                want = shown(run(name, values)[0])
                widget.focus()
                for press in presses[:-1]:
                    page.keyboard.press(press)
                    page.wait_for_timeout(40)  # a person's keys come one at a time
                page.wait_for_timeout(400)  # one step is timed, and not what was left of those before
                page.evaluate(WATCH)
                if role == "combobox":
                    widget.select_option(value)
                else:
                    page.keyboard.press(presses[-1])
                until(page, want)
                steps += [took for took in [page.evaluate("window.stepped")] if took]
                assert role != "slider" or float(widget.get_attribute("aria-valuenow")) == pytest.approx(value)
        code = "document.querySelector('div.codehilite').innerText.split(/\\s+/).filter(Boolean).join(' ')"
        until(page, " ".join(load(name).code(values).split()), code)
    slider = f"slider step median {np.median(steps):.0f} ms, longest {max(steps):.0f} ms"
    print(f"{name}: something after {seen:.1f} s, numbers after {painted:.1f} s, {slider}")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_wide_screen_and_a_phone(browser, address, name, scheme):
    with opened(browser, address, name, viewport={"width": 1280, "height": 900}, color_scheme=scheme) as page:
        page.locator("figure canvas").first.wait_for()
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(500)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            classes = page.evaluate("document.documentElement.className + document.body.className")
            assert ("dark" in classes) == (scheme == "dark")
            if SHOTS:
                height = page.evaluate("Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))")
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(500)
                page.screenshot(path=Path(SHOTS) / f"{name}-{width}-{scheme}.png", full_page=True)
