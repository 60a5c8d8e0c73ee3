"""What must exist before a stage can run: weights, charts, a tokenizer, dialogues.

What is missing is built where that is possible; otherwise ConfigError says what was looked for and
what makes it. Everything built is a whole directory or none, so that a killed run builds on.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mmrecoder_jax import accounts, places
from mmrecoder_jax.config import (
    SETTINGS_FILE,
    SIZES_FILE,
    TRAINING_FILE,
    ConfigError,
    check_choice,
    data_dir,
    derived_seed,
    model_config,
    naming,
    saved_grammar,
    weights_directory,
    work_directory,
)
from mmrecoder_jax.data import sdists, self_correction
from mmrecoder_jax.data.benchmarks import import_charts
from mmrecoder_jax.data.build import build_synthetic, check_synthetic
from mmrecoder_jax.data.grammars import GRAMMARS, drawn_as
from mmrecoder_jax.data.rows import json_object
from mmrecoder_jax.data.sources import Chart, RandomAccess
from mmrecoder_jax.data.survey import Part
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.checkpoint import split_source
from mmrecoder_jax.models.hub import local_directory
from mmrecoder_jax.models.published import load_config
from mmrecoder_jax.models.tokenizer import train_sentencepiece
from mmrecoder_jax.monitoring.progress import Bar
from mmrecoder_jax.rl.rollout import RolloutEngine, answer_all
from mmrecoder_jax.stage import Stage, env_config

DATA_KINDS = ("synthetic", "directory")
GRAMMAR_NAMES = tuple(GRAMMARS)
# The stage that each stage starts from.
EARLIER = {
    "sft_self_correction": "sft_chart2code",
    "stage1": "sft_self_correction",
    "stage2": "stage1",
    "evaluate": "stage2",
}


def say(text: str) -> None:
    """A line on the main host's output."""
    if distributed.is_main():
        print(places.shown(text), flush=True)


def find_on_hub(config: ConfigDict) -> None:
    """Replaces an id of the hub in `init_from` by the directory that holds its model here.

    Raises:
      ConfigError: the hub does not give it.
    """
    with naming("init_from"):
        config.init_from = local_directory(config.init_from)


def check_grammar(config: ConfigDict) -> None:
    """Checks that the policy of `init_from`, a directory that is here, knows the charts' grammar.

    Raises:
      ConfigError: it was trained on synthetic charts of another one. What says nothing of a
        grammar, such as a published directory, may start on any.
    """
    data = config.data
    if data.kind != "synthetic" or not config.init_from:
        return
    theirs = saved_grammar(_saved(config.init_from))
    if theirs not in ("", data.grammar):
        raise ConfigError(
            f"data.grammar={data.grammar!r}, but the policy of init_from={config.init_from!r} was "
            f"trained on charts of the grammar {theirs!r}: set --config.data.grammar={theirs}, or "
            "start from another policy"
        )


def _saved(source: str) -> dict[str, Any]:
    """What a directory of ours says of the training of its policy; {} where it says nothing."""
    workdir = work_directory(source)
    names = ("config.json",) if places.has_checkpoints(workdir) else (SETTINGS_FILE, TRAINING_FILE)
    for path in (Path(workdir, name) for name in names):
        if path.is_file():
            with naming("init_from"):
                return json_object(path)
    return {}


def find_source(config: ConfigDict) -> None:
    """Checks `init_from` before anything heavy starts; see `find_on_hub` and `check_grammar`.

    Raises:
      ConfigError: says what was looked for and what runs without it.
    """
    if not config.init_from:
        _check_without_source(config)
        return
    without = f"Without weights this runs: {_without_weights(config.stage)}"
    try:
        find_on_hub(config)
    except ConfigError as error:
        raise ConfigError(f"{error}. {without}") from error
    source = config.init_from
    check_grammar(config)
    if places.has_checkpoints(work_directory(source)):
        with naming("init_from"):
            split_source(source)
        return
    if os.path.isfile(os.path.join(source, SIZES_FILE)):
        raise ConfigError(
            f"init_from={source!r}: a work directory without checkpoints; let its stage finish, or "
            "give another directory"
        )
    if os.path.isdir(source):
        with naming("init_from"):
            load_config(weights_directory(source))
        return
    raise ConfigError(
        f"no weights at config.init_from={source!r}: looked for the directory "
        f"{os.path.abspath(source)} with checkpoints/ (a work directory of ours), config.json and "
        "*.safetensors (a Hugging Face directory) or adapter_config.json (adapters of PEFT); it is "
        f"no id of the hub either, such as Qwen/Qwen2.5-VL-7B-Instruct. {without}"
    )


