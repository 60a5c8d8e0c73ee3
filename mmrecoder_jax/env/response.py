"""The form of a response: one <think> block, then one ```python block (arXiv 2604.01600).

    <think>bar, 2 series</think>
    ```python
    import matplotlib.pyplot as plt
    ...
    ```
"""

import re

_CODE = re.compile(r"```python[ \t]*\n(.*?)```", re.DOTALL)
_RESPONSE = re.compile(
    r"\s*<think>(?P<think>.*?)</think>\s*```python[ \t]*\n(?P<code>.*?)```\s*", re.DOTALL
)


def extract_code(response: str) -> str | None:
    """The first closed ```python block of a response, or None."""
    match = _CODE.search(response)
    return match.group(1) if match else None


def has_format(response: str) -> bool:
    """Whether a response is one <think> block followed by one ```python block, and nothing else
    (paper: the format reward).
    """
    match = _RESPONSE.fullmatch(response)
    if match is None:
        return False
    return "<think>" not in match["think"] and "```" not in match["think"] + match["code"]
