"""The form of a response: one <think> block, then one ```python block (arXiv 2604.01600).

    <think>bar, 2 series</think>
    ```python
    import matplotlib.pyplot as plt
    ...
    ```

The one home of that form: whoever writes, checks or reads a response does it through this module.
"""

import re

_CODE = re.compile(r"```python[ \t]*\n(.*?)```", re.DOTALL)
_RESPONSE = re.compile(
    r"\s*<think>(?P<think>.*?)</think>\s*```python[ \t]*\n(?P<code>.*?)```\s*", re.DOTALL
)
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
    """The first closed ```python block of a response, or None."""
    match = _CODE.search(response)
    return match.group(1) if match else None


def extract_thought(response: str) -> str:
    """What precedes the first ```python block, with or without the tags that the format asks for.

    >>> extract_thought(response_text("bar, 2 series", "plt.bar([1], [2])"))
    'bar, 2 series'
    """
    before_code = response.split("```python")[0]
    return before_code.replace("<think>", "").replace("</think>", "").strip()


def has_format(response: str) -> bool:
    """Whether a response is one <think> block, one ```python block, and nothing else.

    This is the paper's format reward.
    """
    match = _RESPONSE.fullmatch(response)
    if match is None:
        return False
    return "<think>" not in match["think"] and "```" not in match["think"] + match["code"]
