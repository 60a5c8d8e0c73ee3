"""The model card of an exported policy: what it is, its numbers, how it was trained, its limits."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax.config import TRAINING_FILE, saved_grammar
from mmrecoder_jax.data.grammars import GRAMMARS
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.evaluation import table_rows
from mmrecoder_jax.models import adapters as peft
from mmrecoder_jax.models.files import read_json
from mmrecoder_jax.models.hub import is_hub_id, published_name
from mmrecoder_jax.reporting.tables import table_markdown

# Fields of a configuration that a reader asks for first, where the stage has them.
_TOLD = (
    *("init_from", "data.kind", "data.grammar", "data.dir", "data.train_count", "data.seed"),
    "seed",
    *("train.steps", "train.epochs", "train.batch_size", "optim.lr", "lora.rank", "lora.alpha"),
    *("rl.group", "rl.turns", "rl.response_length", "reward.alpha", "reward.beta", "reward.judge"),
    *("feedback.image", "processor.min_pixels", "processor.max_pixels"),
)
_STEP = ("step", "loss", "reward", "turn1/low_level", "turn2/low_level", "improvement")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known of the run that an export comes from.

    Attributes:
      config: of the stage.
      version: of mmrecoder_jax.
      step: of the checkpoint.
      rows: of `evaluation.json`; empty where the policy was not evaluated.
      last: the last row of metrics.jsonl; empty where there is none.
    """

    config: ConfigDict
    version: str
    step: int
    rows: Sequence[dict[str, Any]]
    last: Mapping[str, Any]


def model_card(directory: Path, origin: Origin) -> str:
    """README.md for an exported directory, in Markdown with the hub's metadata in front."""
    config = origin.config
    adapters = peft.holds_adapters(directory)
    base = peft.base_of(directory) if adapters else published_name(config.init_from)
    what = "Low-rank adapters of a Qwen2.5-VL" if adapters else "A Qwen2.5-VL"
    return "\n".join(
        [
            *_metadata(adapters, base),
            f"# Chart to code: {config.stage} ({config.size})",
            "",
            f"{what} that redraws the image of a chart as Matplotlib code, sees what its code drew "
            "(or the error), and writes a better second turn (MM-ReCoder, arXiv 2604.01600). "
            f"mmrecoder_jax {origin.version} wrote it from the checkpoint after step "
            f"{origin.step} of the stage `{config.stage}`.",
            "",
            "## Numbers",
            "",
            *_numbers(origin),
            "",
            "## How it was trained",
            "",
            table_markdown([{"field": f"`{name}`", "value": text} for name, text in _told(config)]),
            "",
            f"{TRAINING_FILE} has every field.",
            "",
            "## Use",
            "",
            *_use(directory, config, base if adapters else ""),
            "",
            "## Limits",
            "",
            *_limits(directory, config),
            "",
        ]
    )


def _metadata(adapters: bool, base: str) -> list[str]:
    lines = ["---", f"library_name: {'peft' if adapters else 'transformers'}"]
    if is_hub_id(base):
        lines.append(f"base_model: {base}")
    tags = ["chart-to-code", "matplotlib", "mmrecoder_jax"]
    tagged = (f"- {tag}" for tag in tags)
    return [*lines, "pipeline_tag: image-text-to-text", "tags:", *tagged, "---", ""]


def _numbers(origin: Origin) -> list[str]:
    lines = []
    if origin.rows:
        lines += [
            "Scores and shares are in percent, with 95 % bootstrap intervals over charts. "
            "`improvement` and the columns behind it count charts whose first turn runs.",
            "",
            table_markdown(table_rows(origin.rows)),
        ]
    else:
        lines.append(
            "This policy was not evaluated: its work directory has no evaluation.json. `python -m "
            "mmrecoder_jax.evaluate` writes one."
        )
    last = {name: origin.last[name] for name in _STEP if name in origin.last}
    if last:
        shown = ", ".join(f"{name} {_number(value)}" for name, value in last.items())
        lines += ["", f"The last row of the training metrics: {shown}."]
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _told(config: ConfigDict) -> list[tuple[str, str]]:
    flat = config.to_dict()
    told = []
    for name in _TOLD:
        section, _, field = name.rpartition(".")
        fields = flat.get(section, {}) if section else flat
        unused = section == "lora" and not fields.get("rank")
        unused |= name == "data.grammar" and fields["kind"] != "synthetic"
        if field in fields and not unused:
            value = fields[field]
            shown = json.dumps(published_name(value) if name == "init_from" else value)
            told.append((name, f"`{shown}`"))
    return told


def _use(directory: Path, config: ConfigDict, base: str) -> list[str]:
    load = [
        'model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")',
        "processor = AutoProcessor.from_pretrained(path)",
    ]
    imports = [
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
    ]
    if base:
        imports.insert(0, "from peft import PeftModel")
        load = [
            f"base = {json.dumps(base)}",
            'model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")',
            "model = PeftModel.from_pretrained(model, path)",
            "processor = AutoProcessor.from_pretrained(base)",
        ]
    pixels = f"min_pixels={config.processor.min_pixels}, max_pixels={config.processor.max_pixels}"
    ask = [
        'question = [{"type": "image"}, {"type": "text", "text": '
        f"{json.dumps(config.data.instruction, ensure_ascii=False)}}}]",
        'messages = [{"role": "user", "content": question}]',
        "text = processor.apply_chat_template(messages, add_generation_prompt=True)",
        'inputs = processor(text=[text], images=[Image.open("chart.png")], return_tensors="pt")',
        "answer = model.generate(**inputs, max_new_tokens=512)[0, inputs.input_ids.shape[1] :]",
        "print(processor.decode(answer, skip_special_tokens=True))",
    ]
    before = "`path` is this directory. The prompt is the one that the policy was trained on."
    if base:
        before += f" Images were resized to between {pixels.replace(', ', ' and ')}."
    lines = [
        before,
        "",
        "```python",
        *imports,
        "",
        *load,
        *ask,
        "```",
    ]
    if "image" not in config.feedback:  # cold start 1, which has seen no feedback
        return [*lines, "", "It was trained on first turns alone."]
    return [
        *lines,
        "",
        "A further turn answers the render of the code, with this text behind the picture:",
        "",
        "```",
        config.feedback.render,
        "```",
        "",
        "Or, where the code fails:",
        "",
        "```",
        config.feedback.error,
        "```",
        "",
        f"The picture is {FeedbackImage(config.feedback.image).description}",
    ]


def _limits(directory: Path, config: ConfigDict) -> list[str]:
    lines = [
        "- The code that it writes is untrusted: run it in a sandbox, as mmrecoder_jax does.",
        "- It was trained on still images. Both temporal slices of the patch embedding hold half "
        "of their sum: equal for images, not for videos.",
    ]
    if name := saved_grammar(config.to_dict()):
        grammar = GRAMMARS[name]
        lines.append(
            f"- It was trained on synthetic charts in one house style: {grammar.DESCRIPTION}. It "
            f"cannot be expected to draw others, such as {grammar.BEYOND}; where the table has a "
            "row of real charts (`gallery`), that says how well it does."
        )
    settings = directory / "tokenizer_config.json"
    if settings.is_file() and (directory / "tokenizer.model").is_file():
        lines.append(
            "- Its tokenizer was trained on such charts. A character that it does not cover is two "
            "tokens for each of its bytes, which transformers shows as hexadecimal digits; "
            "mmrecoder_jax puts the bytes together."
        )
        kind = read_json(settings).get("tokenizer_class")
        lines.append(f"  (tokenizer.json is read by {kind}; tokenizer.model by mmrecoder_jax.)")
    return lines