def _without_weights(stage: str) -> str:
    """The command of a stage that needs no weights of others."""
    command = "evaluate" if stage == "evaluate" else "train"
    words = f"python -m mmrecoder_jax.{command} --config={stage}:tiny --workdir=runs/{stage}"
    if stage in EARLIER:
        words += f" --config.init_from=runs/tiny/{EARLIER[stage]}"
    return words


def _check_without_source(config: ConfigDict) -> None:
    """Raises ConfigError where a stage needs an `init_from`."""
    stage = config.stage
    if config.lora.rank:
        raise ConfigError(
            f"lora.rank={config.lora.rank} with an empty config.init_from: adapters need weights "
            "to adapt, a Hugging Face directory or the work directory of an earlier stage"
        )
    if config.size == "paper" or stage in EARLIER:
        earlier = EARLIER.get(stage, "pipeline")
        raise ConfigError(
            f"config.init_from is empty: {stage} starts from an earlier stage's work directory or "
            "a Hugging Face directory (--config.init_from=DIR). To make one: python -m "
            "mmrecoder_jax.train --config=pipeline:tiny --workdir=runs/tiny, then "
            f"--config.init_from=runs/tiny/{earlier}"
        )


def ensure_charts(config: ConfigDict, workdir: str) -> None:
    """Builds the synthetic chart directories that are missing; other kinds must exist
    (`Stage.charts` says how).

    They are rendered in a pool of their own: what runs the policy's code never ran a reference.
    """
    data = config.data
    check_choice("data.kind", data.kind, DATA_KINDS)
    check_choice("data.grammar", data.grammar, GRAMMAR_NAMES)
    if data.kind == "directory":
        return

    def build() -> None:
        counts = {"train": data.train_count, "val": data.val_count, "test": data.test_count}
        env = env_config(config)
        missing = {}
        for split, count in counts.items():
            directory = os.path.join(data_dir(config, workdir), split)
            if not os.path.isdir(directory):
                missing[split] = directory
            elif not data.dir:  # our own directory: it must hold the charts asked for
                try:
                    check_synthetic(directory, split, count, data.seed, env, data.grammar)
                except ValueError as error:
                    raise ConfigError(str(error)) from error
            else:
                _check_drawn_as(data, directory)
        if not missing:
            return
        with ExecutorPool(env) as pool:
            for split, directory in missing.items():
                count = counts[split]
                with Bar(f"charts {split}", count, unit="chart") as bar:
                    build_synthetic(
                        directory, split, count, data.seed, pool, _advancing(bar), data.grammar
                    )

    _on_main_host(build, workdir)


def _check_drawn_as(data: ConfigDict, directory: str) -> None:
    """Raises ConfigError where the charts of `data.dir` are of another grammar."""
    meta = Path(directory, "meta.json")
    drawn = drawn_as(json_object(meta).get("rc_params", {})) if meta.is_file() else ""
    if drawn not in ("", data.grammar):
        raise ConfigError(
            f"data.grammar={data.grammar!r}, but data.dir={data.dir!r} holds charts of the grammar "
            f"{drawn!r}: set --config.data.grammar={drawn}, or name another directory"
        )


