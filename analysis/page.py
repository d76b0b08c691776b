"""One HTML file out of text, tables and charts: everything escaped, everything inside, nothing fetched.

The page carries Vega, Vega-Lite and Vega-Embed once, a content security policy that forbids every request and every script but
its own two, and the chart specs as JSON.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template
from typing import Any

import altair as alt

from analysis import figures, theme

Cell = str | int | float | bool | tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Column:
    """A table column: heading, what it means (shown on hover), and how a value is written (a key of :data:`WRITTEN`)."""

    heading: str
    written: str = "text"
    meaning: str = ""


@dataclass(slots=True)
class Page:
    """A page in the making: HTML of its sections, and the charts placed in them so far."""

    title: str
    sections: list[tuple[str, str, str]] = field(default_factory=list)  # anchor, heading, html
    specs: list[dict[str, Any]] = field(default_factory=list)

    def section(self, anchor: str, heading: str, *parts: str) -> None:
        """Append a section; ``parts`` are HTML made by the functions below, its text is escaped there."""
        self.sections.append((anchor, heading, "\n".join(parts)))

    def chart(self, chart: alt.TopLevelMixin, note: str = "") -> str:
        """Place a chart; its title and subtitle become the figure's caption, which wraps where a drawn title would be cut."""
        # Charts are valid by test; checking each again would take most of the time a page takes.
        spec = chart.to_dict(validate=False)
        spec.pop("config", None)
        spec["width"] = "container"
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
        title = spec.pop("title", {})
        title = {"text": title} if isinstance(title, str) else title
        spec["usermeta"] = {"legend_width": _legend_width(spec)}
        self.specs.append(spec)
        lines = title.get("subtitle", "")
        lines = [lines] if isinstance(lines, str) else lines
        caption = f"<strong>{text(title.get('text', ''))}</strong> {text(' '.join(lines))}"
        if note:
            caption += f" {text(note)}"
        number = len(self.specs) - 1
        return f'<figure><figcaption>{caption}</figcaption><div class="chart" data-chart="{number}"></div></figure>'

    def html(self) -> str:
        """The whole file."""
        bundle, code = _vega(), _package_file("page.js")
        links = "".join(f'<a href="#{anchor}">{text(heading)}</a>' for anchor, heading, _ in self.sections)
        body = "\n".join(f'<section id="{a}"><h2>{text(h)}</h2>\n{inner}\n</section>' for a, h, inner in self.sections)
        return Template(_package_file("page.html")).substitute(
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {_hash(bundle)} {_hash(code)}",
            title=text(self.title),
            style=_package_file("page.css"),
            links=links,
            body=body,
            specs=_json({"config": theme.config(), "charts": self.specs}),
            bundle=bundle,
            code=code,
        )


def text(value: Any) -> str:
    """Any value as HTML text, quotes included."""
    return html.escape(str(value), quote=True)


def paragraph(sentence: str, kind: str = "") -> str:
    """A paragraph; ``kind`` is a class of the style sheet ("empty", "note")."""
    return f'<p class="{kind}">{text(sentence)}</p>' if kind else f"<p>{text(sentence)}</p>"


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{text(sentence)}</li>" for sentence in sentences) + "</ul>"


def heading(words: str) -> str:
    """A heading inside a section."""
    return f"<h3>{text(words)}</h3>"


def pair(*blocks: str) -> str:
    """Figures beside each other where there is room, below each other where there is not."""
    return f'<div class="pair">{"".join(blocks)}</div>'


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], marked: Sequence[bool] = ()) -> str:
    """A table that a click on a heading sorts; ``marked`` rows (estimates) are set in italics."""
    head = "".join(
        f'<th scope="col"{_number_class(c)} title="{text(c.meaning)}"><button type="button">{text(c.heading)}</button></th>'
        for c in columns
    )
    body = []
    for i, row in enumerate(rows):
        cells = "".join(_cell(column, value) for column, value in zip(columns, row, strict=True))
        body.append(f"<tr{' class=estimate' if i < len(marked) and marked[i] else ''}>{cells}</tr>")
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """A two-column list of names and values; nested mappings are written out in one line."""
    rows = "".join(f"<dt>{text(key)}</dt><dd>{text(plain(value))}</dd>" for key, value in values.items())
    return f"<dl>{rows}</dl>"


def plain(value: Any) -> str:
    """A value of a JSON document in words people read: grouped digits, four significant ones, a dash for null."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return str(value)


WRITTEN = {**figures.WRITTEN, "text": plain}
"""How the values of a column are written."""


def _number_class(column: Column) -> str:
    return "" if column.written == "text" else ' class="number"'


def _cell(column: Column, value: Cell) -> str:
    if value is None:
        return f"<td{_number_class(column)}>–</td>"
    # The written form rounds; sorting goes by the value itself, of a band by its lower end.
    by = value[0] if isinstance(value, tuple) else value
    sort = f' data-sort="{text(repr(by))}"' if isinstance(by, int | float) else ""
    return f"<td{_number_class(column)}{sort}>{text(WRITTEN[column.written](value))}</td>"


def _legend_width(spec: Mapping[str, Any]) -> int:
    """Pixels of the widest legend entry, from which the page works out how many fit side by side."""
    widest = 8
    stack: list[Any] = [spec.get("encoding"), spec.get("layer")]
    while stack:
        found = stack.pop()
        if isinstance(found, list):
            stack += found
        elif isinstance(found, dict):
            domain = found.get("domain")
            widest = max([widest, *(len(str(d)) for d in domain)]) if isinstance(domain, list) else widest
            stack += [value for value in found.values() if isinstance(value, dict | list)]
    return 34 + 7 * min(widest, 40)


def _json(document: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    written = json.dumps(_finite(document), separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """The same document with null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed of the version altair writes for, as one script."""
    import vl_convert

    wanted = re.match(r"v(\d+)\.(\d+)", alt.SCHEMA_VERSION)
    known = [tuple(map(int, v.split("."))) for v in vl_convert.get_vegalite_versions()]
    major, minor = (int(part) for part in wanted.groups()) if wanted else max(known)
    same = [version for version in known if version[0] == major] or known
    best = (major, minor) if (major, minor) in known else max(same)
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=".".join(map(str, best)))
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)


def _package_file(name: str) -> str:
    return (files("analysis") / name).read_text(encoding="utf-8")
