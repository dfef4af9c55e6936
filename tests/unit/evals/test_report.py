"""Table, charts and page from one results.json; whatever a model wrote stays text."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from phikit.base.errors import RunError
from phikit.base.media import SPEECH, VISION
from phikit.data.media.problem import MediaProblem
from phikit.data.problem import Provenance
from phikit.evals.media_report import shown_items
from phikit.evals.plots import chart
from phikit.evals.report import render_report, write_report
from phikit.evals.table import count, duration, points, stage_table, stage_table_markdown

ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\ud800\u202e$x^2$"


def results(text="fine", curve=300):
    cells = {"accuracy": 0.25, "stderr": 0.05, "n": 80}
    shown = {"question": text, "thinking": text, "answer": text, "gold": text, "status": "wrong"}
    first = {"name": "random", "accuracy": 0.01, "stderr": 0.004, "n": 500, "mean_tokens": 128.0}
    second = {
        "name": "s " + text,
        "seconds": 754.0,
        "tokens": 5_230_000,
        "accuracy": 0.412,
        "stderr": 0.022,
        "n": 500,
        "pass_at_1_t06": 0.39,
        "mean_tokens": 80.4,
        "statuses": {"correct": 206, "wrong": 250, "unparsed": 40, "truncated": 4, "error": 0},
        "by_steps": {"2": cells, "10": cells},
        "by_family": {"f " + text: cells},
        "paired": {"delta": 0.402, "stderr": 0.02, "low": 0.36, "high": 0.44, "n": 500},
        "transcripts": [shown | {"extracted": text, "reason": text, "num_tokens": 5}],
        "metrics": [{"step": i, "loss": 2.0, "reward": 0.1, "length": i} for i in range(curve)],
    }
    third = {
        "name": "last",
        "accuracy": 0.418,
        "paired": {"delta": 0.006, "stderr": 0.01, "low": -0.0136, "high": 0.0256},
    }
    return {"stages": [first, second, third], "meta": {"title": "run " + text, "model": text}}


class Page(HTMLParser):
    """Collects tags, attributes and text as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_every_number_of_the_table():
    page = Page(render_report(results()))
    for cell in ("13 min", "5.23 M", "41.2 ± 2.2 %", "39.0 %", "80", "+40.2", "[+36.0, +44.0]"):
        assert cell in page.text
    assert "+0.6 [−1.4, +2.6] within noise" in page.text
    assert page.tags.count("svg") == 6  # three of accuracy; loss, reward, length of one stage
    assert page.tags.count("table") == 1


def test_what_a_model_wrote_is_text_and_nothing_else():
    harmless, hostile = Page(render_report(results())), Page(render_report(results(ATTACK)))
    assert hostile.tags == harmless.tags
    assert {k for k, _ in hostile.attributes} == {k for k, _ in harmless.attributes}
    assert "<script>alert(1)</script>" in hostile.text
    assert "\x00" not in hostile.text and "\u202e" not in hostile.text


@given(st.text(alphabet="<>&\"'/= scriptonx\x00\x07\u2028\ud83d", max_size=40))
def test_no_text_adds_a_tag(text):
    data = {"stages": [{"name": text, "transcripts": [
        {"question": text, "answer": text, "gold": text, "status": text}
    ]}]}  # fmt: skip
    plain = {"stages": [{"name": "a", "transcripts": [
        {"question": "a", "answer": "a", "gold": "a", "status": "a"}
    ]}]}  # fmt: skip
    assert Page(render_report(data)).tags == Page(render_report(plain)).tags


def test_the_page_loads_nothing(tmp_path):
    path = tmp_path / "report.html"
    write_report(results(), path)
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    urls = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "action") and v]
    assert all(url.startswith("#") for url in urls)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def with_gallery(items, text="fine"):
    """Results of a run that shows what it showed."""
    data = results(text)
    data["stages"][0]["senses"] = {"digit": {"measure": "exact match", "value": 0.5, "n": 2}}
    entry = {
        "family": text,
        "question": text,
        "gold": text,
        "items": items,
        "replies": {text: text},
    }
    return data | {"gallery": [entry]}


