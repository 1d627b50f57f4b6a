"""A page holds what it is given and nothing that could act or be fetched."""

import re

from appliance import page
from appliance.findings import Finding
from appliance.page import Found, Sample, Section, Table

EVIL = "<script>alert(1)</script>"


def test_what_a_text_holds_is_shown_and_never_obeyed() -> None:
    finding = Finding(kind="x", level="problem", what=f"what {EVIL}", remedy="do", count=2, examples=[f"a.jsonl:1 {EVIL}"])
    table = Table(columns=["name", EVIL], rows=[[EVIL, 3]], caption=EVIL)
    chart = page.curves({EVIL: [(0, 1), (1, 2)], "b": [(0, 1)]}, x=EVIL, y="y", caption=EVIL, marks=[1])
    parts = [EVIL, table, chart, Found(finding), Sample(EVIL, caption=EVIL)]
    text = page.html(f"title {EVIL}", [Section(EVIL, parts)])
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 12
    assert '<td class="number">3</td>' in text
    assert '<div class="finding problem">' in text


def test_page_fetches_nothing_and_is_the_same_each_time() -> None:
    def made() -> str:
        charts = [page.histogram([1.0, 2.0, 2.0], x="tokens", y="rows", caption=name) for name in ("one", "two")]
        return page.html("title", [Section("lengths", charts)])

    text = made()
    assert text == made()
    assert re.findall(r"""(?:src|href)=["'](?!#)""", text.replace("xlink:href", "href")) == []
    names = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(names) == len(set(names)) == 2


def test_finding_says_itself() -> None:
    finding = Finding(kind="x", level="notice", what="3 rows are long", remedy="Cut them", count=3, examples=["a.jsonl:7"])
    assert str(finding) == "notice: 3 rows are long (a.jsonl:7). Cut them"
