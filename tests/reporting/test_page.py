"""The shell of the page: complete, closed against what a model wrote, and against the network."""

import base64
import hashlib
import json
import re

from mmrecoder_jax.reporting.page import as_json, data_script, page_html, start_data
from tests.reporting.tags import Tags

HOSTILE = (
    "</pre></script><script>alert(1)</script><img src=http://x onerror='alert(2)'> "
    "\u202e\u2066 \u2028\x00\x1b \ud800"
)


def page(title="tiny", embedded=None, **parts):
    return page_html(title, parts, start_data([], "runs/tiny"), embedded)


def test_hostile_text_stays_text():
    html = page(HOSTILE, {HOSTILE: [HOSTILE]})
    tags = Tags(html).tags
    scripts = [attrs for tag, attrs in tags if tag == "script"]
    assert [attrs.get("type") for attrs in scripts] == ["application/json"] * 2 + [None]
    assert not any(tag == "img" for tag, _ in tags)
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert not set(html) & set("\u202e\u2066\x00\x1b\ud800\u2028")


def test_data_come_back_as_they_were_and_end_no_script():
    text = as_json({"a": HOSTILE, "b": [1.5, None]})
    assert json.loads(text) == {"a": HOSTILE, "b": [1.5, None]}
    assert "<" not in text and text.isascii()
    assert data_script("a/0", [1]) == 'mm("a/0",[1]);\n'


def test_the_policy_allows_the_pages_own_script_and_style_alone():
    html = page()
    policy = next(attrs["content"] for _, attrs in Tags(html).tags if "http-equiv" in attrs)
    script = re.search(r"<script>(.*)</script></body>", html, re.S).group(1)
    style = re.search(r"<style>(.*)</style>", html, re.S).group(1)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for text, rule in ((script, "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule].startswith(f"'sha256-{digest}'")
    assert rules["default-src"] == "'none'" and "http" not in policy and "unsafe" not in policy


def test_nothing_is_named_that_is_not_in_the_page():
    tags = Tags(page(short="<p>x</p>")).tags
    assert not [attrs for _, attrs in tags if "src" in attrs]
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    links = [attrs["href"] for tag, attrs in tags if tag == "a"]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
