"""The page is made from the folder alone. Equal results give equal pages, and nothing asks the network."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny_studies

from experiments import folders, mathml, report, studies
from experiments.__main__ import main
from experiments.findings import Table


@pytest.fixture(autouse=True)
def _tiny_studies(monkeypatch, tmp_path):
    tiny_studies.install(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose folder each test copies."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_studies.install(patch, tmp_path_factory.mktemp("finished"))
        assert main(["run", "configs/coin.toml", "--out", "run"]) == 0
        return Path("run").absolute()


@pytest.fixture
def folder(finished, capsys):
    capsys.readouterr()
    return shutil.copytree(finished, Path("run"))


def page(folder):
    return (folder / report.PAGE).read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Ids, references and text of a page; fails on an element that is not closed."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.open, self.words = Counter(), set(), [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids[value] += 1
            if name in ("href", "xlink:href", "aria-labelledby"):
                self.references.add((value or "").removeprefix("#"))
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += " " + data


def test_the_same_results_give_the_same_bytes_wherever_the_folder_lies(folder):
    made = [
        report.PAGE,
        report.TEXT,
        *(f"{report.FIGURES}/{path.name}" for path in (folder / report.FIGURES).iterdir()),
    ]
    before = {name: (folder / name).read_bytes() for name in made}
    shutil.copytree(folder, "elsewhere")
    for name in made:
        (Path("elsewhere") / name).unlink()
    assert main(["report", "elsewhere"]) == 0
    assert {name: (Path("elsewhere") / name).read_bytes() for name in made} == before


def test_each_figure_is_also_a_file(folder):
    files = sorted((folder / report.FIGURES).glob("*.svg"))
    drawings = re.findall(r"<svg.*?</svg>", page(folder), re.DOTALL)
    assert len(drawings) == 2 * len(files) > 0  # for a page and for a phone
    assert {file.read_text().strip() for file in files} <= {*drawings}
    assert all(re.fullmatch(r"coin-\d+\.svg", file.name) for file in files)
    assert all(file.with_suffix(".pdf").read_bytes().startswith(b"%PDF-") for file in files)


def test_the_text_says_what_the_page_says(folder, monkeypatch):
    """As Markdown: formulas are code, a bar in a cell is no border, and each image is there."""
    coin = studies.load("coin")
    section = coin.report

    def with_table(config, records):
        return section(config, records)._replace(tables=[Table("C", ["a|b", "n"], [["x < $y|z$", "1"], ["*u*", "2"]])])

    monkeypatch.setattr(coin, "report", with_table)
    assert main(["report", str(folder)]) == 0
    text = (folder / report.TEXT).read_text(encoding="utf-8")
    assert "### The share of heads is the bias [to .1].\n\n- **verdict: holds**\n- measured: 0.0" in text
    assert "- against it: After `n1` = 1000 flips" in text
    assert "| a\\|b | n |\n| --- | ---: |\n| x \\< `y\\|z` | 1 |\n| \\*u\\* | 2 |\n" in text
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert images == ["figures/coin-1.svg"]
    assert all((folder / image).is_file() for image in images)
    assert "\n\n\n" not in text


def test_the_page_asks_nothing_of_the_network(folder):
    text = page(folder)
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|@font-face|\bsrc=|url\((?!#)", text)
    assert all(reference.startswith("#") for reference in re.findall(r'\bhref="([^"]*)"', text))


def test_ids_are_unique_and_every_reference_has_its_target(folder, monkeypatch):
    coin = studies.load("coin")
    section = coin.report

    def twice(config, records):  # the same figure twice: matplotlib alone would give both the same ids
        first, second = section(config, records), section(config, records)
        return first._replace(plots=[*first.plots, *second.plots])

    monkeypatch.setattr(coin, "report", twice)
    assert main(["report", str(folder)]) == 0
    outline = Outline(page(folder))
    assert [name for name, count in outline.ids.items() if count > 1] == []
    assert outline.references <= outline.ids.keys()
    assert sum("clip" in name or "axes_1" in name for name in outline.ids) >= 2


def test_what_a_study_says_is_on_the_page_and_escaped(folder):
    text, words = page(folder), " ".join(Outline(page(folder)).words.split())
    assert "A coin has a &lt;bias&gt;." in text
    for said in ("The share of heads is the bias [to .1].", "further off than .1", "against flips & more flips."):
        assert said in words
    assert words.count("The share of heads is the bias") == words.count("flips the share is still") == 1
    for fact in ("versions.jax", "numerics.jax_enable_x64", "config.studies.coin.toss.height", "git.commit"):
        assert fact in words


def test_the_page_opens_with_what_was_found(folder):
    """Title, abstract, main figure and contents, in this order; then each claim, with what speaks against it."""
    text = page(folder)
    order = (
        *("<h1>Heads come as often", "flips the share of heads is", "Of 1 claim 1 holds.", "<svg", "Contents"),
        *('<section id="coin"', '<div class="card holds">', "The share of heads is the bias [to .1]."),
        *(">further off than", "is still"),
    )
    places = [text.index(said) for said in order]
    assert places == sorted(places)
    assert not re.search(r'class="[^"]*(falsified|undecided)', text[text.index("<body") :])


def test_formulas_are_typeset_on_the_page_and_legible_elsewhere(folder):
    assert "<math><mrow><msub><mi>n</mi><mn>1</mn></msub></mrow></math> = 1000 flips" in page(folder)
    assert mathml.plain("$2 p_truth^-(m + 1) <= sqrt(K)$") == "2 p_truth^-(m + 1) <= sqrt(K)"
    assert (
        mathml.formula("e^-m / 2")
        == "<math><mrow><msup><mi>e</mi><mrow><mo>−</mo><mi>m</mi></mrow></msup><mo>/</mo><mn>2</mn></mrow></math>"
    )
    for text in ("(T - 1) (", "a^", "sqrt", ")", "a_(b", ""):  # for any text, the page is whole
        Outline(f"<p>{mathml.formula(text)}</p>")


def test_numbers_are_aligned_at_their_right(folder):
    text = page(folder)
    assert '<th class="number">bias</th><th class="number">off</th>' in text
    assert '<td class="number">0.75</td>' in text


def test_hypotheses_can_be_queried(folder):
    with sqlite3.connect(folder / folders.DATABASE) as database:
        rows = database.execute("SELECT study, falsified_if, verdict FROM hypotheses").fetchall()
    database.close()
    assert rows == [("coin", "further off than .1", "holds")]


def test_an_unfinished_study_is_named_and_not_shown(folder):
    with sqlite3.connect(folder / folders.DATABASE) as database:
        database.execute("DELETE FROM studies")
    database.close()
    assert main(["report", str(folder)]) == 0
    assert "Not finished, and not shown: coin." in page(folder)
    assert "The share of heads" not in page(folder)


def test_a_verdict_is_one_of_three(folder, monkeypatch):
    coin = studies.load("coin")
    section = coin.report

    def vague(config, records):
        made = section(config, records)
        return made._replace(hypotheses=[made.hypotheses[0]._replace(verdict="maybe")])

    monkeypatch.setattr(coin, "report", vague)
    with pytest.raises(ValueError, match="expected a verdict of"), folders.existing(folder) as run:
        report.build(run)


def corrupt(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def torn(database: Path) -> None:
    """Keeps the pages that opening it reads, and none of the measurements."""
    content = database.read_bytes()
    database.write_bytes(content[: 12 * 4096] + b"x" * (len(content) - 12 * 4096))


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def edit_settings(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["config"]["studies"])
    corrupt(folder / "manifest.json", json.dumps(manifest))
    with sqlite3.connect(folder / folders.DATABASE) as database:
        database.execute("INSERT OR REPLACE INTO studies VALUES ('dice', '', 1.0, ?)", [hashlib.sha256().hexdigest()])
    database.close()


NO_RUN = "run: expected the folder of a run, got one without"
NO_MANIFEST = "run/manifest.json: expected the manifest of a run, got another file"
DAMAGED = "run/results.sqlite: expected the database of a run, got a damaged one: "
MALFORMED = "run/results.sqlite: expected the database of a run: database disk image is malformed"
NOT_OURS = "run/manifest.json: expected the manifest of a run"
NO_KEY = "Expecting property name enclosed in double quotes"
TOO_DEEP = "maximum recursion depth exceeded while decoding a JSON array from a unicode string"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, f"{NO_RUN} manifest.json"),
        (lambda run: (run / "manifest.json").unlink(), f"{NO_RUN} manifest.json"),
        (lambda run: (run / "results.sqlite").unlink(), f"{NO_RUN} results.sqlite"),
        (lambda run: corrupt(run / "manifest.json", "{"), f"{NO_MANIFEST}: {NO_KEY}: line 1 column 2 (char 1)"),
        (
            lambda run: corrupt(run / "manifest.json", json.dumps(tiny_studies.MANIFEST | {"source": "\ud800"})),
            f"{NO_MANIFEST}: 'utf-8' codec can't encode character '\\ud800' in position 171: surrogates not allowed",
        ),
        (lambda run: corrupt(run / "manifest.json", "[]"), f"{NOT_OURS}: Expected `object`, got `array`"),
        (lambda run: corrupt(run / "manifest.json", "[" * 9999), f"{NO_MANIFEST}: {TOO_DEEP}"),
        (
            lambda run: corrupt(run / "manifest.json", '{"identity": 5}'),
            f"{NOT_OURS}: Expected `str`, got `int` - at `$.identity`",
        ),
        (lambda run: replaced_by_folder(run / "manifest.json"), f"{NO_RUN} manifest.json"),
        (lambda run: replaced_by_folder(run / "results.sqlite"), f"{NO_RUN} results.sqlite"),
        (lambda run: replaced_by_folder(run / "report.html"), "run/report.html: cannot be written: Is a directory"),
        (lambda run: replaced_by_file(run / "figures"), "run/figures: cannot be written: File exists"),
        (lambda run: os.truncate(run / "results.sqlite", 2 * 4096), MALFORMED),
        (lambda run: torn(run / "results.sqlite"), DAMAGED),
        (
            lambda run: corrupt(run / "results.sqlite", "text" * 999),
            "run/results.sqlite: expected the database of a run: file is not a database",
        ),
        (
            lambda run: edit_settings(run, lambda studies: studies["coin"].pop("flips")),
            "run: written by other code: coin: Object missing required field `flips`",
        ),
        (
            lambda run: edit_settings(run, lambda studies: studies.update(dice=studies.pop("coin"))),
            "run: written by other code: there is no study dice here",
        ),
    ],
)
def test_a_folder_that_is_not_this_codes_run_is_one_line(folder, capsys, spoil, message):
    spoil(folder)
    assert main(["report", str(folder)]) == 2
    line = capsys.readouterr().err
    assert line == message + "\n" or (message == DAMAGED and re.fullmatch(f"{message}.+\n", line))


def test_a_wide_manifest_wraps_on_a_phone(folder):
    assert re.search(r"#manifest th, #manifest td \{ display: block; width: auto; \}", page(folder))
