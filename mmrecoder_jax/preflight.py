"""`train --preflight`: everything that a run needs, tried before it is paid for.

    settings        the fields that differ from the file's
    sources         weights that are there, and numbers that fit together
    work directory  written to, and read again
    charts          how many, and the size of the first
    scripts         20 targets executed as a policy's scripts are
    programs        each compiled for these devices at its largest bucket
    trial           two steps of two prompts through the whole path, in a directory of its own
    judge           asked about a target beside itself
    time            what a step of the run takes here, and costs

The run itself is left as it was: the trial's directory is removed. Charts that the run would make
are made. A check that fails leaves the others to be made, and the command ends with 1.
"""

import contextlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmrecoder_jax import places, stage
from mmrecoder_jax.checks import check_config
from mmrecoder_jax.command import explain
from mmrecoder_jax.config import RL_STAGES, ConfigError, data_dir, model_config
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.images import decode
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.pipeline import train_stage
from mmrecoder_jax.planner import fits, topology
from mmrecoder_jax.planner.estimate import step
from mmrecoder_jax.planner.programs import Program, Programs, programs_of
from mmrecoder_jax.planner.sentences import cost_sentence, time_sentence
from mmrecoder_jax.prepare import ensure_charts, ensure_tokenizer, find_source, say

TARGETS = 20
PROMPTS = 2
STEPS = 2
TRIAL = "preflight"  # the trial's folder, below the work directory

Changes = Mapping[str, tuple[Any, Any]]  # field -> (the file's value, the run's)


def preflight(config: ConfigDict, workdir: str, changes: Changes) -> bool:
    """Tries everything that a stage needs, and says of each what came out.

    Args:
      config: of one stage.
      workdir: of the run.
      changes: what the command line says otherwise than the configuration's file.

    Returns:
      Whether all is well.
    """
    return _Preflight(config, workdir).run(changes)


