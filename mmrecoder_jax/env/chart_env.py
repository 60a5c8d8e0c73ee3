"""The environment as the policy meets it: a response's code is taken out, run, and answered with feedback."""

import re
from collections.abc import Iterable, Mapping

from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.pool import ExecutorPool

_CODE = re.compile(r"```python[ \t]*\n(.*?)```", re.DOTALL)
_RESPONSE = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*```python[ \t]*\n(?P<code>.*?)```\s*", re.DOTALL)


def extract_code(response: str) -> str | None:
    """The first closed ```python block of a response, or None."""
    match = _CODE.search(response)
    return match.group(1) if match else None


def has_format(response: str) -> bool:
    """Whether a response is one <think> block followed by one ```python block, and nothing else (paper: the format reward)."""
    match = _RESPONSE.fullmatch(response)
    return match is not None and "<think>" not in match["think"] and "```" not in match["think"] + match["code"]


def feedback_text(execution: Execution, templates: Mapping[str, str]) -> str:
    """The text part of a turn's feedback.

    Args:
      execution: of the previous turn.
      templates: "render" for a script that drew a figure, "error" for any other; "{error}" in the latter is replaced by the error text.
    """
    return templates["render"] if execution.ok else templates["error"].replace("{error}", execution.error)


class ChartEnv(ExecutorPool):
    """An `ExecutorPool` that takes responses instead of code.

    with ChartEnv(EnvConfig(workers=2)) as env:
        first, second = env.execute([response_a, response_b])
    """

    def execute(self, responses: Iterable[str], render: bool = True) -> list[Execution]:
        """Runs the code of each response; NO_CODE where there is none."""
        return self.run([extract_code(response) for response in responses], render)
