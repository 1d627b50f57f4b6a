"""A page of HTML that needs nothing else: no script, no network, its pictures inside. Main entry: `html`."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from appliance.findings import Finding

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; background: #fff }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #d0d0d0; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto } figcaption, caption { color: #555; text-align: left }
.finding { border-left: .3rem solid #b26a00; padding-left: .8rem; margin: 1rem 0 } .finding.problem { border-color: #b00020 }
.finding p { margin: .1rem 0 } .where { color: #555; overflow-wrap: anywhere } pre { white-space: pre-wrap; overflow-wrap: anywhere }
</style>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{% if part is string %}<p>{{ part }}</p>
{% elif part.kind == "table" %}<table>{% if part.caption %}<caption>{{ part.caption }}</caption>{% endif %}
<tr>{% for name in part.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for cell in row %}<td{% if cell is number %} class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% elif part.kind == "chart" %}<figure role="img" aria-label="{{ part.caption }}">{{ part.svg }}<figcaption>{{ part.caption }}</figcaption></figure>
{% elif part.kind == "sample" %}<p class="where">{{ part.caption }}</p><pre dir="auto">{{ part.text }}</pre>
{% else %}<div class="finding {{ part.finding.level }}"><p><strong>{{ part.finding.what }}.</strong></p>
<p>{{ part.finding.remedy }}</p>
{% if part.finding.examples %}<p class="where">{{ part.finding.examples | join(", ") }}</p>{% endif %}</div>
{% endif %}{% endfor %}{% endfor %}
</html>
"""  # noqa: E501 - a tag broken over lines would put white space into the page


@dataclass(frozen=True, slots=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture, whose caption also says to who cannot see it what it shows."""

    svg: Markup
    caption: str
    kind: str = "chart"


@dataclass(frozen=True, slots=True)
class Sample:
    """A text as it stands in a row or was answered."""

    text: str
    caption: str
    kind: str = "sample"


@dataclass(frozen=True, slots=True)
class Found:
    finding: Finding
    kind: str = "finding"


Part = str | Table | Chart | Sample | Found


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    parts: Sequence[Part]


def html(title: str, sections: Sequence[Section]) -> str:
    """The page; whatever a text holds, it is shown and never obeyed."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(title=title, sections=sections)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, caption: str, marks: Sequence[float] = ()
) -> Chart:
    """Lines by name through their points; `marks` are places on the x axis that the text speaks of."""

    def draw(axes: Any) -> None:
        for name, points in lines.items():
            axes.plot([point[0] for point in points], [point[1] for point in points], linewidth=1.2, label=name)
        for mark in marks:
            axes.axvline(mark, color="#b00020", linewidth=1, linestyle=":")
        if len(lines) > 1:
            axes.legend(frameon=False)

    return _chart(draw, x, y, caption)


def histogram(values: Sequence[float], *, x: str, y: str, caption: str, marks: Sequence[float] = ()) -> Chart:
    """How often values occur; `marks` as in `curves`."""

    def draw(axes: Any) -> None:
        axes.hist(values, bins=min(50, max(10, len(values) // 10)), color="#4878a8")
        for mark in marks:
            axes.axvline(mark, color="#b00020", linewidth=1, linestyle=":")

    return _chart(draw, x, y, caption)


def _chart(draw: Any, x: str, y: str, caption: str) -> Chart:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    stream = io.StringIO()
    # The salt: pictures of one page must not share names, and the same data must give the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return Chart(Markup(re.sub(r"^.*?(?=<svg)", "", stream.getvalue(), flags=re.DOTALL)), caption)
