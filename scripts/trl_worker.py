"""GRPO steps of TRL's GRPOTrainer, for `bench_grpo.py --trl`. It runs where trl, torch and Pillow
are installed, and imports nothing of this project.

Each prompt is a chart's picture and one instruction; `--group` answers of one turn are sampled by
`transformers.generate`, given a reward that costs nothing (the share of distinct tokens), and
trained on in one optimizer step of all `--prompts` x `--group` rows. Nothing is executed. The first
line it writes has the versions, then a line for each step: seconds, and tokens that were sampled.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    TrainerCallback,
)


class Pictures(Qwen2_5_VLProcessor):
    """The processor without its part for videos, which alone needs torchvision."""

    @classmethod
    def of(cls, directory: str) -> "Pictures":
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        pictures = AutoImageProcessor.from_pretrained(directory)
        return cls(pictures, tokenizer, None, chat_template=tokenizer.chat_template)

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(name, argument)


class Clock(TrainerCallback):
    """Writes what each step took."""

    def __init__(self) -> None:
        self.tokens, self.since = 0, time.perf_counter()

    def reward(
        self, completions: list[Any], completion_ids: list[list[int]], **rest: Any
    ) -> list[float]:
        """Counts what was sampled."""
        self.tokens += sum(map(len, completion_ids))
        return [len(set(ids)) / max(len(ids), 1) for ids in completion_ids]

    def on_step_end(self, *args: Any, **rest: Any) -> None:
        now = time.perf_counter()
        print(json.dumps({"seconds": now - self.since, "tokens": self.tokens}), flush=True)
        self.tokens, self.since = 0, time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--charts", required=True, help="a chart directory, such as data/train")
    for name in ("steps", "prompts", "group", "response"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    versions = {x.__name__: x.__version__ for x in (trl, transformers, torch)}
    print(json.dumps(versions), flush=True)
    clock, rows = Clock(), args.prompts * args.group
    with tempfile.TemporaryDirectory() as scratch:
        settings = trl.GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            max_steps=args.steps,
            per_device_train_batch_size=rows,
            num_generations=args.group,
            max_completion_length=args.response,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32),
            reward_funcs=clock.reward,
            args=settings,
            train_dataset=charts(Path(args.charts), args.prompts * args.steps),
            processing_class=Pictures.of(args.model),
            callbacks=[clock],
        )
        clock.since = time.perf_counter()
        trainer.train()


def charts(directory: Path, count: int) -> Dataset:
    """The first charts of a directory, as prompts."""
    lines = (directory / "charts.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(lines[i % len(lines)]) for i in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": chart["instruction"]}],
                "image": Image.open(directory / chart["image"]).convert("RGB"),
            }
            for chart in found
        ]
    )


if __name__ == "__main__":
    main()
