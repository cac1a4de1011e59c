"""JupyterLab's sanitizer, as far as a display's HTML reaches it: an untrusted notebook shows what this leaves.

Source: `Sanitizer` of JupyterLab 4's apputils, with the defaults of sanitize-html for what that leaves open. A browser
test holds this one against the real one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser


def _words(text: str) -> list[str]:
    """The words of a list that would take a line each."""
    return text.split()


TAGS = frozenset(
    _words("""
    a abbr acronym address area article aside audio b bdi bdo big blockquote br button canvas caption center cite
    code col colgroup colspan command data datalist dd del details dfn dir div dl dt em fieldset figcaption figure
    font footer form h1 h2 h3 h4 h5 h6 header hgroup hr i img input ins kbd label legend li map mark menu meter
    nav nobr ol optgroup option output p pre progress q rowspan s samp section select small source span strike
    strong sub summary sup table tbody td textarea tfoot th thead time tr track tt u ul var video wbr
    """)
)
_EVERYWHERE = frozenset(
    _words("""
    class data-jupyter-id dir draggable hidden id inert itemprop itemref itemscope lang spellcheck style title
    translate
    """)
)
_CELL = "abbr align axis bgcolor char charoff colspan headers height nowrap rowspan scope valign width"
_ROWS = "align char charoff valign"
_ATTRIBUTES = {
    "details": "open", "div": "align", "p": "align", "pre": "width", "caption": "align", "td": _CELL, "th": _CELL,
    "thead": _ROWS, "tbody": _ROWS, "tfoot": _ROWS, "tr": f"{_ROWS} bgcolor",
    "table": "align bgcolor border cellpadding cellspacing frame rules summary width",
}  # fmt: skip
_STYLES = frozenset(
    _words("""
    background background-color background-image border border-bottom border-collapse border-color border-left
    border-radius border-right border-spacing border-style border-top border-width bottom box-shadow color cursor
    display float font font-family font-size font-style font-variant font-weight height left letter-spacing
    line-height margin margin-bottom margin-left margin-right margin-top max-height max-width min-height min-width
    opacity outline overflow overflow-wrap overflow-x overflow-y padding padding-bottom padding-left padding-right
    padding-top position right text-align text-decoration text-indent text-overflow top vertical-align visibility
    white-space width word-break word-spacing
    """)
)
_WITHOUT_TEXT = frozenset({"script", "style", "textarea", "option"})  # sanitize-html drops what stands in them, too
_EMPTY = frozenset({"br", "col", "hr", "img", "input", "source", "track", "wbr"})


@dataclass
class Sanitized:
    """What is left. text: of what a reader sees or can unfold; styles: of its elements, in order; dropped: the rest."""

    text: str = ""
    styles: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def sanitized(html: str) -> Sanitized:
    """The HTML after the allow-list. Raises AssertionError where tags are not closed in the order they were opened."""
    parser = _Filter()
    parser.feed(html)
    parser.close()
    assert parser.opened == []
    return parser.left


class _Filter(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.left = Sanitized()
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _EMPTY:
            self.opened.append(tag)
        if tag not in TAGS:
            self.left.dropped.append(f"<{tag}>")
            return
        allowed = _EVERYWHERE | set(_ATTRIBUTES.get(tag, "").split())
        for name, value in attrs:
            if name not in allowed:
                self.left.dropped.append(name)
            elif name == "style":
                self._style(value or "")
        self.left.text += " "

    def _style(self, value: str) -> None:
        kept = []
        for declaration in filter(None, (part.strip() for part in value.split(";"))):
            name, _, said = declaration.partition(":")
            if name.strip() in _STYLES and not re.search(r"var\(|url\(|expression|!important", said):
                kept.append(f"{name.strip()}:{said.strip()}")
            else:
                self.left.dropped.append(declaration)
        if kept:
            self.left.styles.append(";".join(kept))

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag
        self.left.text += " "

    def handle_data(self, data: str) -> None:
        if not _WITHOUT_TEXT & set(self.opened):
            self.left.text += data
