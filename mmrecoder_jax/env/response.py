"""The form of a response: one <think> block, then one ```python block (arXiv 2604.01600).

    <think>bar, 2 series</think>
    ```python
    import matplotlib.pyplot as plt
    ...
    ```

The one home of that form: whoever writes, checks or reads a response does it through this module.

What counts as its code, the same for the policy (`extract_code`) and for data (`answer_code`):

    fence        ``` or ~~~, three or more; it ends at the same fence
    language     python, py, python3, python3.11 in any case, after spaces or none, and attributes
                 after it: "``` Python title='a.py'", "```{.python}"
    lines        LF, CRLF or CR; the code has LF. A block indented in a list is dedented
    several      the last block that is a whole script: it imports something and draws or shows
                 something. An answer in steps ends with one. Where there is none, the first block.
                 Blocks of other languages (bash) do not count

Data may also have a block without a language or without an end, or no fence at all. A policy may
not: what it wrote up to the limit is no script. The format reward is stricter yet (`has_format`).
"""

import dataclasses
import re
import textwrap
from collections.abc import Iterator

_FENCE = re.compile(r"(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^\n`]*)(?:\n|\Z)")
_PYTHON = re.compile(r"\{?[ \t]*\.?(?:python(?:\d[\d.]*)?|py3?)(?![\w.+#-])", re.IGNORECASE)
_RESPONSE = re.compile(
    r"\s*<think>(?P<think>.*?)</think>\s*"
    r"```[ \t]*(?i:python3?|py)[ \t]*\n(?P<code>.*?)```\s*",
    re.DOTALL,
)
_IMPORT = re.compile(r"^[ \t]*(?:import|from)[ \t]+\w", re.MULTILINE)
_SHOWING_CALL = re.compile(r"\b(?:savefig|show)\(")
_DRAWING_CALL = re.compile(
    r"\.(bar|barh|plot|scatter|pie|fill_between|step|hist|boxplot|violinplot|imshow|pcolormesh"
    r"|contour|contourf|stackplot|errorbar|stem|quiver|streamplot|hexbin|plot_surface|heatmap"
    r"|barplot|lineplot|scatterplot|histplot)\("
)
_POINTS = re.compile(r"^x = \[([^\[\]]+)\]$", re.MULTILINE)


def response_text(think: str, code: str) -> str:
    """A response that has the format: the thought, one fenced block, and nothing after it."""
    return f"<think>{think}</think>\n```python\n{code}\n```"


def think_text(code: str) -> str:
    """What a first turn thinks before it writes this code, told from the code alone.

    It names the kinds of drawing calls, how many series there are, and how many points on `x`.

    >>> think_text("x = ['Mon','Tue','Wed']\\nax.plot(x, [1,2,3])\\nax.plot(x, [3,2,1])")
    'plot, 2 series, 3 points'
    """
    calls = _DRAWING_CALL.findall(code)
    points = _POINTS.search(code)
    parts = [*dict.fromkeys(calls), f"{len(calls)} series"]
    if points:
        parts.append(f"{points[1].count(',') + 1} points")
    return ", ".join(parts)


def extract_code(response: str) -> str | None:
    """The code of a policy's response: of its closed Python blocks (see above), or None."""
    return _choose([block.code for block in _blocks(response) if block.python and block.closed])


def answer_code(answer: str) -> str:
    """The code of an answer in a data set; all of it where there is no fence.

    The empty text where its only blocks are of other languages.
    """
    blocks = list(_blocks(answer))
    for kind in (
        [block for block in blocks if block.python and block.closed],
        [block for block in blocks if block.python],
        [block for block in blocks if not block.language],
    ):
        code = _choose([block.code for block in kind])
        if code is not None:
            return code
    return "" if blocks else _lines(answer)


def begun_code(response: str) -> str:
    """The last Python block of a response that is still being written; empty before it begins.

    >>> begun_code("<think>bar</think>\\n```python\\nimport mat")
    'import mat'
    """
    codes = [block.code for block in _blocks(response) if block.python]
    return codes[-1] if codes else ""


def extract_thought(response: str) -> str:
    """What precedes the first Python block, with or without the tags that the format asks for.

    >>> extract_thought(response_text("bar, 2 series", "plt.bar([1], [2])"))
    'bar, 2 series'
    """
    text = _lines(response)
    first = next((block.start for block in _blocks(text) if block.python), len(text))
    return text[:first].replace("<think>", "").replace("</think>", "").strip()


@dataclasses.dataclass(frozen=True)
class _Block:
    """A fenced block.

    Attributes:
      start: where its fence begins in the text (whose lines end with LF).
      language: what stands behind the fence.
      closed: whether it has an end.
    """

    start: int
    language: str
    code: str
    closed: bool

    @property
    def python(self) -> bool:
        return _PYTHON.match(self.language) is not None


def _blocks(text: str) -> Iterator[_Block]:
    """The fenced blocks of a text, in order."""
    text = _lines(text)
    position = 0
    while opening := _FENCE.search(text, position):
        before = text[text.rfind("\n", 0, opening.start()) + 1 : opening.start()]
        language = opening["info"].strip()
        # A policy may write a block right behind its thought; other fences inside a line are none.
        if before.strip() and not _PYTHON.match(language):
            position = opening.start() + len(opening["fence"])
            continue
        end = text.find(opening["fence"], opening.end())
        code = text[opening.end() : end if end >= 0 else len(text)]
        if before and not before.strip():
            code = textwrap.dedent(code)
        yield _Block(opening.start(), language, code, end >= 0)
        if end < 0:
            return
        position = end + len(opening["fence"])


def _choose(codes: list[str]) -> str | None:
    """The last whole script, else the first code, else None."""
    whole = [code for code in codes if _is_whole(code)] if len(codes) > 1 else []
    return whole[-1] if whole else next(iter(codes), None)


def _is_whole(code: str) -> bool:
    draws = _DRAWING_CALL.search(code) or _SHOWING_CALL.search(code)
    return draws is not None and _IMPORT.search(code) is not None


def _lines(text: str) -> str:
    """The text with LF at the end of lines and without the byte-order mark of its file."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")


def has_format(response: str) -> bool:
    """Whether a response is one <think> block, one ```python block, and nothing else.

    This is the paper's format reward. Lines may end with CRLF, and the language may be written
    python, python3 or py, in any case and after spaces; the tags are in lower case.
    """
    match = _RESPONSE.fullmatch(_lines(response))
    if match is None:
        return False
    think, code = match["think"], match["code"]
    return "<think>" not in think and "```" not in think + code