def ensure_gallery(config: ConfigDict, workdir: str) -> str:
    """A directory of real charts: `data.gallery` where it is there, else a sample of matplotlib's
    and seaborn's examples; "" for none.

    Missing real charts end no run: it says which command gathers them and goes on.
    """
    gallery = config.data.gallery
    if not gallery or os.path.isdir(gallery):
        return gallery
    directory = os.path.join(data_dir(config, workdir), "gallery")

    def build() -> None:
        if not os.path.isdir(directory) and config.data.gallery_sample:
            _gather_gallery(config, directory)

    _on_main_host(build, workdir)
    remedy = f"`python -m mmrecoder_jax.build_gallery --out={gallery}` gathers all of them"
    if os.path.isdir(directory):
        say(f"real charts: a sample in {directory}; {remedy}")
        return directory
    say(f"no real charts at data.gallery={gallery!r}: {remedy}; going on without")
    return ""


def _gather_gallery(config: ConfigDict, directory: str) -> None:
    # The house style of the toy charts is not theirs, and a few of them are slow.
    env = EnvConfig(
        workers=config.env.workers,
        hosts=config.env.hosts,
        secret=config.env.secret,
        wall_seconds=60,
        cpu_seconds=40,
        sandbox=config.env.sandbox,
    )
    with tempfile.TemporaryDirectory() as unpacked, ExecutorPool(env) as pool:
        try:
            kept = Path(directory).with_name("sdists")
            raws, skipped, licences = sdists.collect(Path(unpacked), kept, sdists.INDEX, say=say)
        except sdists.NotFetched as error:
            say(f"no real charts: {error}")
            return
        raws = sdists.evenly(raws, config.data.gallery_sample)
        licence = "that of each chart's library, see LICENSE.*"
        meta = {"name": "gallery", "licence": licence, "sample": len(raws)}
        with Bar("real charts", len(raws), unit="example") as bar:
            import_charts(
                directory,
                raws,
                pool,
                meta,
                skipped,
                licences,
                curate=True,
                progress=_advancing(bar),
            )


def ensure_tokenizer(config: ConfigDict, workdir: str) -> str | None:
    """Trains the tiny tokenizer where a model is trained from scratch and has none yet.

    Returns:
      Its directory; None where the tokenizer comes with `init_from`.
    """
    if config.init_from:
        return None
    directory = os.path.join(workdir, "tokenizer")
    if config.model.preset != "tiny":
        raise ConfigError(
            f"model.preset={config.model.preset!r} needs config.init_from: only 'tiny' is trained "
            "from scratch"
        )

    def build() -> None:
        if not os.path.isdir(directory):
            feedback = config.feedback
            fixed = [
                config.data.instruction,
                feedback.render,
                *feedback.error.split("{error}"),
            ]
            grammar = GRAMMARS[config.data.grammar]
            texts = grammar.tokenizer_texts(4000, config.data.seed, fixed)
            size = model_config(config).vocab_size
            train_sentencepiece(texts, size, grammar.words()).save(directory)

    _on_main_host(build, workdir)
    return directory


def ensure_dialogues(stage: Stage, env: ChartEnv) -> str:
    """The dialogue directory of cold start 2: `data.dialogues`, or built with the policy of
    `init_from` into the work directory.
    """
    config = stage.config
    directory = config.data.dialogues or os.path.join(stage.workdir, "dialogues")
    if distributed.main_says(os.path.isdir(directory)):
        if config.data.dialogues:
            check_dialogues(config, directory)
        return directory
    if config.data.dialogues:
        raise ConfigError(
            f"no dialogues at data.dialogues={config.data.dialogues!r}; leave it empty to build "
            "them with the policy"
        )
    charts = stage.charts("train")
    bad = accounts.bad_rows(config, charts)
    found = accounts.survey_prompts(config, stage.workdir, charts, stage.processor, bad, turns=1)
    kept = Part(charts, found.kept)
    engine = stage.engine(env, config.dialogues.temperature)
    grammar = GRAMMARS[config.data.grammar]
    drafts = policy_drafts(stage, engine, Part(charts, found.kept[: config.dialogues.policy]))
    drafts += list(
        self_correction.synthetic_drafts(
            kept,
            config.dialogues.synthetic,
            derived_seed(config, "corruptions"),
            grammar.corrupt,
            config.dialogues.right,
            config.dialogues.later,
            grammar.diagnosis,
        )
    )

    def unreadable(draft: self_correction.Draft, error: ValueError) -> None:
        with accounts.bad_rows_named():
            bad.add(draft.chart.id, f"the image of chart {draft.chart.id}: {error}")

    def build() -> None:
        meta = {
            "name": "self-correction",
            "licence": "as of the charts",
            "seed": config.seed,
            "drafts": len(drafts),
            "feedback": config.feedback.image,
            "right": config.dialogues.right,
            "later": config.dialogues.later,
            "grammar": config.data.grammar,
        }
        with (
            ExecutorPool(env.config) as references,
            Bar("dialogues", len(drafts), unit="draft") as bar,
        ):
            try:
                self_correction.build_dialogues(
                    directory,
                    drafts,
                    env,
                    references,
                    meta,
                    config.feedback.to_dict(),
                    config.dialogues.min_gain,
                    config.dialogues.right > 0,
                    grammar.diagnosis,
                    progress=_advancing(bar),
                    shown=engine.shown,
                    unreadable=unreadable,
                )
            except self_correction.NoDialogue as error:
                raise ConfigError(
                    f"dialogues.min_gain={config.dialogues.min_gain}: {error}"
                ) from error

    _on_main_host(build, stage.workdir)
    return directory