class _Preflight:
    def __init__(self, config: ConfigDict, workdir: str):
        self._config, self._workdir = config, workdir
        self._folder = os.path.join(workdir, TRIAL)
        self._failed: list[str] = []
        self._reports: list[fits.ProgramReport] = []

    def run(self, changes: Changes) -> bool:
        config = self._config
        say(f"settings: {_changed(changes)}")
        self._try("sources", self._sources)
        self._try("work directory", self._work_directory)
        if not self._failed:  # without weights and a place to write there is nothing to try
            try:
                self._try("charts", self._charts)
                with self._check("scripts"), ChartEnv(stage.env_config(config)) as env:
                    self._try("scripts", lambda: self._scripts(env))
                    self._try("programs", self._programs)
                    self._try("trial", lambda: self._trial(env))
                if config.stage in RL_STAGES:
                    self._try("judge", self._judge)
            finally:
                self._remove()
            self._try("time", self._time)
        if self._failed:
            say(f"preflight: failed in {', '.join(self._failed)}")
        else:
            say("preflight: all is well")
        return not self._failed

    def _sources(self) -> str:
        config = self._config
        find_source(config)
        check_config(config, model_config(config).vision)
        return config.init_from or "none, a model from scratch"

    @contextlib.contextmanager
    def _check(self, name: str) -> Iterator[None]:
        """Around one check: an error that a user can cause is told, and counted.

        Of several hosts none goes on without the one that failed, so there it ends the command.
        """
        try:
            yield
        except Exception as error:
            text = explain(error)
            if text is None:
                raise
            if jax.process_count() > 1:
                raise ConfigError(f"{name}: {text}") from error
            self._failed.append(name)
            say(f"{name}: FAILED: {text}")

    def _try(self, name: str, check: Callable[[], str]) -> None:
        with self._check(name):
            say(f"{name}: {check()}")

    def _work_directory(self) -> str:
        path = os.path.join(self._workdir, f".probe-{uuid.uuid4().hex[:8]}")
        with distributed.together():
            if distributed.is_main():
                os.makedirs(self._workdir, exist_ok=True)
                with open(path, "w", encoding="utf-8") as f:
                    f.write(path)
                try:
                    with open(path, encoding="utf-8") as f:
                        if f.read() != path:
                            raise ConfigError(f"{path} reads otherwise than it was written")
                finally:
                    os.remove(path)
        free = shutil.disk_usage(self._workdir).free
        address = places.shown(self._workdir)
        if address != self._workdir:
            places.reach(address)
            return (
                f"{address} can be written to and read; {free / 2**30:,.0f} GiB are free in "
                f"{places.home()}"
            )
        return f"{self._workdir} can be written to; {free / 2**30:,.0f} GiB are free"

    def _charts(self) -> str:
        ensure_charts(self._config, self._workdir)
        charts = self._built().charts("train")
        first = charts[0]
        width, height = decode(first.image).size
        return f"{len(charts):,} to train on; the first, {first.id}, is {width} x {height} pixels"

    def _scripts(self, env: ChartEnv) -> str:
        charts = self._built().charts("train")
        codes = [charts[i].code for i in range(min(4 * TARGETS, len(charts)))]
        codes = [code for code in codes if code][:TARGETS]
        if not codes:
            return "no target of the first has a script to try"
        started = time.monotonic()
        done = env.run(codes)
        rate = len(codes) / (time.monotonic() - started)
        failed = [each for each in done if not each.ok]
        if len(failed) * 2 > len(codes):
            raise ConfigError(
                f"{len(failed)} of {len(codes)} targets do not run in this sandbox, the first "
                f"with {failed[0].status}: {failed[0].error}; see env.preload and the libraries "
                "that the scripts import"
            )
        return f"{len(codes) - len(failed)} of {len(codes)} targets run, {rate:.1f} a second"

    def _programs(self) -> str:
        """Compiled for the devices that are here; what they take where the devices say it."""
        programs = Programs(self._config, jax.devices())
        limit = _memory_limit()
        for program in programs_of(self._config.stage):
            if program == Program.GRADIENTS and programs.micro_batches == 1:
                continue  # the update is one program
            self._reports.append(fits.measure_here(programs, program, limit))
        worst = max(self._reports, key=lambda report: report.used)
        used = f"{worst.program} takes the most, {worst.used / fits.GIB:.3g} GiB"
        if not limit:
            return f"{len(self._reports)} compiled at their largest buckets; {used} a device"
        if not worst.fits:
            raise ConfigError(
                f"{used} of {limit / fits.GIB:.3g} GiB on a device: `python -m "
                "mmrecoder_jax.memory` says what fits"
            )
        return f"{len(self._reports)} compiled; {used} of {limit / fits.GIB:.3g} GiB on a device"

    def _trial(self, env: ChartEnv) -> str:
        config = self._small()
        train_stage(config, self._folder, env)
        if not distributed.is_main():
            return ""
        last = read_metrics(os.path.join(self._folder, "metrics.jsonl"))[-1]
        names = ("loss", "reward", "grad_norm")
        told = ", ".join(f"{name} {last[name]:.3g}" for name in names if name in last)
        return (
            f"{STEPS} steps of {config.train.batch_size} rows of data; the second, when all was "
            f"compiled, took {last['seconds/step']:.1f} s: {told}"
        )

    def _small(self) -> ConfigDict:
        """The run's configuration, for two steps of as few prompts as the devices can share."""
        config = ConfigDict(self._config.to_dict())
        train, hosts = config.train, jax.process_count()
        axes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
        mesh = make_mesh(*axes, slices=config.mesh.slices)
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.stage in RL_STAGES:
            group, rows, parts = config.rl.group, train.micro_batch_size, config.rl.mini_batches
            prompts = math.lcm(PROMPTS, hosts)  # of a mini-batch
            while prompts * group % math.lcm(ways, hosts):
                prompts += hosts
            train.batch_size = prompts * parts
            train.micro_batch_size = math.gcd(rows, prompts * group)
            config.rl.rollout_prompts = config.rl.rows = config.rl.eval_every = 0
        else:
            train.batch_size = train.micro_batch_size
        train.steps, config.checkpoint.best = STEPS, ""
        config.data.dir = data_dir(self._config, self._workdir)
        config.log.tensorboard, config.log.wandb = False, ""
        if config.stage == "sft_self_correction" and not config.data.dialogues:
            config.dialogues.policy = PROMPTS * hosts
            config.dialogues.synthetic = 4 * train.micro_batch_size
        return config

    def _remove(self) -> None:
        with distributed.together():
            if distributed.is_main():
                shutil.rmtree(self._folder, ignore_errors=True)
                places.remove_checkpoints(self._folder)

    def _judge(self) -> str:
        built = self._built()
        with built.judge() as judge:
            if judge is None:
                return "none (reward.judge)"
            target = built.charts("train")[0].image
            answer = judge.submit(target, np.asarray(decode(target)))
            judge.finish()
            verdict = answer.result()
        if verdict.score is None:
            raise ConfigError(f"{judge.name} gave no score: {verdict.problem}")
        return f"{judge.name} gives a target beside itself {verdict.score:.2f} of 1"

    def _time(self) -> str:
        devices = jax.devices()
        wanted = topology.of_kind(devices[0].device_kind, len(devices))
        took = None if wanted is None else step(self._config, self._reports, wanted)
        if wanted is None or took is None:
            return f"no estimate for {devices[0].device_kind}; the trial's second step is a hint"
        return f"{time_sentence(self._config, took)} {cost_sentence(self._config, took, wanted)}"

    def _built(self) -> stage.Stage:
        """The stage in the trial's directory, so that the run's keeps no verdict of ours."""
        config = self._small()
        return stage.build(config, self._folder, ensure_tokenizer(config, self._folder))


def _changed(changes: Changes) -> str:
    if not changes:
        return "those of the file"
    told = (f"{name} {was!r} -> {now!r}" for name, (was, now) in sorted(changes.items()))
    return f"{len(changes)} unlike the file's: {', '.join(told)}"


def _memory_limit() -> int:
    """Bytes that programs may use of a device; 0 where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 0))
