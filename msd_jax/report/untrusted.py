"""Makes what a model or a data set wrote safe to show: on a terminal, in Markdown, and as data inside a page.

page.js does the same for what the page shows, see `visible` there.
"""

import json
import re
import unicodedata
from typing import Any

# Bengali, Persian and others need them; they affect no more than the two letters they stand between.
_JOINERS = "\u200c\u200d"
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (bidi overrides among them), lone surrogates, separators


class _Visible(dict):
    """A table for str.translate, filled as characters are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = unicodedata.category(character) in _INVISIBLE and character not in _JOINERS
        self[code] = _symbol(code) if hidden else character
        return self[code]


def _symbol(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    return "\u2421" if code == 0x7F else f"[U+{code:04X}]"


_VISIBLE = _Visible({ord("\n"): "\u21b5"})


def visible(text: Any, limit: int = 0) -> str:
    """One line without a control character: each is shown as a symbol, ESC as ␛, a bidi override as [U+202E].

    Args:
      text: anything; its str() is shown.
      limit: characters to keep, the rest is counted; 0 keeps all.
    """
    text = str(text)
    more = f" … ({len(text) - limit:,} more characters)" if 0 < limit < len(text) else ""
    return text[: limit or None].translate(_VISIBLE) + more


# All that Markdown or HTML would act on; "[5, 25]" by itself is an interval and does not begin a link.
_MARKDOWN = re.compile(r"\[(?!\d+(, \d+|%)\](?![\[(:]))|\](?=[\[(:])|[\\`*_<>|~$&#!@]|:(?=//)|(?<=www)\.")
_NAMED = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def markdown(text: Any, limit: int = 0) -> str:
    """`visible`, with all that Markdown or HTML would act on written as a character reference."""
    text = visible(text, limit).replace(" -> ", " → ")
    return _MARKDOWN.sub(lambda match: _NAMED.get(match[0], f"&#{ord(match[0])};"), text)


_OUTSIDE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def json_for_html(value: Any) -> str:
    """JSON to put into a <script type="application/json">: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _OUTSIDE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
