"""A page of sentences, figures and tables as one HTML file that loads nothing from outside, and runs nothing."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

# A string and no file of its own, because a Flower bundle packs no file of this kind. The policy in the head makes
# sure of what the page promises: even if a prompt slipped through the escaping, nothing would be run or loaded.
_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid #bbb; }
summary h2 { display: inline; border: 0; }
p, figcaption { max-width: 50rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem; }
dd { margin: 0; font-weight: 600; }
.notice { border: 2px solid #111; padding: .5rem 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
figure { margin: .5rem 0; max-width: 100%; }
figure img { max-width: 100%; height: auto; }
figcaption, caption { color: #333; font-size: .9rem; text-align: left; padding: .3rem 0; }
.scroll { max-height: 36rem; overflow: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem 1.2rem .25rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media print { .scroll { max-height: none; overflow: visible; } }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
{% if page.notice %}
<p class="notice">{{ page.notice }}</p>
{% endif %}
<dl>
{% for name, value in page.facts %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% for section in page.sections %}
{% if section.folded %}
<details>
<summary><h2>{{ section.heading }}</h2></summary>
{% else %}
<section>
<h2>{{ section.heading }}</h2>
{% endif %}
{% for sentence in section.text %}
<p>{{ sentence }}</p>
{% endfor %}
{% if section.pictures %}
<div class="figures">
{% for picture in section.pictures %}
<figure>
<img src="{{ picture.source }}" alt="{{ picture.alternative }}">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
<div class="scroll">
<table{% if table.numbers %} class="numbers"{% endif %}>
<caption>{{ table.caption }}</caption>
<thead><tr>{% for name in table.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
{% if section.folded %}
</details>
{% else %}
</section>
{% endif %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """A figure inside the page."""

    source: str
    """``data:`` URL with all of its bytes."""
    alternative: str
    """What it shows, for those who cannot see it."""
    caption: str

    @staticmethod
    def of_svg(svg: str, alternative: str, caption: str) -> Picture:
        """Embed an SVG as an image: there its ids meet no other figure's, and nothing in it can run."""
        encoded = base64.b64encode(svg.encode()).decode("ascii")
        return Picture(f"data:image/svg+xml;base64,{encoded}", alternative, caption)

    @staticmethod
    def of_png(png: bytes, alternative: str, caption: str) -> Picture:
        """Embed a PNG."""
        encoded = base64.b64encode(png).decode("ascii")
        return Picture(f"data:image/png;base64,{encoded}", alternative, caption)


@dataclass(frozen=True)
class Table:
    """A table; long ones scroll."""

    caption: str
    head: Sequence[str]
    """Names of the columns, with units."""
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    """Whether all columns but the first hold numbers."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading: sentences, then figures, then tables."""

    heading: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    folded: bool = False
    """Whether it is shown on a click only."""


@dataclass(frozen=True)
class Page:
    """The whole page."""

    title: str
    notice: str
    """What a reader must know first; may be empty."""
    facts: Sequence[tuple[str, str]]
    """Names and values below the title."""
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Write the page as HTML; every text in it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE).render(page=page)
