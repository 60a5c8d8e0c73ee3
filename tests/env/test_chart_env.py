import pytest

from mmrecoder_jax.env import ChartEnv, EnvConfig, Execution, Status
from mmrecoder_jax.env.chart_env import extract_code, feedback_text, has_format

GOOD = "<think>bars</think>\n```python\nx = 1\n```"


def test_code_is_the_first_python_block():
    assert extract_code(GOOD) == "x = 1\n"
    assert extract_code("a\n```python\nx\n```\nb\n```python\ny\n```") == "x\n"
    assert extract_code("```python\nx = 1") is None
    assert extract_code("```\nx = 1\n```") is None
    assert extract_code("") is None


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, True),
        ("\n " + GOOD + "\n", True),
        (GOOD + " Done.", False),
        ("Sure. " + GOOD, False),
        (GOOD + "\n" + GOOD, False),
        (GOOD + "\n```python\ny\n```", False),
        ("```python\nx = 1\n```", False),
        ("<think>a<think>b</think>\n```python\nx\n```", False),
        ("<think>a ```python\ny\n``` </think>\n```python\nx\n```", False),
        ("<think>bars</think>\n```\nx = 1\n```", False),
        ("<think>bars</think>\n```python\nx = 1", False),
    ],
)
def test_format(response, expected):
    assert has_format(response) is expected


def test_feedback_text():
    templates = {"render": "Look.", "error": "It failed:\n{error}\nFix it."}
    assert feedback_text(Execution(Status.OK), templates) == "Look."
    assert feedback_text(Execution(Status.ERROR, error="a {error} b"), templates) == "It failed:\na {error} b\nFix it."


def test_responses_are_executed():
    with ChartEnv(EnvConfig(workers=1, preload=())) as env:
        results = env.execute([GOOD, "no code"])
    assert [r.status for r in results] == [Status.NO_FIGURE, Status.NO_CODE]
