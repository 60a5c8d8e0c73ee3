"""What a model wrote, shown as it is and never run."""

import base64

import pytest

from mmrecoder_jax.reporting.escape import PNG_MAGIC, data_uri, escape


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a < b & 'c'\n\t\"d\"", "a &lt; b &amp; &#x27;c&#x27;\n\t&quot;d&quot;"),
        ("\u202e\u2066\u200b", "\\u202e\\u2066\\u200b"),  # they turn or hide what follows
        ("\x00\x1b\r\ud800\u2028", "\\u0000\\u001b\\u000d\\ud800\\u2028"),
        ("über 図 ✓", "über 図 ✓"),
    ],
)
def test_text_is_escaped_and_unseen_characters_become_numbers(text, shown):
    assert escape(text) == shown


def test_long_text_is_cut_with_a_note():
    assert escape("x" * 25, limit=20) == "x" * 20 + "\n… 5 more characters"


def test_a_picture_becomes_an_address():
    png = PNG_MAGIC + b"rest"
    assert data_uri(png) == "data:image/png;base64," + base64.b64encode(png).decode()
    assert data_uri(b"<svg/>").startswith("data:image/svg+xml;base64,")
