"""Pages of one file: no network, no rights, readable on a phone and on paper. What goes on them is for others to say."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from alphasmith.dashboards.text import Facts

_EXPONENT = re.compile(r"[\d.]+e-\d+")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure as a page needs it.

    Attributes:
        key: Its id on the page.
        heading: What it answers.
        caption: How to read it.
        height: Its height [pixels].
        json: The Plotly figure, safe inside a script element.
    """

    key: str
    heading: str
    caption: str
    height: int
    json: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence of explanation and a list of facts.

    Attributes:
        key: Its id on the page.
        heading: In a few words.
        intro: One or two sentences.
        facts: Labels with values.
    """

    key: str
    heading: str
    intro: str
    facts: Facts


def render(template: str, **values: Any) -> str:
    """A page as one HTML document, UTF-8 when encoded.

    Everything the reader's browser needs is in the page (plotly.js included, about 5 MB); its policy forbids every request and every
    script but the page's own. All texts are escaped.

    Args:
        template: File beside this one that extends ``page.html``.
        values: What it shows; ``title`` among them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["unbroken"] = _unbroken
    return environment.get_template(template).render(
        policy=_policy,
        # A parser turns CRLF into LF before it hashes, so the digest must be taken of LF as well.
        library=get_plotlyjs().replace("\r\n", "\n"),
        **values,
    )


def shown(key: str, caption: str, figure: go.Figure) -> Figure:
    """A Plotly figure for a page, without the title, which the page has as a heading.

    Args:
        key: Its id on the page.
        caption: How to read it.
        figure: In the house style, with a title.
    """
    heading = str(figure.layout.title.text)
    bare = go.Figure(figure)
    # The page has its own headings; Plotly's would be cut on narrow screens.
    margin = bare.layout.margin.t if bare.layout.margin.t is not None else 72
    bare.update_layout(title=None, margin={"t": margin - 30}, height=(bare.layout.height or 400) - 30)
    bare.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", autosize=True)
    # No "<" may survive: inside a script element it could end the element.
    data = bare.to_json().replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return Figure(key=key, heading=heading, caption=caption, height=int(bare.layout.height), json=data)


def _breakable(text: str) -> Markup:
    """Escaped text that a browser may wrap behind dots: site names are long and have no spaces."""
    return Markup(".<wbr>").join(text.split("."))


def _unbroken(text: str) -> Markup:
    """Escaped text whose figures a browser does not wrap at the hyphen of an exponent."""
    return Markup(_EXPONENT.sub(r"<span>\g<0></span>", str(escape(text))))


def _policy(*scripts: str) -> str:
    """A Content-Security-Policy that runs exactly these scripts and loads nothing."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # Plotly draws text sizes and cursors through style elements; images are its own exported data.
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