def test_what_could_not_be_read_is_counted_and_named():
    data = with_gallery([])
    data["stages"][0] |= {
        "items": {"read": 7, "faults": [{"item": "a.png", "reason": ATTACK}]},
        "unasked": ["b.wav: too short", ATTACK],
    }
    page = Page(render_report(data))
    assert "7 items were read, 1 could not be" in page.text and "a.png" in page.text
    assert "2 held-out problems could not be asked" in page.text and "b.wav" in page.text
    assert "script" not in page.tags


def test_pictures_and_sounds_are_part_of_the_page():
    media = {
        VISION: (np.zeros((8, 8, 3), np.uint8),),
        SPEECH: (np.linspace(-1, 1, 4000, dtype=np.float32),),
    }
    origin = Provenance("s", "digit", "CC0-1.0", "test", "g", "1", 0, 0)
    shown = shown_items(MediaProblem("?", "7", None, "7", None, "?", origin, media=media))
    page = Page(render_report(with_gallery(shown, ATTACK)))
    assert page.tags.count("img") == 2 and "script" not in page.tags
    addresses = [v for k, v in page.attributes if k in ("src", "href") and v]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes


@pytest.mark.parametrize(
    "item",
    [
        "<meta http-equiv=refresh content='0;url=https://example.org'>",
        '<img alt="" src="https://example.org/x.png">',
        '<svg ><path /></svg><img alt="" src="data:image/png;base64,AA=="><a href=x>',
    ],
)
def test_items_of_others_are_refused(item):
    with pytest.raises(RunError, match="gallery"):
        render_report(with_gallery([item]))


def test_the_page_is_the_same_every_time():
    assert render_report(results()) == render_report(results())


def test_long_curves_stay_small():
    assert len(render_report(results(curve=50_000))) < 1.3 * len(render_report(results(curve=500)))


def test_a_bare_results_file_is_enough():
    page = Page(render_report({"stages": [{"name": "only"}]}))
    assert "only" in page.text and "svg" not in page.tags
    assert Page(render_report({"stages": []})).tags.count("table") == 1
    odd = {"stages": [{"name": "nan", "metrics": [{"step": 1, "loss": float("nan")}, {"step": 2}]}]}
    assert "svg" not in Page(render_report(odd)).tags


@pytest.mark.parametrize(
    ("data", "where"),
    [({}, "stages"), ({"stages": [{}]}, "stages.0.name"), ({"stages": [{"name": 1}]}, "name")],
)
def test_other_data_are_refused_by_path(data, where):
    with pytest.raises(RunError, match=where):
        render_report(data)


def test_terminal_and_markdown_tables_agree():
    data = results("[red]|")
    console = Console(width=200, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(stage_table(data))
    shown, markdown = console.export_text(), stage_table_markdown(data)
    assert "s [red]|" in shown and "s [red]\\|" in markdown
    assert markdown.splitlines()[4] == (
        "| last | – | – | 41.8 % | – | – | +0.6 [−1.4, +2.6] within noise |"
    )


@pytest.mark.parametrize(
    ("formatted", "text"),
    [
        (duration(0.4), "0 s"),
        (duration(99.4), "99 s"),
        (duration(3570), "1 h 00 min"),
        (duration(4 * 3600 + 62), "4 h 01 min"),
        (count(999), "999"),
        (count(12_345), "12.3 k"),
        (count(999_999), "1 M"),
        (count(1.8e9), "1.8 B"),
        (points(-0.0004), "+0.0"),
        (points(-0.0206), "−2.1"),
    ],
)
def test_units(formatted, text):
    assert formatted == text


@pytest.mark.parametrize("name", ["chart.png", "chart.svg"])
def test_the_chart_is_a_file_and_reproducible(tmp_path, name):
    data = json.loads(json.dumps(results()))
    chart(data, tmp_path / name)
    once = (tmp_path / name).read_bytes()
    chart(data, tmp_path / name)
    assert once == (tmp_path / name).read_bytes() and len(once) > 5000
