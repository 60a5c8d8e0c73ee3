"""Text and pictures of anyone, made safe to stand in a page.

Responses, code and error messages are written by a model, so they are hostile until shown
otherwise: nothing of them reaches a page but through `escape`.
"""

import base64
import html
import unicodedata

MAX_CHARS = 20_000  # of a response or an error that a page shows
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# Control, format, surrogate, private-use characters and line separators: they can hide text or
# change the direction in which it is read (U+202E shows `gpj.exe` as `exe.jpg`).
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def escape(text: str, limit: int = MAX_CHARS) -> str:
    r"""HTML that shows a text as it is.

    >>> escape("<b> \u202e")
    '&lt;b&gt; \\u202e'

    Args:
      limit: characters that are shown; a longer text ends with a note of how many are missing.
    """
    shown = "".join(_visible(c) for c in text[:limit])
    cut = f"\n… {len(text) - limit} more characters" if len(text) > limit else ""
    return html.escape(shown + cut)


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _UNSEEN:
        return character
    return f"\\u{ord(character):04x}"


def data_uri(image: bytes) -> str:
    """A PNG or SVG as an address that holds the whole picture."""
    kind = "image/png" if image.startswith(PNG_MAGIC) else "image/svg+xml"
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
