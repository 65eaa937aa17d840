"""The page: sections in order, everything escaped, nothing fetched, the same bytes each time, two languages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from layerwise.errors import UsageError
from layerwise.importance import RENDERERS, ImportanceReport
from layerwise.report import render, write_report
from layerwise.scores import Status
from tests.report import factory

EVIL = "<script>alert('x')</script>\n\"0\""
ORDER = ["verdict", "heatmap", "agreement", "removal", "plan", "compare", "proofs", "leaderboard", "artifacts", "reproduce"]
LEADERS = pd.DataFrame({"model": ["vit", EVIL], "size": [42e6, 86e6], "accuracy": [0.917, None], "proven": [True, False]})


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in {"script", "style"} else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        self.text += "" if self._inside else data


def details() -> dict[str, Any]:
    return {
        "result": factory.result(),
        "leaderboard": LEADERS,
        "reproduce": ["layerwise analyze vit --seed 3", "echo '<b>' && true"],
        "artifacts": factory.ARTIFACTS,
    }


def full_report() -> ImportanceReport:
    base = factory.report(methods=2)
    base = factory.with_missing(base, "encoder.layer.1", Status.COUPLED, EVIL)
    return replace(base, removal=factory.removal(base))


@pytest.fixture(scope="module")
def text() -> str:
    return render(full_report(), **details())


def test_the_sections_come_in_order(text: str) -> None:
    sections = [attrs["id"] for tag, attrs in Page(text).elements if tag == "section"]
    assert sections == ORDER


def test_an_analysis_alone_has_no_empty_sections() -> None:
    sections = [attrs["id"] for tag, attrs in Page(render(factory.report(methods=1))).elements if tag == "section"]
    assert sections == ["verdict", "heatmap", "agreement", "reproduce"]


def test_a_plan_alone_has_its_section() -> None:
    page = Page(render(factory.report(methods=1), plan=factory.plan()))
    assert "drop_layers" in page.text
    assert "per_channel=True" in page.text
    assert "plan" in [attrs.get("id") for tag, attrs in page.elements if tag == "section"]


def test_nothing_is_fetched(text: str) -> None:
    elements = Page(text).elements
    links = [v for _, attrs in elements for k, v in attrs.items() if k in {"src", "href", "srcset", "data", "action", "poster"}]
    assert links
    assert [link for link in links if not (link or "").startswith("#")] == []
    assert not [tag for tag, _ in elements if tag in {"link", "iframe", "object", "embed", "base"}]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attrs["content"] for tag, attrs in elements if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")
    assert "http" not in (policy or "")


def test_plotly_is_inside_once(text: str) -> None:
    assert text.count("plotly.js v") == 1
    assert text.count('type="application/json"') == 1


def test_no_sign_in_the_figures_can_end_their_script(text: str) -> None:
    start = text.index('type="application/json" id="figures">')
    data = text[text.index(">", start) + 1 : text.index("</script>", start)]
    assert json.loads(data)["heatmap"]["data"][1]["hovertext"][0][0].startswith("<b>encoder.layer.0</b>")
    assert not set("<>&") & set(data)


def test_what_comes_from_the_user_is_escaped(text: str) -> None:
    page = Page(text)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 4  # ours: no-script switch, figures, plotly, page
    assert "<script>alert" not in text
    assert "<script>alert('x')</script>\\n" in page.text  # shown to the reader, newline and all
    assert "echo '<b>' && true" in page.text


def test_evil_names_everywhere() -> None:
    base = factory.report(methods=1, model=EVIL, task=EVIL, data=EVIL, notes=(EVIL,), device=EVIL, metrics={EVIL: 1.0})
    base = factory.renamed(base, "encoder.layer.0", EVIL)
    evil = replace(base, scores={n: replace(s, unit=EVIL) for n, s in base.scores.items()})
    proofs = tuple(replace(p, name=EVIL, detail=EVIL, layer=EVIL, passed=False) for p in factory.PROOFS)
    page = render(evil, result=factory.result(proofs=proofs), reproduce=[EVIL], artifacts=[{EVIL: EVIL}])
    assert "<script>alert" not in page
    assert len([tag for tag, _ in Page(page).elements if tag == "script"]) == 4


def test_the_numbers_are_on_the_page_with_their_units(text: str) -> None:
    shown = re.sub(r"\s+", " ", Page(text).text)
    for expected in ("21,665,664", "G MACs", "12 ± 0.3", "0.488×", "masked_equivalence", "3.1×10⁻⁶", "no export was asked for"):
        assert expected in shown
    for expected in ("coupled", "92.4 %", "f1a2b3", "flowers, 512 images", "42 MB", "true", "2.4×10⁻⁵"):
        assert expected in shown


def test_a_failed_proof_is_listed_first() -> None:
    proofs = (*factory.PROOFS, replace(factory.PROOFS[0], name="parity", passed=False, layer="encoder.layer.3"))
    shown = Page(render(factory.report(methods=1), result=factory.result(proofs=proofs))).text
    table = shown[shown.index("first diverging layer") :]
    assert table.index("parity") < table.index("masked_equivalence")
    assert "encoder.layer.3" in table


def test_a_long_leaderboard_says_how_much_it_shows() -> None:
    frame = pd.DataFrame({"model": [f"m{i}" for i in range(50)]})
    shown = Page(render(factory.report(methods=1), leaderboard=frame)).text
    assert "The first 20 of 50 rows." in shown
    assert "m19" in shown
    assert "m20" not in shown


def test_each_chart_has_words_and_a_table(text: str) -> None:
    page = Page(text)
    labels = [attrs.get("aria-label") for _, attrs in page.elements if "data-figure" in attrs]
    assert len(labels) == 4
    assert all(labels)
    assert len([tag for tag, _ in page.elements if tag == "details"]) == 4


def test_the_same_input_gives_the_same_bytes(text: str) -> None:
    assert render(full_report(), **details()) == text


def test_chinese_page() -> None:
    text = render(full_report(), lang="zh", **details())
    page = Page(text)
    assert ("html", {"lang": "zh-Hans"}) in page.elements
    for expected in ("结论", "层与方法", "压缩前后", "验证", "复现", "与其他层耦合"):
        assert expected in page.text
    assert "Before and after" not in page.text


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(UsageError, match="does not speak 'eng'"):
        render(factory.report(methods=1), lang="eng")


def test_write_report_writes_the_page_and_its_figures(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "report"
    path = write_report(folder, full_report(), **details())
    assert path == folder / "report.html"
    assert path.read_text(encoding="utf-8") == render(full_report(), **details())
    assert {p.name for p in (folder / "figures").iterdir()} == {"heatmap.svg", "agreement.svg", "removal.svg", "pareto.svg"}
    write_report(folder, factory.report(methods=2))
    assert {p.name for p in (folder / "figures").iterdir()} == {"heatmap.svg", "agreement.svg"}


def test_a_folder_that_cannot_be_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        write_report(tmp_path / "file" / "report", factory.report(methods=1))


def test_the_report_renders_itself(tmp_path: Path) -> None:
    base = factory.report(methods=1)
    text = base.to_html(tmp_path / "page.html", lang="zh")
    assert text == render(base, lang="zh") == (tmp_path / "page.html").read_text(encoding="utf-8")
    assert list(RENDERERS) == ["html"]


def test_save_is_the_inverse_of_load(tmp_path: Path) -> None:
    base = full_report()
    assert base.save(tmp_path) == tmp_path / "report.json"
    assert ImportanceReport.load(tmp_path).to_json() == base.to_json()
    other = base.save(tmp_path / "other.json")
    assert ImportanceReport.load(other).to_json() == base.to_json()


def test_importing_the_report_stays_light() -> None:
    code = "import sys, layerwise.report; sys.exit(bool({'plotly', 'jinja2', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