def check_dialogues(config: ConfigDict, directory: str) -> None:
    """Whether given dialogues are about what this stage is to learn.

    Raises:
      ConfigError: their feedback shows another picture, or their charts are of another grammar.
    """
    path = Path(directory) / "meta.json"
    meta = json_object(path) if path.is_file() else {}
    kinds = {"feedback": "feedback.image"}
    if config.data.kind == "synthetic":
        kinds["grammar"] = "data.grammar"
    for name, field in kinds.items():
        section, _, last = field.partition(".")
        wanted = config[section][last]
        if meta.get(name, wanted) != wanted:
            raise ConfigError(
                f"data.dialogues={directory!r} was made with {field}={meta[name]!r}, and this run "
                f"has {wanted!r}: give --config.{field}={meta[name]}, or other dialogues"
            )


def policy_drafts(
    stage: Stage, engine: RolloutEngine, charts: RandomAccess[Chart]
) -> list[self_correction.Draft]:
    """First turns that the policy of `init_from` itself writes for all of `charts`.

    Hosts share the charts, and each returns the drafts of all.
    """
    config, count = stage.config, len(charts)
    if not count:
        return []
    size = config.dialogues.batch_size
    with Bar("policy answers", count, unit="chart") as bar:

        def each(starts: Sequence[int]) -> Iterator[int]:
            for start in starts:
                yield start
                bar.advance(min(size, count - start))

        answers = answer_all(
            engine,
            stage.initial_params(),
            charts,
            jax.random.key(derived_seed(config, "drafts")),
            turns=1,
            batch_size=size,
            each=each,
        )
    for number, reason in answers.refused.items():
        say(f"no draft about chart {charts[number].id}: {reason}")
    own = [[number, answer.turns[0].text] for number, answer in answers.own]
    texts = distributed.all_values(own, [number for number, _ in answers.own])
    return [
        self_correction.Draft(f"policy-{number:06d}", charts[number], text, self_correction.POLICY)
        for number, text in texts
    ]


def _advancing(bar: Bar) -> Callable[[int, int], None]:
    """A builder's progress callback (done, in all; once per item) that moves a bar; what an earlier
    process built is not counted again.
    """

    def advance(count: int, total: int) -> None:
        if count > 1 and bar.done == 0:
            bar.resume(count - 1)
        bar.advance(count - bar.done)

    return advance


def _on_main_host(work: Callable[[], None], workdir: str) -> None:
    """Runs `work` on the main host while the others wait; where it fails, all of them raise.

    Args:
      workdir: that it writes to; where that is in a bucket, the others read it from there.
    """
    with distributed.together():
        if distributed.is_main():
            work()
    share(workdir)


def share(workdir: str) -> None:
    """Lets all hosts have what the main one has written. Does something where the work directory is
    in a bucket, of which each host has a folder of its own (`places`).
    """
    with distributed.together():
        if distributed.is_main():
            places.push(workdir)
    if not distributed.is_main():
        places.refill(workdir)
