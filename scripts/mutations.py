"""Breaks the code on purpose, one small way at a time, and says which test notices.

    python scripts/mutations.py                        every mutation; exit 1 where one survives
    python scripts/mutations.py --only optim rl.clip   those whose name holds one of the words
    python scripts/mutations.py --list                 names, files and tests

A mutation replaces a text by another: it takes a check away, or makes an option do nothing. A
mutation that no test notices is a check or an option without a test. The checkout is copied first,
so nothing here changes it. Each mutation runs only the tests that should catch it, which must pass
on the code as it is.

A name is that of the option (`rl.clip_low`) or of the check it breaks. The script also fails where
a mutation's old text is not in its file exactly once: then the table below is stale.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 900  # longest run of one mutation's tests
# At the top of a checkout: environments, caches and results, which no test reads.
NOT_COPIED = ("build", "data", "dist", "runs")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One way to break the code.

    Attributes:
      name: the option or the check.
      file: path below the checkout.
      old, new: the text that is replaced, and what stands there afterwards.
      tests: files or ids of the tests that should fail then.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of_file(file: str, tests: Sequence[str], *rows: tuple[str, str, str]) -> list[Mutation]:
    """Mutations of one file from rows (name, old text, new text)."""
    return [Mutation(name, file, old, new, tuple(tests)) for name, old, new in rows]


def of_field(field: str, old: str, new: str, file: str, stage: str = "stage2") -> Mutation:
    """A field that no longer reaches what it is for."""
    test = "test_a_changed_field_changes_what_happens_or_is_refused"
    return Mutation(
        f"{field} in {stage}",
        f"mmrecoder_jax/{file}.py",
        old,
        new,
        (f"tests/test_config_fields.py::{test}[{stage}-{field}]",),
    )


REFERENCE_TESTS = [
    "tests/test_loop.py::test_a_resumed_run_has_the_reference_of_one_that_was_not_interrupted",
    "tests/test_loop.py::test_a_run_whose_reference_stayed_goes_on_with_one_that_follows",
    "tests/test_loop.py::test_a_reference_follows_the_policy_every_so_many_steps",
]
PARTS = "1.0 - config.alpha - config.beta, config.alpha, config.beta"
MUTATIONS = (
    *of_file(
        "mmrecoder_jax/env/pool.py",
        ["tests/env/test_interpreter.py"],
        ("env.python", "interpreter.find(config.python)", 'interpreter.find("")'),
    ),
    *of_file(
        "mmrecoder_jax/env/channel.py",
        ["tests/env/test_channel.py"],
        (
            "hosts: a frame that was changed",
            "if not hmac.compare_digest(mac, _of_frame(",
            "if False and not hmac.compare_digest(mac, _of_frame(",
        ),
        ("hosts: a frame that was repeated", "        self._received += 1\n", ""),
        ("hosts: trainers' proofs", "_sign(secret, _TRAINER + both)):", '_bytes(said, "proof")):'),
        ("hosts: hosts' proofs", "_sign(secret, _HOST + both)):", '_bytes(said, "proof")):'),
        ("hosts: byte by byte", "self.wait(min(left, self._silence))", "self.wait(self._silence)"),
        ("hosts: cut pictures", " or not stream.eof or stream.unused_data:", ":"),
        ("hosts: short secrets", "if len(secret) < LEAST_SECRET:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/env/remote.py",
        ["tests/env/test_remote.py"],
        ("hosts: another script's answer", 'if words["number"] != number:', "if False:"),
        ("hosts: facts that cannot be", "not all(map(_is_time, times))", "False"),
        ("hosts: replays", "if outcome.replay is not None and not watched:", "if False:"),
        (
            "hosts: beats without an end",
            "if beats > _SPARE_BEATS",
            "if False and beats > _SPARE_BEATS",
        ),
        ("hosts: other releases", "        if found:\n", "        if False:\n"),
        ("hosts: other machines", "if not secret and not is_this_machine(name):", "if False:"),
        ("hosts: no room", "            if words == BEAT:  #", "            if False:  #"),
        ("hosts: said once", "is_new = not host.problem", "is_new = True"),
        ("hosts: none is left", "if now > since + START_SECONDS:", "if False:"),
        ("hosts: full ones", "        if words == FULL:\n", "        if False:\n"),
    ),
    *of_file(
        "mmrecoder_jax/env/backlog.py",
        ["tests/env/test_backlog.py"],
        ("backlog: who comes", "self.shortage > 0 or self._is_closed, seconds", "True, seconds"),
        ("backlog: what was lost", ").appendleft(job)", ").append(job)"),
        ("backlog: what stays here", "(self._here if here else", "(self._here if False else"),
        ("backlog: doubted hosts", "or job.doubted != doubted", "or True"),
        ("backlog: who was woken", "            self._resting -= 1\n", ""),
    ),
    *of_file(
        "mmrecoder_jax/env/pool.py",
        ["tests/env/test_remote.py"],
        ("hosts: results that are none", "if answer.claim and is_no_result(execution)", "if False"),
        (
            "hosts: who sent them",
            "if job.doubted and not is_no_result(execution) and self._hosts",
            "if False and self._hosts",
        ),
        ("hosts: scripts that were lost", "        job.lost += 1\n        if", "        if"),
        (
            "hosts: killed by others",
            "if self._was_killed_by_others(answer.outcome) and job.killed",
            "if False and job.killed",
        ),
        (
            "hosts: an end of the pool",
            "left += self._backlog.empty()",
            "left.clear()",
        ),
    ),
    *of_file(
        "mmrecoder_jax/env/host.py",
        ["tests/env/test_host.py"],
        ("host: its sandbox", "if settings.sandbox != here.sandbox:", "if False:"),
        ("host: settings that cannot be", "    if not right:\n", "    if False:\n"),
        ("host: executors", "if not self._processes.acquire(blocking=False):", "if False:"),
        ("host: room", "while not self._room.acquire(timeout=_LOOK_SECONDS):", "while False:"),
        ("host: long code", "or len(code) > wire.MAX_CODE_CHARACTERS", ""),
        ("host: a trainer that is gone", "self.close()  # its trainer", "pass  # its trainer"),
    ),
    *of_file(
        "mmrecoder_jax/env/serve.py",
        ["tests/env/test_serve.py"],
        (
            "env.serve: other machines",
            "if not has_secret and not is_this_machine(name):",
            "if False:",
        ),
    ),
    *of_file(
        "mmrecoder_jax/fields.py",
        ["tests/test_fields.py"],
        ("env.hosts", "check_hosts(values[field], *of_hosts)", "pass"),
    ),
    *of_file(
        "mmrecoder_jax/env/interpreter.py",
        ["tests/env/test_interpreter.py"],
        ("env.python: its version", "< about.LEAST_PYTHON:", "< (3,):"),
        ("env.python: its matplotlib", "_numbers(releases[name]) < _numbers(least)", "False"),
    ),
    *of_file(
        "mmrecoder_jax/benchmarks/chartmimic_official.py",
        ["tests/benchmarks/test_chartmimic_official.py"],
        (
            "official: the wrapped file",
            "guarded, unguarded = wrap(gen_code)",
            "guarded, unguarded = prepare(gen_code)",
        ),
    ),
    *of_file(
        "mmrecoder_jax/env/child/long_texts.py",
        ["tests/benchmarks/test_plot2code.py"],
        ("records: long texts", "hexdigest()", "hexdigest()[:0]"),
    ),
    *of_file(
        "mmrecoder_jax/benchmarks/plot2code.py",
        ["tests/benchmarks/test_plot2code.py"],
        ("plot2code: fig1", "record.fig1 or target", "target"),
    ),
    *of_file(
        "mmrecoder_jax/env/child/plot2code_recorder.py",
        ["tests/benchmarks/test_plot2code.py"],
        ("plot2code: the figure before the last", "    plt.cla()\n    plt.clf()\n", ""),
    ),
    *of_file(
        "mmrecoder_jax/env/setup.py",
        ["tests/env/test_setup.py"],
        ("env.setup: another's folder", "not mark.is_file() and not _is_empty(out)", "False"),
        ("env.setup: ready", "if is_ready(program):", "if program.exists():"),
    ),
    *of_file(
        "mmrecoder_jax/monitoring/alarms.py",
        ["tests/monitoring/test_alarms.py"],
        ("alarms: the mean of several steps", "statistics.fmean(window)", "window[-1]"),
        ("alarms: the worst turn", "else max(means)", "else means[0]"),
        ("alarms: a fall", "mean = first_mean - mean", "pass"),
        ("alarms: the first mean", "self._first_mean.setdefault(metric, mean)", "mean"),
        ("alarms: below", "value < threshold if MONITORS[name].below else", ""),
        ("alarms: earlier steps of others", 'if row["stage"] == self._stage:', "if True:"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/server.py",
        ["tests/reporting/test_server.py"],
        ("watch: other hosts", 'if self.headers.get("Host", "") not in', "if False not in"),
        ("watch: pages of others", 'if self.headers.get("Sec-Fetch-Site", "none")', "if 'none'"),
        ("watch: paths that lead out", "not place.is_relative_to(self.workdir)", "False"),
        ("watch: pictures alone", 'place.suffix != ".png"', "False"),
        ("watch: one server a port", "socket.SO_REUSEADDR, 0", "socket.SO_REUSEADDR, 1"),
        ("watch: something new", "or state != self._state", ""),
    ),
    *of_file(
        "mmrecoder_jax/reporting/page.py",
        ["tests/reporting/test_page.py"],
        ("report: the end of a script element", r'text.replace("<", "\\u003c")', "text"),
        ("report: its own script alone", 'f"script-src {_hash(script)}', "f\"script-src 'self'"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/trajectories.py",
        ["tests/reporting/test_trajectories.py"],
        (
            "report: names of pictures",
            "name is None or not _PICTURE.fullmatch(name)",
            "name is None",
        ),
        ("report: tokens of a long turn", "turn.tokens[:MAX_TOKENS]", "turn.tokens"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/verdict.py",
        ["tests/reporting/test_verdict.py"],
        ("report: the interval decides", "better if low > 0", "better if high > 0"),
        ("report: pairs of charts", "after[chart] - before[chart]", "after[chart]"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/report.py",
        ["tests/reporting/test_report.py"],
        ("report: somebody else's folder", "    _check_ours(folder)\n", ""),
        ("report: trajectories at most", "min(_count(written), left, ", "min(_count(written), "),
    ),
    *of_file(
        "mmrecoder_jax/replay.py",
        ["tests/test_replay.py"],
        ("replay: written in parts", "    if first != last:", "    if False:"),
        ("replay: of a server", 'if config.engine.kind != "sampler":', "if False:"),
        ("replay: pixels", "int((before != image).any(axis=-1).sum())", "0"),
        ("replay: the group's number", "Again(again[member], ", "Again(again[0], "),
        ("replay: as many devices", "if math.prod(axes) == devices:", "if True:"),
        ("replay: a tie", "max(ROUNDING, 2 * moved)", "math.inf"),
        ("replay: how rounding moved", "max(ROUNDING, 2 * moved)", "ROUNDING"),
        ("replay: shown before", "if not _was_shown_the_same(", "if False and (lambda *_: 0)("),
    ),
    *of_file(
        "mmrecoder_jax/sft.py",
        ["tests/test_sft.py"],
        ("questions: places of supervised rows", "questions.places(own)", "own"),
    ),
    *of_file(
        "mmrecoder_jax/drawing/open.py",
        ["tests/test_generate.py"],
        ("generate: the judge's flags", "max_failures=8, remedy=remedy", "max_failures=8"),
    ),
    *of_file(
        "mmrecoder_jax/data/panels.py",
        ["tests/data/test_panels.py"],
        ("panels: columns first", "return [moved, *found]", "return [*found, moved]"),
        ("panels: kinds differ", "ours.keys() != right.keys()", "False"),
        ("panels: too many", "if len(found) > MOST_NAMED:", "if False:"),
        ("panels: worked out", "={right}", "={ours}"),
    ),
    *of_file(
        "mmrecoder_jax/exam/announcements.py",
        ["tests/exam/test_announcements.py"],
        ("announced moves: held against the code", "if move not in made]", "if False]"),
        ("announced moves: none", "if move != panels.UNMOVED]", "if True]"),
        ("announced moves: what a sum comes to", "move = int(after) -", "move = 2 -"),
    ),
    *of_file(
        "mmrecoder_jax/data/self_correction.py",
        ["tests/data/test_self_correction.py"],
        ("dialogues.later: share", "later_share and rng.random() < later_share", "later_share"),
    ),
    *of_file(
        "mmrecoder_jax/exam/tasks.py",
        ["tests/exam/test_tasks.py"],
        ("exam: grammar of toys", "GRAMMARS[question.grammar].RC", 'GRAMMARS["words"].RC'),
    ),
    *of_file(
        "mmrecoder_jax/exam/command.py",
        ["tests/exam/test_command.py::test_a_policy_of_another_grammar_is_refused"],
        ("exam: grammar", 'drawn not in ("", question.grammar):', "False:"),
    ),
    *of_file(
        "mmrecoder_jax/exam/command.py",
        ["tests/exam/test_command.py::test_answers_of_a_server_have_the_style_of_the_charts"],
        ("exam: style", "config.data.grammar = grammar or config.data.grammar", "pass"),
    ),
    *of_file(
        "scripts/experiment.py",
        ["tests/scripts/test_table2.py::test_full_scores_of_what_is_mended_and_repeated"],
        ("table: mended", "counted & ~is_full[:, 0], is_full", "counted, is_full"),
        ("table: a mended crash", "counted & ~is_full[:, 0], is_full", "~is_full[:, 0], is_full"),
        ("table: right repeats", "counted & repeats, is_full", "counted, is_full"),
        ("table: repeated crashes", "counted & repeats, is_full", "repeats, is_full"),
        ("table: rounded full scores", "FULL_SCORE = 1 - 1e-6", "FULL_SCORE = 1"),
    ),
    *of_file(
        "scripts/make_boxed.py",
        ["tests/scripts/test_make_boxed.py"],
        ("box: grammar", "grammar = GRAMMARS[name]", 'grammar = GRAMMARS["words"]'),
        ("box: verdicts", "HELPS, HARMS, NO_SIGN)", "NO_SIGN, HARMS, NO_SIGN)"),
        ("box: fields between stages", "all(values_agree(*pair) for", "all(True for"),
        ("box: fields of a stage", 'else f"stages.{stage}.{name}": values', "else name: values"),
        ("box: the stage before", 'if before else ""', 'if False else ""'),
        ("box: policies of no grammar", "if saved_grammar(saved) not in GRAMMARS:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/replay.py",
        ["tests/test_replay.py::test_a_run_from_before_there_were_grammars_is_of_words"],
        ("replay: grammar", "saved_grammar(saved) or config.data.grammar", "config.data.grammar"),
    ),
    *of_file(
        "mmrecoder_jax/prepare.py",
        ["tests/test_prepare.py"],
        ("grammar: real charts", 'if data.kind != "synthetic" or not', "if not"),
        ("grammar: anything goes", 'if theirs not in ("", data.grammar):', "if False:"),
        ("grammar: in find_source", "    check_grammar(config)\n", ""),
        ("grammar: of charts", 'if drawn not in ("", data.grammar):', "if False:"),
        ("grammar: exported ones", "(SETTINGS_FILE, TRAINING_FILE)", "(SETTINGS_FILE,)"),
    ),
    *of_file(
        "mmrecoder_jax/pipeline.py",
        ["tests/test_prepare.py"],
        ("grammar: of a pipeline", "    check_grammar(config)\n", ""),
    ),
    *of_file(
        "mmrecoder_jax/config.py",
        ["tests/test_prepare.py"],
        ("grammar: before there were two", '"data.grammar") or "words"', '"data.grammar") or ""'),
        ("grammar: policies of real charts", '"data.kind") != "synthetic":', '"data.kind") == 1:'),
    ),
    *of_file(
        "mmrecoder_jax/reporting/card.py",
        ["tests/reporting/test_card.py"],
        ("card: cold start 1", 'if "image" not in config.feedback:', "if False:"),
        ("card: grammar", "GRAMMARS[name]\n", 'GRAMMARS["words"]\n'),
        ("card: charts of no grammar", 'name == "data.grammar" and', "False and"),
    ),
    *of_file(
        "mmrecoder_jax/drawing/open.py",
        ["tests/drawing/test_open.py"],
        ("author: grammar", '"data.kind", "data.grammar", ', '"data.kind", '),
        ("author: before there were grammars", 'fields["data.grammar"] = grammar', "pass"),
    ),
    *of_file(
        "mmrecoder_jax/rl/kept.py",
        ["tests/rl/test_kept.py"],
        ("trajectories: the bound", "if total <= most_bytes:", "if True:"),
        ("trajectories: the first step stays", "steps[1:-1]", "steps[:-1]"),
        (
            "trajectories: pictures go too",
            "shutil.rmtree(os.path.join(renders, step), ignore_errors=True)",
            "pass",
        ),
        ("trajectories: what a kill left", "set(_folders(renders)) - set(steps)", "()"),
    ),
    *of_file(
        "mmrecoder_jax/rl/rewards.py",
        ["tests/rl/test_rewards.py"],
        ("reward.alpha", PARTS, "0.5 - config.beta, 0.5, config.beta"),
        ("reward.beta", PARTS, "0.6 - config.alpha, config.alpha, 0.4"),
        ("reward.gamma", "if config.gamma:", "if False:"),
        ("reward.gamma: its size", "config.gamma * rewards", "1.0 * rewards"),
        (
            "reward.gamma: mean of all earlier turns",
            "rewards[..., :-1].mean(axis=-1)",
            "rewards[..., -2]",
        ),
        ("reward.eta", "if config.eta:", "if False:"),
        ("reward.eta: its size", "config.eta * np.where", "1.0 * np.where"),
        ("reward.eta: better, not equal", "last > before", "last >= before"),
        (
            "reward.eta: unscorable first turn",
            "np.where(np.isnan(before), np.nan, ",
            "np.where(False, 0, ",
        ),
        ("reward: one turn", "if rewards.shape[-1] == 1:", "if False:"),
        ("reward: part without weight", "counted = weights != 0", "counted = weights == weights"),
        ("check reward.alpha >= 0", "self.alpha < 0 or ", ""),
        ("check reward.beta >= 0", "self.beta < 0 or ", ""),
        ("check reward.alpha + reward.beta", " or self.alpha + self.beta > 1", ""),
    ),
    *of_file(
        "mmrecoder_jax/env/child/ink.py",
        ["tests/env/child/test_ink.py"],
        ("ink: least pixels", "left >= LEAST_PIXELS and ", ""),
        (
            "ink: later layers",
            "part.contrast * np.exp(self._through[part.where] - part.through)",
            "part.contrast",
        ),
        ("ink: hidden ground", "stays &= visible[part.ground]", "pass"),
        ("ink: on white", "if (alpha == 255).all():", "if True:"),
        ("ink: painted colours", "<= 1\n", "<= 999\n"),
    ),
    *of_file(
        "mmrecoder_jax/env/child/scene.py",
        ["tests/env/child/test_ink.py"],
        ("scene: a speck", "min(right - left, bottom - top) < _MIN_CHART_SIDE", "False"),
        ("scene: a corner", "< _MIN_CHART_SHARE * width * height", "< 0"),
    ),
    *of_file(
        "mmrecoder_jax/rl/rollout.py",
        ["tests/rl/test_judged_rollout.py"],
        ("replay: the best of a group", "if not asked:", "if True:"),
        ("replay: a group of one", "len(group) > 1 and ", ""),
    ),
    *of_file(
        "mmrecoder_jax/env/executor/beginning.py",
        ["tests/env/executor/test_beginning.py"],
        (
            "beginning: homes of users",
            "if is_pool and is_gone(descriptor):",
            "if is_gone(descriptor):",
        ),
    ),
    *of_file(
        "mmrecoder_jax/env/child/lettering.py",
        ["tests/env/child/test_ink.py"],
        ("texts: crossed", "if not (others and text.is_crossed(others)):", "if True:"),
        ("texts: faint ones", "and left[number].contrast > _FAINT * text.contrast", ""),
        ("texts: their shadows", "if left[number].s != text.s and", "if"),
        ("texts: their shape", "foreign & _grown(self.ink, ", "foreign | ~_grown(self.ink, "),
        ("texts: their ground", "return outline >= _OUTLINE", "return True or outline"),
        ("texts: what is left", "if int(np.count_nonzero(left)) < self.needed:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/env/child/display_list.py",
        ["tests/env/child/test_display_list.py"],
        (
            "replay: the record",
            'any(record[part] != shown[part] for part in ("layout", "types", "colors"))',
            "False",
        ),
    ),
    *of_file(
        "mmrecoder_jax/models/weights.py",
        ["tests/models/test_weights.py"],
        ("weights: not finite", "if not _finite(out[place]):", "if False:"),
        ("weights: zeros alone", "bool(x.size) and not x.any()", "False"),
        ("weights: zeros of a bias", 'name.endswith(".bias") or ', ""),
    ),
    *of_file(
        "mmrecoder_jax/models/adapters.py",
        ["tests/models/test_adapters.py"],
        ("peft: a matrix as it is written", "x.astype(np.float32).T", "x.astype(np.float32)"),
        ("peft: what it computes otherwise", "is not None and value not in plain", "is None"),
        ("peft: some layers alone", "set(places) != set(range(count)) or ", ""),
        ("peft: adapters beside weights", ' and not (directory / "config.json").exists()', ""),
        ("peft: other sizes", "elif tree[name].shape != value.shape:", "elif False:"),
    ),
    *of_file(
        "mmrecoder_jax/models/hub.py",
        ["tests/models/test_hub.py"],
        ("hub: a mistyped path", ' and not os.path.isdir(name.split("/")[0])', ""),
        ("hub: a directory of that name", "not os.path.exists(name) and ", ""),
    ),
    *of_file(
        "mmrecoder_jax/models/fast_tokenizer.py",
        ["tests/models/test_fast_tokenizer.py"],
        ("tokenizer.json: a byte's halves", "HALVES[byte // 16] + HALVES[byte % 16]", "HALVES[0]"),
        ("tokenizer.json: beyond ASCII", "map(_replace, shown + halved)", "map(_replace, halved)"),
    ),
    *of_file(
        "mmrecoder_jax/models/tokenizer.py",
        ["tests/models/test_tokenizer.py"],
        ("tokenizer: files copied", "*PUBLISHED_FILES, *TEMPLATE_FILES", "*PUBLISHED_FILES,"),
    ),
    *of_file(
        "mmrecoder_jax/models/export.py",
        ["tests/models/test_export.py"],
        (
            "export: a list of tokens",
            'isinstance(fields.get("extra_special_tokens"), list)',
            "False",
        ),
        (
            "export: a template that came along",
            'not brought and "chat_template" not in',
            '"x" not in',
        ),
    ),
    *of_file(
        "mmrecoder_jax/models/published.py",
        ["tests/models/test_published.py"],
        ("images of others", "if path.exists() or path.is_symlink():", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/rl/losses.py",
        ["tests/rl/test_losses.py"],
        ("rl.temperature: learner", "astype(jnp.float32) / temperature", "astype(jnp.float32)"),
        (
            "forbidden ids: learner",
            "logits = jnp.where(forbidden, -1e30, ",
            "logits = jnp.where(False, 0.0, ",
        ),
        ("rl.clip_low", "1.0 - options.clip_low", "1.0 - 0.2"),
        ("rl.clip_high", "1.0 + options.clip_high", "1.0 + 0.2"),
        ("rl.clip: the lower of the two", "jnp.minimum(whole, ", "jnp.minimum(9e9, "),
        ("rl.updates_per_batch: loss", "whole if old is None else", "whole if True else"),
        ("rl.kl_coef", "options.kl_coef * metrics", "0.0 * metrics"),
        ("rl.kl: k3", "jnp.exp(difference) - difference - 1.0", "-difference"),
        ("rl.kl: k2", "return difference**2 / 2", "return difference**2"),
        ("rl.objective: gspo", "if options.ratio is Ratio.GSPO:", "if False:"),
        ("rl.objective: gspo's mean", "totals / jnp.maximum(counts, 1.0)", "totals"),
        ("rl.objective: cispo", "if options.ratio is Ratio.CISPO:", "if False:"),
        ("rl.objective: cispo's gradient", "jax.lax.stop_gradient(clipped) *", "clipped *"),
        ("rl.clip_dual", "jnp.where(advantage < 0, options.clip_dual", "jnp.where(False, 1.0"),
        ("rl.entropy_coef", "options.entropy_coef * weighted_sum", "0.0 * weighted_sum"),
        ("rl.entropy_coef: gradient", "entropies if learns_entropy else", "None or"),
        ("ratio: gradient", "before = jax.lax.stop_gradient(logps) if", "before = logps if"),
        ("sft: weights", "return -weighted_sum(weights, logps)", "return -logps.sum()"),
    ),
    *of_file(
        "mmrecoder_jax/learner/cluster.py",
        ["tests/learner/test_cluster.py"],
        (
            "cluster: half of three",
            "if ADDRESS not in own or count is None or rank is None:",
            "if 0:",
        ),
        ("cluster: two counts", "count not in (None, launched.count)", "False"),
        ("cluster: launchers without an address", "if not launched.known:", "if False:"),
        ("cluster: slices", "len(names) * slices", "len(names)"),
        ("cluster: no step of Slurm", "if not _is_step(environ) and not rank:", "if False:"),
        ("cluster: the shell of salloc", 'environ.get("SLURM_STEP_NUM_TASKS") else', "None else"),
    ),
    *of_file(
        "mmrecoder_jax/learner/distributed.py",
        ["tests/learner/test_distributed.py"],
        ("hosts: rows dealt out", "jax.process_count() * np.arange(count)", "np.arange(count)"),
        ("hosts: failures of others", "        if text:\n", "        if False:\n"),
        (
            "hosts: exact sums",
            "    values = np.ascontiguousarray(values)",
            "    values = np.float32(values)",
        ),
        ("hosts: rows to leave out", "[order[by_number] >= 0]", ""),
        ("hosts: SIGTERM", 'jax.config.update("jax_enable_preemption_service", False)', "pass"),
        ("hosts: the lost one's name", "_Ending.watch.who_is_lost() if lost and", '"" if lost and'),
    ),
    *of_file(
        "mmrecoder_jax/rl/monitors.py",
        ["tests/learner/test_distributed.py"],
        ("hosts: metrics", "distributed.all_rows(x, numbers) for x in mine", "x for x in mine"),
        (
            "hosts: counts",
            "pool.total(distributed.gather_json(self._env.stats()))",
            "self._env.stats()",
        ),
    ),
    *of_file(
        "mmrecoder_jax/data/pipeline.py",
        ["tests/data/test_pipeline.py"],
        ("hosts: batches", "mixed[host::hosts]", "mixed[host::1]"),
        ("data.windows: rows", " and windows <= widest", ""),
    ),
    *of_file(
        "mmrecoder_jax/rl/rollout.py",
        ["tests/rl/test_rollout.py"],
        ("oversized: windows", "if widest > max(self.spec.windows):", "if False:"),
        ("oversized: tokens", "return tokens <= self.spec.feedback_length", "return True"),
        ("refused: windows", "if windows > max(self.spec.windows):", "if False:"),
        ("refused: prompt", "if tokens > length:", "if False:"),
        (
            "refused: feedback",
            "if turns > 1 and not self.feedback_fits([first] * self.spec.pictures):",
            "if False:",
        ),
        ("oversized: beside the difference", "if self.spec.pictures > 1:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/accounts.py",
        ["tests/test_accounts.py"],
        ("prompts: feedback", "length = max(length, feedback - room + rl.prompt_length)", "pass"),
    ),
    *of_file(
        "mmrecoder_jax/rl/judge/local.py",
        ["tests/rl/judge/test_local.py"],
        ("judge: windows", "if max(windows) > max(self._windows):", "if False:"),
        (
            "judge: not its failure",
            "return problem, with_target <= self._prompt_length",
            "return problem, False",
        ),
    ),
    *of_file(
        "mmrecoder_jax/env/chartmimic.py",
        ["tests/env/test_chartmimic.py"],
        ("colours: one table", "if len(a) * len(b) <= _EXACT_PAIRS:", "if True:"),
        (
            "colours: memory",
            "rows = max(1, _ROWS_TIMES_COLUMNS // max(1, len(lab_b)))",
            "rows = 9999",
        ),
        ("colours: colormaps", "total += (our_names & their_names).total() +", "total +="),
        ("colours: lightness", "side[np.lexsort(side.T[::-1])]", "side"),
    ),
    *of_file(
        "mmrecoder_jax/rl/judge/answers.py",
        ["tests/rl/judge/test_answers.py"],
        ("judge: two answers", "(name, points) != points:", "(name, points) < 0:"),
        ("judge: long answers", "if len(answer) > LONGEST:", "if False:"),
        ("judge: another maximum", "or _float(match[2]) != most", ""),
        ("judge: a minus", "if last in _DASHES:", "if False:"),
        ("judge: what is counted", "if (counts and", "if (False and"),
        ("judge: a key twice", "if len(value) < len(pairs):", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/rl/judge/differences.py",
        ["tests/rl/judge/test_differences.py"],
        ("judge: severities", "severity not in _SEVERITIES", "severity is None"),
        ("judge: categories", "if name not in CATEGORIES:", "if False:"),
        ("judge: counts of differences", "if not errors and any(", "if False and any("),
        (
            "judge: words around differences",
            "whole_object(said(answer))",
            "whole_object(said(answer)[answer.find('{') : answer.rfind('}') + 1])",
        ),
    ),
    *of_file(
        "mmrecoder_jax/rl/served/dialects.py",
        [
            "tests/rl/test_served.py::test_what_cannot_be_a_response",
            "tests/rl/test_served.py::test_ends_and_stop_sequences",
            "tests/rl/test_served.py::test_a_picture_is_one_placeholder_and_has_a_name_per_policy",
            "tests/rl/test_served.py::test_a_question_bends_no_probability_and_forbids_ids",
            "tests/rl/test_served.py::test_vllm_says_which_prompt_it_read",
        ],
        ("served: forbidden ids", "if token in never:", "if False:"),
        ("served: ids", "if type(token) is not int or not 0 <= token < vocab_size:", "if False:"),
        ("served: log-probabilities", "or not math.isfinite(logp) or", "or"),
        ("served: their number", "if len(logps) != len(ids):", "if False:"),
        ("served: behind the end", "if ends and ends[0] != len(ids) - 1:", "if False:"),
        ("served: no end", "if not ends and len(ids) < question.limit:", "if False:"),
        ("served: rl.stop", "    if not ends:\n", "    if ends:\n"),
        ("served: another prompt", "if seen != question.ids.tolist():", "if False:"),
        ("served: its length", "if count != len(question.ids):", "if False:"),
        ("served: names of pictures", 'f"{version} {self.name}"', "self.name"),
        ("served: placeholders", "self.ids[~again].tolist()", "self.ids.tolist()"),
        ("served: bias", "{str(token): FORBIDDEN_BIAS for token in spec.forbidden}", "{}"),
    ),
    *of_file(
        "mmrecoder_jax/rl/served/dialects.py",
        ["tests/rl/test_served.py::test_a_wrong_answer_is_no_response"],
        ("served: weights of another", "if version != question.version:", "if False:"),
        (
            "served: ids beside log-probabilities",
            "if ids != [triple[1] for triple in triples]:",
            "if False:",
        ),
    ),
    *of_file(
        "mmrecoder_jax/rl/served/run.py",
        [
            "tests/rl/test_served.py::test_a_changed_policy_is_loaded_and_one_that_is_not_is_not",
            "tests/rl/test_served.py::test_features_of_a_frozen_tower_are_there_for_the_learner",
            "tests/rl/test_served.py::test_a_failed_question_ends_those_that_wait",
            "tests/rl/test_served.py::test_a_slow_response_holds_up_nobody",
            "tests/rl/test_served.py::test_responses_rest_and_are_finished_in_a_later_rollout",
        ],
        ("served: a policy is loaded once", "if distributed.main_says(known):", "if False:"),
        ("served: a changed policy", "if distributed.main_says(known):", "if self._loaded:"),
        ("served: features of the tower", "if self._engine.tower is not None:", "if False:"),
        ("served: others that wait", "finally:  # threads would", "except KeyError:  # threads"),
        ("served: scripts and the server", "WAIT_SECONDS if", "None if"),
        ("served: rl.partial", "talk.limit(self._longest, self._budget)", "self._longest"),
    ),
    *of_file(
        "mmrecoder_jax/rl/served/files.py",
        [
            "tests/rl/test_served.py::test_two_policies_stay_on_disk",
            "tests/rl/test_served.py::test_adapters_are_merged",
        ],
        ("served: old policies", "[:-KEPT]", "[:0]"),
        ("served: killed while writing", "shutil.rmtree(left)", "pass"),
        ("served: adapters", "if self._sizes.lora.rank:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/checks.py",
        ["tests/test_checks.py"],
        ("engine: what is left of a cut", "if rl[name] != off:", "if False:"),
        ("engine: small pictures", "if config.processor.min_pixels < least:", "if False:"),
    ),
    of_field("engine.kind", "if kind is EngineKind.SAMPLER:", "if True:", "rl/served/make"),
    of_field(
        "engine.url", '"engine",\n        engine.url', '"engine",\n        ""', "rl/served/make"
    ),
    of_field("engine.key_variable", "engine.key_variable,", '"",', "rl/served/make"),
    of_field("engine.timeout_seconds", "engine.timeout_seconds,", "1.0,", "rl/served/make"),
    of_field("engine.retries", "engine.retries,", "0,", "rl/served/make"),
    of_field("engine.in_flight", "engine.in_flight, files", "7, files", "rl/served/make"),
    *of_file(
        "mmrecoder_jax/rl/web.py",
        ["tests/rl/judge/test_http.py"],
        ("judge: its key in messages", "length = min(_TELLING, len(self._key))", "length = 0"),
        ("judge: its key in a header", 'if not "!" <= sign <= "~":', "if False:"),
        ("judge: a key as a variable", "if value and not _VARIABLE.fullmatch(value):", "if False:"),
        ("judge: secrets in an address", 'if any(sign in value for sign in "@?#"):', "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/rl/judge/http.py",
        ["tests/rl/judge/test_http.py"],
        ("judge: a cut answer", "if reply.cut and whole:", "if False:"),
        ("judge: parts of an answer", "if isinstance(content, list):", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/drawing/choosing.py",
        ["tests/drawing/test_choosing.py"],
        ("drawing: what does not run", "if one.execution.image is not None", "if True"),
        ("drawing: one sample alone", "if select == Select.LAST and samples > 1:", "if False:"),
        (
            "drawing: unscored by the judge",
            "return -1.0 if math.isnan(score)",
            "return 2.0 if False",
        ),
    ),
    *of_file(
        "mmrecoder_jax/drawing/folder.py",
        ["tests/drawing/test_folder.py"],
        (
            "drawing: made otherwise",
            'if row is None or row["settings"] != self',
            "if row is None and self",
        ),
        ("drawing: another chart's folder", "if owner in (None, mine):", "if True:"),
        ("drawing: what is not ours", "if row is None and place.exists():", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/drawing/pictures.py",
        ["tests/drawing/test_pictures.py"],
        (
            "drawing: files that are none",
            "if not stat.S_ISREG(os.stat(path).st_mode):",
            "if False:",
        ),
        ("drawing: large files", "if len(data) > MOST_BYTES:", "if False:"),
        ("drawing: large pictures", "if pixels <= MOST_PIXELS:", "if True:"),
    ),
    *of_file(
        "mmrecoder_jax/drawing/server.py",
        ["tests/drawing/test_server.py"],
        ("server: a refusal ends it", "if problem.fatal or in_a_row", "if in_a_row"),
        ("server: answers that are missing", "        if failures:\n", "        if False:\n"),
        ("server: seeds of their own", "+ sample * 31", "+ 0"),
    ),
    *of_file(
        "mmrecoder_jax/drawing/studio.py",
        ["tests/drawing/test_studio.py"],
        ("studio: a lock", "with self._lock:\n            turn", "if True:\n            turn"),
        ("studio: the most turns", "if len(visit.steps) >= MOST_TURNS:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/env/chartmimic.py",
        ["tests/env/test_chartmimic.py::test_without_a_target_there_is_no_score"],
        ("scores: of no target", "dict.fromkeys(Part, math.nan)", "dict.fromkeys(Part, 0.0)"),
    ),
    *of_file(
        "mmrecoder_jax/rl/judge/base.py",
        ["tests/rl/judge/test_base.py"],
        ("judge: verdicts on disk", "or not 0 <= value <= most:", "or False:"),
        (
            "judge: scores out of range",
            "is not None and not 0 <= found.score <= 1:",
            "is None and 0:",
        ),
        ("judge: verdicts in memory", "if len(self._known) > _MOST_KNOWN:", "if False:"),
        ("judge: size of its files", "+ len(line) > _LARGEST_FILE:", "< 0:"),
        ("judge: a full disk", "except OSError:  # the disk", "except KeyError:  # the disk"),
        ("judge: a pipe as a file", "if not stat.S_ISREG(os.stat(path).st_mode):", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/data/self_correction.py",
        ["tests/data/test_self_correction.py"],
        (
            "dialogues: figures",
            "shown(execution, draft.chart)",
            "execution",
        ),
        ("dialogues: pools", "((synthetic, references), (policy, pool))", "((drafts, pool),)"),
    ),
    *of_file(
        "mmrecoder_jax/rl/advantages.py",
        ["tests/rl/test_advantages.py"],
        ("rl.std_ddof", "count - ddof", "count - 1"),
        ("rl.std_eps", "jnp.sqrt(variance) + eps", "jnp.sqrt(variance) + 1e-6"),
        ("rl.advantage: mean", "advantages = centred\n", "advantages = 2 * centred\n"),
        ("rl.advantage: rloo", "centred * count / jnp.maximum(count - 1, 1)", "centred"),
        ("unscorable: baseline", "rewards = jnp.where(scorable, rewards, 0.0)", "pass"),
        ("unscorable: advantage", "jnp.where(scorable, rewards - mean, 0.0)", "rewards - mean"),
        ("unscorable: silence", "jnp.where(scorable, rewards, jnp.inf)", "rewards"),
        ("silent groups", "(count < 2) | (highest <= lowest)", "(count < 2)"),
    ),
    *of_file(
        "mmrecoder_jax/data/batching.py",
        ["tests/data/test_batching.py"],
        ("rl.aggregation: token_mean", "max(total_tokens, 1.0)", "max(total_rows, 1.0)"),
        ("rl.aggregation: sequence_mean", "max(row.loss_tokens(), 1) * max(", "max("),
        ("rl.aggregation: constant", "max_tokens * max(total_rows", "max(total_rows"),
        ("check rl.aggregation", 'if aggregation == "constant":', "if True:"),
        ("loss mask by turn", "piece.turn in row.loss_turns)", "True)"),
        ("distinct: what carries loss is not shared", "if shown else None", ""),
        (
            "distinct: behind what was shared alone",
            "(node, id(piece))) if shown",
            "(-1, id(piece))) if shown",
        ),
        ("packed: parents", "np.concatenate([[-1], slots[:-1]])", "slots - 1"),
        ("packed: homes", "r * size.length + np.arange", "np.arange"),
        ("packed: advantages", "= advantages(row)[new]", "= part[0][0].advantage"),
        ("packed: sequences", '["sequence"][here] = r', '["sequence"][here] = 0'),
        ("train.micro_tokens: refused", "if shape.budget and longest > shape.budget", "if False"),
        ("train.micro_tokens: T", "self.shape.budget or token_bucket", "token_bucket"),
        ("train.micro_tokens: full parts", "held.count + held.cost(row) <= budget", "True"),
        (
            "train.micro_tokens: what is in common",
            "cost += len(piece.ids) * (known is None)",
            "cost += len(piece.ids)",
        ),
        ("parts: images", "len(more) <= room.images", "True"),
    ),
    *of_file(
        "mmrecoder_jax/data/dealing.py",
        ["tests/data/test_dealing.py"],
        ("parts: the fewest tokens", "fits[held[fits, 2].argmin()]", "fits[0]"),
        ("parts: the largest first", "-u.tokens, u.numbers)", "u.numbers)"),
        ("parts: evened", "    _even(sizes, where, held, most)\n", ""),
        (
            "parts: evened within rows",
            "allowed &= (held[where] + less <= most).all(axis=1)",
            "pass",
        ),
    ),
    *of_file(
        "mmrecoder_jax/learner/update.py",
        ["tests/learner/test_update.py"],
        ("optim.lr", "    lr = optim.lr\n", "    lr = 1e-6\n"),
        ("optim.warmup_steps", "/ max(warmup, 1), 1.0)", "/ 1, 1.0)"),
        ("optim.warmup_steps: the first step", "(count + 1) / max(", "count / max("),
        ("optim.warmup_steps: cosine", "jnp.maximum(count - warmup, 0)", "count"),
        (
            "optim.schedule: cosine",
            "cosine_decay_schedule(lr, steps, ",
            "constant_schedule(lr) or (0, ",
        ),
        ("optim.schedule: its end", "LAST = 0.1", "LAST = 0.0"),
        (
            "optim.schedule: linear",
            "linear_schedule(lr, LAST * lr, steps)",
            "constant_schedule(lr)",
        ),
        ("optim.decay_share", "optim.decay_share * steps", "0.2 * steps"),
        ("optim.decay_share: the end", "[steps - decay]", "[0]"),
        ("norms of parts", '"vision" if names[0] == "visual" else', '"decoder" if True else'),
        ("optim.schedule: cosine's length", "max(total_steps - warmup, 1)", "total_steps"),
        ("optim.patch_embed_lr", "optax.scale(optim.patch_embed_lr)", "optax.scale(1.0)"),
        ("optim.clip", "optax.clip_by_global_norm(optim.clip)", "optax.identity()"),
        ("optim.clip: its size", "by_global_norm(optim.clip)", "by_global_norm(1.0)"),
        ("optim.b1", "= optim.b1, optim", "= 0.9, optim"),
        ("optim.b2", " optim.b2, optim.weight", " 0.95, optim.weight"),
        ("optim.weight_decay", ", optim.weight_decay\n", ", 0.0\n"),
        (
            "optim.weight_decay: kernels alone",
            "return optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mask=decayed)",
            "return optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay)",
        ),
        (
            "optim.decay",
            "re.search(optim.decay, path_name(path))",
            're.search("kernel$", path_name(path))',
        ),
        ("optim.ema", "decay * mean + (1 - decay) * (", "0 * mean + ("),
        ("optim.rounding: by chance", "bits + jax.random.bits(", "bits + 0 * jax.random.bits("),
        ("optim.rounding: sums", "jnp.promote_types(kind, jnp.float32)", "kind"),
        ("optim.name: muon takes matrices alone", 'r"(layers|blocks)/.*kernel$"', '"."'),
        ("optim.name: muon of three axes", 'path_name(path).endswith("attn/qkv/kernel")', "False"),
        ("optim.name: muon's size", "consistent_rms=0.2", "consistent_rms=None"),
        ("optim.name: adafactor's momentum", "optax.ema(b1, debias=False)", "optax.identity()"),
        (
            "optim.name: where moments are",
            "return where if shape == leaf.shape else copied",
            "return copied",
        ),
        (
            "train.micro_batch_size: gradients add up",
            "jax.tree.map(jnp.add, total[0], grads)",
            "grads",
        ),
        ("rl.max_logp_gap: update", "good &= metrics[name] <= limit", "pass"),
        ("metrics: the largest", 'jnp.maximum if name.endswith("_max") else jnp.add', "jnp.add"),
        ("frozen: moments", "tx.init(split(params, trained)[0])", "tx.init(params)"),
        ("skipped: a loss that is not finite", 'jnp.isfinite(metrics["loss"]) & ', ""),
        ("skipped: a gradient that is not finite", " & jnp.isfinite(grad_norm)", ""),
        ("skipped: moments", "opt_state = taken(opt_state, state.opt_state)", "pass"),
        ("skipped: the schedule", "_schedule(_count(state.opt_state))", "_schedule(state.step)"),
    ),
    *of_file(
        "mmrecoder_jax/loop.py",
        ["tests/test_loop.py"],
        ("optim.max_skipped", "if self._skipped_in_row >= limit:", "if False:"),
        ("alarms: of a resumed run", "alarms.resume(read_metrics(self._writer.path))", "pass"),
        ("alarms: rows of steps taken again", "file.rewind(config.stage, self._first - 1)", "pass"),
        ("optim.max_skipped: short stages", ", self._steps * self._updates_per_step)", ", 10**9)"),
        ("skipped: in a row", "self._skipped_in_row + 1 if skipped else 0", "skipped"),
        (
            "skipped: nothing is saved",
            "(due and not self._skipped_in_row)",
            "due",
        ),
        ("skipped: saved afterwards", "self._save_due |= step", "self._save_due = step"),
        ("skipped: means of the line", "if skipped:  # or", "if False:  # or"),
    ),
    *of_file(
        "mmrecoder_jax/rl/losses.py",
        ["tests/rl/test_losses.py"],
        ("no weight: policy", "    logps = of_weighted(weights, logps)\n", ""),
        ("no weight: old policy", "else of_weighted(weights, old)", "else old"),
        ("no weight: reference", "of_weighted(weights, tokens.ref_logps)", "tokens.ref_logps"),
        ("no weight: sum", "(weights * of_weighted(weights, values))", "(weights * values)"),
        ("importance: cut", "jnp.minimum(ratio, largest)", "ratio"),
        ("importance: a number", "importance = jax.lax.stop_gradient(", "importance = ("),
        (
            "importance: in the loss",
            "objective * of_weighted(weights, tokens.importance)",
            "objective",
        ),
        ("importance: share that is cut", "(ratio > largest)", "(ratio > 0)"),
    ),
    *of_file(
        "mmrecoder_jax/rl/step_rollouts.py",
        ["tests/rl/test_step_rollouts.py"],
        ("partial: before a checkpoint", "0 if step == course.next_save(step) else ", ""),
        ("partial: nothing to train on", "run(groups if alone else [], 0, None)", "pass"),
        ("partial: places", "self._slots[i] = _Slot()\n", "pass\n"),
        (
            "ahead: before a checkpoint",
            "rl.ahead - 1, self._course.next_save(step)",
            "rl.ahead - 1",
        ),
        ("ahead: how far", "step + self._rl.ahead - 1", "step"),
        ("staleness", "step - 1 - policy", "0.0"),
        ("off-policy: a server", ' or config.engine.kind != "sampler"', ""),
    ),
    *of_file(
        "mmrecoder_jax/rl/conversations.py",
        ["tests/rl/test_conversations.py", "tests/rl/test_rollout.py"],
        (
            "rows: what is read again",
            "free.pop(), talk.group.read, 0, 0",
            "free.pop(), talk.read, 0, 0",
        ),
        ("partial: budget", "min(whole, begun + budget) if budget", "min(whole, budget) if budget"),
    ),
    *of_file(
        "mmrecoder_jax/models/attention.py",
        ["tests/models/test_attention.py"],
        ("kernels: lengths in multiples of 128", "if whole and tiles and", "if whole and"),
        ("kernels: keys in multiples of 128", " and slots % LANES == 0", ""),
        ("kernels: queries in multiples of 128", "tiles = length % LANES == 0 and ", "tiles = "),
        ("attention: parts", "min(MOST_PARTS, length // LEAST_PART)", "1"),
        ("attention: keys of a part", "causal_from + queries.stop)", "causal_from + first + 1)"),
        ("attention: start of a part", "causal_from + first\n", "causal_from\n"),
        ("attention: mask", "jnp.where(mask, jnp.float32(0), MASKED)", "0 * mask"),
    ),
    *of_file(
        "mmrecoder_jax/models/decoding.py",
        ["tests/models/test_decoding.py"],
        ("decoding: slots of a row", "rows.own_lengths + live, *bounds[1]", "slots, *bounds[1]"),
        ("decoding: slots of a prefix", "rows.prefix_lengths, *bounds[0]", "9, *bounds[0]"),
        (
            "decoding: rows that stand still",
            "jnp.where(live, rows.own_lengths, slots)",
            "rows.own_lengths",
        ),
        ("decoding: shares", "jax.nn.sigmoid(total - total_before)", "0.5 * jnp.ones_like(total)"),
        ("decoding: way back", "[rows.place]", "[jnp.arange(b)]"),
    ),
    *of_file(
        "mmrecoder_jax/rl/sampler.py",
        ["tests/rl/test_sampler.py"],
        ("rl.temperature: sampler", "logits / jnp.where(greedy, 1.0, temperature)", "logits"),
        ("rl.top_k: sampler", "0 < spec.top_k <", "0 < 0 <"),
        ("rl.top_p: sampler", "if spec.top_p < 1.0:", "if False:"),
        ("rl.min_p: sampler", "if spec.min_p > 0.0:", "if False:"),
        ("rl.stop: sampler", "for stop in spec.stop:", "for stop in ():"),
        ("sampler: forbidden ids", "jnp.where(forbidden, MASKED, ", "jnp.where(False, MASKED, "),
    ),
    *of_file(
        "mmrecoder_jax/models/vision.py",
        ["tests/models/test_attention.py"],
        ("padding is a segment", "v, segments, segments,", "v, jnp.ones_like(segments), segments,"),
    ),
    *of_file(
        "mmrecoder_jax/learner/selfcheck.py",
        ["tests/learner/test_selfcheck.py"],
        ("self-check: wrong kernels", "return self.error <= self.allowed", "return True"),
        ("self-check: NaN", "return self.error <= self.allowed", "return not self.error > 1"),
        ("self-check: by name", "config.model.attention != Kernel.AUTO:", "False:"),
        ("self-check: plain matmuls", "if plain or config.model", "if config.model"),
        ("self-check: falls back", "config.model.attention = str(Kernel.XLA)", "pass"),
    ),
    *of_file(
        "mmrecoder_jax/models/qwen2_5_vl.py",
        ["tests/learner/test_init.py"],
        ("blank paper is zero at first", "WHITE = 0.5", "WHITE = 0.0"),
    ),
    *of_file(
        "mmrecoder_jax/resume.py",
        ["tests/test_loop.py"],
        ("resume: refusal", "    if not accept:", "    if False:"),
        ("resume: acceptance", "    if not accept:", "    if True:"),
        ("resume: fields", 'now["fields"][name] != value', "False"),
        ("resume: digests", 'now["digests"][name] != value', "False"),
    ),
    *of_file(
        "mmrecoder_jax/checks.py",
        ["tests/test_checks.py"],
        ("check processor.max_pixels", "if most < cell:", "if False:"),
        ("check processor.min_pixels", "if least > most:", "if False:"),
        ("check data.windows", "if max(config.data.windows) < needed:", "if False:"),
        ("check rl.turns of stage 1", 'config.stage == "stage1" and rl.turns < 2', "False"),
        ("check data.lengths", "if max(config.data.lengths) < needed:", "if False:"),
        ("check reward.beta", 'reward.beta and reward.judge == "none"', "False"),
        ("check the reward's weights", "reward.alpha + reward.beta > 1:", "False:"),
    ),
    *of_file(
        "mmrecoder_jax/fields.py",
        ["tests/test_fields.py"],
        ("check fields: least", "self.least <= value <= self.most", "value <= self.most"),
        ("check fields: most", "self.least <= value <= self.most", "self.least <= value"),
        ("check fields: above", "self.above < value < self.below", "value < self.below"),
        ("check fields: below", "self.above < value < self.below", "self.above < value"),
        ("check fields: infinity", "inside and math.isfinite(value)", "inside"),
        ("check fields: true is no number", "isinstance(value, bool) or not", "not"),
        ("check fields: buckets grow", "list(value) != sorted(set(value))", "False"),
        ("check fields: empty texts", "if not value.strip():", "if False:"),
        ("check fields: addresses", "    check_local_path(field, value)", "    pass"),
        (
            "check fields: of pipelines",
            'if field.startswith("stages.") else field',
            "if 0 else field",
        ),
        ("check fields: those that are lacking", "if lacking:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/config.py",
        ["tests/test_command.py"],
        ("paths: addresses", "if _ADDRESS.match(path):", "if False:"),
        ("paths: home", 'if path.startswith("~"):', "if False:"),
        ("paths: below a file", "if not os.path.isdir(place):", "if False:"),
        ("paths: rights", "if not os.access(place, os.W_OK | os.X_OK):", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/config.py",
        ["tests/test_places.py", "tests/test_config.py"],
        ("paths: other addresses", "check_local_path(name, path, _PLACES)", "pass"),
        ("nearest fields: other sections", "return same or found[:3]", "return found[:3]"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/curves.py",
        ["tests/reporting/test_curves.py"],
        ("curves: colours of turns", "name: int(name[4:]) - 1 for", "name: 0 for"),
        ("curves: still panels", "row[name] == 0 for row", "False for row"),
        ("curves: alarms of still panels", "names, ringing\n    )", "names, {}\n    )"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/verdict.py",
        ["tests/reporting/test_verdict.py"],
        (
            "verdict: first turns of charts",
            "or (interval := bootstrap(changes))[1] >= 0:",
            "or True:",
        ),
        ("verdict: first turns of steps", "or _difference(*parts)[1] >= 0:", "or True:"),
        (
            "verdict: sampled answers beside",
            'sampled = _paired(first, last, turn, "sampled")',
            "sampled = _paired(first, last, turn)",
        ),
        (
            "verdict: sampled second turns beside",
            'sampled = _rows(evaluated[-1], "sampled")',
            "sampled = _greedy(evaluated[-1])",
        ),
    ),
    *of_file(
        "mmrecoder_jax/learner/heartbeat.py",
        ["tests/learner/test_heartbeat.py"],
        ("heartbeats: names at once", "self._met.is_set() else _FIRST", "True else _FIRST"),
        ("heartbeats: meeting", "self._met.wait(self._seconds)", "pass"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/svg.py",
        ["tests/reporting/test_svg.py"],
        ("curves: rounding", "if high - low < FLAT *", "if high - low < 0 *"),
    ),
    *of_file(
        "mmrecoder_jax/env/wire.py",
        ["tests/env/test_wire.py"],
        ("results: memory is given back", "self._memory.madvise(mmap.MADV_DONTNEED)", "pass"),
        ("results: bounds of their parts", "too_long = claim > MAX_CLAIM_BYTES or", "too_long ="),
        (
            "results: bound of the whole",
            "return too_long or self._length > self._bound()",
            "return too_long",
        ),
    ),
    *of_file(
        "mmrecoder_jax/env/sandbox/syscalls.py",
        ["tests/env/sandbox/test_syscalls.py"],
        ("quota: O_TMPFILE", "os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)", "os.O_CREAT"),
        ("quota: fallocate", ', "fallocate": 3}', "}"),
        (
            "quota: the result's descriptor",
            '"dup2": _from(_FIRST_FREE, 1, _ALLOW, in_vain)',
            '"dup2": _from(0, 1, _ALLOW, in_vain)',
        ),
        (
            "quota: shared mappings",
            "(_JUMP_SET, 0, 1, _MAP_SHARED)",
            "(_JUMP_SET, 1, 1, _MAP_SHARED)",
        ),
    ),
    *of_file(
        "mmrecoder_jax/env/sandbox/quota.py",
        ["tests/env/sandbox/test_quota.py"],
        ("quota: bytes", "self.left -= arguments[self._writes[number]]", "pass"),
        ("quota: folders", "_FOLDER if number in self._folders else _TWO_BLOCKS", "_TWO_BLOCKS"),
    ),
    *of_file(
        "mmrecoder_jax/env/sandbox/scratch.py",
        ["tests/env/sandbox/test_scratch.py"],
        ("cleaning: names that are taken", "if not os.path.lexists(target):", "if True:"),
        (
            "cleaning: what is in the trash",
            "collections.deque([bin_, top])",
            "collections.deque([top])",
        ),
    ),
    *of_file(
        "mmrecoder_jax/env/execution.py",
        ["tests/env/test_execution.py::test_an_endless_error_costs_no_time"],
        ("claims: long errors", "error[-_LONGEST_ERROR:]", "error[:99_000]"),
    ),
    *of_file(
        "mmrecoder_jax/env/pool.py",
        [
            "tests/env/test_pool.py::test_a_script_that_somebody_else_killed_is_run_again",
            "tests/env/test_pool.py::test_code_over_the_limit_is_refused_and_nothing_breaks",
        ],
        (
            "pool: killed by others",
            "if not self._was_killed_by_others(answer.outcome) or",
            "if True or",
        ),
        ("pool: long code", "if len(key[0]) > wire.MAX_CODE_CHARACTERS:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/env/local.py",
        ["tests/env/test_launch.py"],
        ("pool: low limits", "hard < least", "False"),
    ),
    *of_file(
        "mmrecoder_jax/command.py",
        ["tests/test_command.py"],
        ("one line: what led to an error", "reason = reason.__cause__", "return None"),
        ("one line: lines", '"; ".join(lines)', "text"),
        ("one line: checkpoints", "    if _is_of_a_checkpoint(error):", "    if False:"),
        ("one line: a full disk", "names = _outputs(sys.argv)", "pass"),
        ("one line: Ctrl-C", "sys.exit(130)", "sys.exit(0)"),
        ("--traceback", "None if show_traceback else explain(error)", "explain(error)"),
        ("one line: bugs", "        if text is None:\n            raise\n", ""),
    ),
    *of_file(
        "mmrecoder_jax/command.py",
        ["tests/test_commands.py::test_flags_that_must_be_given_are_asked_for_with_what_they_are"],
        ("one line: missing flags", "return re.sub(missing, said,", "return re.sub(missing, '',"),
    ),
    *of_file(
        "mmrecoder_jax/learner/checkpoint.py",
        ["tests/learner/test_checkpoint.py"],
        ("checksums: of a resumed run", "if found is not None and not reason:", "if False:"),
        (
            "checksums: of first weights",
            "if differing := changed(saved,",
            "if False and changed(saved,",
        ),
        (
            "checksums: place in the data",
            'if restored.meta.get("positions", _digests(places)) != _digests(places):',
            "if 0:",
        ),
        (
            "checkpoints: where they are",
            "if not isinstance(error, (OSError, ValueError, *places.errors())):",
            "if True:",
        ),
    ),
    *of_file(
        "mmrecoder_jax/places.py",
        ["tests/test_places.py"],
        ("buckets: unfinished steps", "if (each / COMMIT).exists()]", "if True]"),
    ),
    *of_file(
        "mmrecoder_jax/bucket/copy.py",
        ["tests/test_places.py"],
        ("buckets: lost parts", "self._remove(self._parts.pop(name, []))", "pass"),
        ("buckets: half a directory", "self._remove(sorted(broken, key=is_mark))", "pass"),
        ("buckets: marks go last", "sorted(broken, key=is_mark)", "broken"),
        ("buckets: marks of one process", "[] if self.host else _topmost", "_topmost"),
        ("buckets: left to its process", "if not name.startswith(marked)}", "}"),
        ("buckets: removed by another", "suppress(Changed), talking", "suppress(), talking"),
        ("buckets: what changes meanwhile", "range(_TRIES - 1)", "range(0)"),
        (
            "buckets: a long file that goes",
            "except FileNotFoundError:  # it has just",
            "except MemoryError:  #",
        ),
        ("buckets: filled alone", "with self._pushing:  # what is half", "if 1:  # what is half"),
    ),
    *of_file(
        "mmrecoder_jax/reporting/report.py",
        ["tests/bucket/test_view.py"],
        ("reports: address of a run in a bucket", "places.shown(str(workdir))", "str(workdir)"),
        ("reports: written to a bucket", "    places.put(folder)\n", ""),
    ),
    *of_file(
        "mmrecoder_jax/sweeping/settings.py",
        ["tests/sweeping/test_buckets.py"],
        ("sweeps: charts in a bucket", "and not places.in_bucket(self.workdir)", ""),
        (
            "sweeps: points in a bucket",
            "places.shown(os.path.join(self.workdir, point.name))",
            "self.workdir",
        ),
    ),
    *of_file(
        "mmrecoder_jax/bucket/view.py",
        ["tests/bucket/test_view.py"],
        ("views: half a directory", "not name.startswith(marked) and ", ""),
        ("views: what changes meanwhile", "settled(self._fill)", "self._fill()"),
        ("views: what is asked for", "if entry is not None and", "if False and"),
        ("views: what is gone", "self._remove(sorted(gone - set(names)))", "pass"),
    ),
    *of_file(
        "mmrecoder_jax/learner/checksums.py",
        ["tests/learner/test_checksums.py"],
        ("checksums: places", "_mixed(bits ^ _mixed(place))", "_mixed(bits)"),
        ("checksums: bits", "_mixed(bits ^ _mixed(place))", "bits ^ _mixed(place)"),
        ("checksums: types", "_type(saved[path]) == _type(number)", "True"),
    ),
    *of_file(
        "mmrecoder_jax/benchmarks/results.py",
        ["tests/benchmarks/test_results.py"],
        ("results: the input", "path.samefile(source)", "False"),
        ("results: of something else", "!= self._made_of", "== 0"),
        ("results: torn rows", "os.truncate(self._path, _end_of_lines(self._path))", "pass"),
        (
            "results: what was there before",
            "if self._path.exists():\n                self",
            "if 0:\n                self",
        ),
    ),
    *of_file(
        "mmrecoder_jax/benchmarks/score.py",
        ["tests/benchmarks/test_score.py"],
        (
            "score: pools",
            'pools.answers.submit(row["gen_code"])]',
            'pools.references.submit(row["gen_code"])]',
        ),
        ("score: repeated ids", "if lines.setdefault(key, line) != line:", "if False:"),
        (
            "score: rows that are done",
            "                if key in done:\n                    continue\n",
            "",
        ),
        ("score: answers with a fence", 'answer_code(code or "") or None', "code"),
    ),
    *of_file(
        "mmrecoder_jax/env/child/main_module.py",
        ["tests/env/child/test_main_module.py"],
        ("scripts: __main__", 'sys.modules["__main__"] = module', "pass"),
        ("scripts: arguments", "sys.argv = [SCRIPT_NAME]", "pass"),
        ("scripts: home", 'os.environ["HOME"] = directory', "pass"),
        ("scripts: byte-order mark", 'code.removeprefix("\\ufeff")', "code"),
        ("scripts: modules of their own", "sys.path.insert(0, directory)", "pass"),
    ),
    *of_file(
        "mmrecoder_jax/env/child/errors.py",
        ["tests/env/child/test_errors.py"],
        ("errors: no network", "(socket.__file__, _NO_NETWORK),", ""),
        ("errors: circles", "for _ in range(_LONGEST_CHAIN):", "for _ in range(1):"),
        ("errors: addresses", '_ADDRESS.sub("0x…", message)', "message"),
        ("errors: the script's own", "and not raised_by_script:", ":"),
        ("errors: usage", "isinstance(problem, SystemExit) and ", ""),
    ),
    *of_file(
        "mmrecoder_jax/data/benchmarks.py",
        ["tests/data/test_benchmarks.py"],
        ("imports: other rows", "{**meta, **rows, ", "{**meta, "),
    ),
    *of_file(
        "mmrecoder_jax/rl/policy.py",
        ["tests/rl/test_policy.py"],
        ("rl.updates_per_batch: old log-probabilities", "if self._updates > 1 and", "if False and"),
        ("rl.kl_coef: reference", "if self._penalised:", "if False:"),
        ("rl.kl_in: log-probabilities once", ' and "old_logps" not in batch:', ":"),
        ("rl.kl_coef: the reference stays", "jax.tree.map(jnp.copy, moving)", "moving"),
        ("rl.temperature: policy", "banned, temperature, chunk", "banned, 1.0, chunk"),
        ("forbidden ids: policy", "banned[list(forbidden)] = True", "pass"),
    ),
    *of_file(
        "mmrecoder_jax/rl/losses.py",
        ["tests/rl/test_divergence.py"],
        ("rl.kl: k1", "return -difference", "return difference"),
    ),
    *of_file(
        "mmrecoder_jax/planner/fits.py",
        ["tests/planner/test_programs.py"],
        ("rl.kl_coef: memory", "if programs.config.rl.kl_coef:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/rl/divergence.py",
        ["tests/rl/test_divergence.py"],
        (
            "rl.kl_in: what is shown",
            "turns + 1)[1:]\n            tokens",
            "turns + 1)[:-1]\n            tokens",
        ),
        ("rl.kl_in: stage 1", "if mode == Mode.SHARED_FIRST_TURN:", "if False:"),
        ("rl.kl_in: rows that rest", "if number < len(rows):", "if True:"),
        ("rl.kl_in: kl", "total / max(tokens, 1.0)", "total / max(trajectories, 1.0)"),
        ("rl.kl_in: kl_penalty", "coefficient * total", "total"),
    ),
    *of_file(
        "mmrecoder_jax/data/batching.py",
        ["tests/rl/test_divergence.py"],
        (
            "rl.kl_in: rows of a part",
            'yield int(batch["numbers"][m, r]), (m, r // own)',
            'yield int(batch["numbers"][m, r]), (m, 0)',
        ),
        ("rl.kl_in: advantages", 'return batch | {"advantages": found}', "return batch"),
    ),
    *of_file(
        "mmrecoder_jax/grpo.py",
        ["tests/test_grpo.py"],
        (
            "rl.kl_in: a trajectory's turns",
            "returns - penalties.sum(axis=-1)",
            "returns - penalties[..., -1]",
        ),
        ("rl.kl_in: of turns", "rewards - penalties, returns", "rewards, returns"),
        (
            "rl.kl_coef: in the reward",
            "rl.kl_coef * apart.sums.reshape",
            "0.1 * apart.sums.reshape",
        ),
        (
            "rl.kl_in: several updates",
            "if updates_per_step(rl) > 1:  # the ratio",
            "if False:  # the ratio",
        ),
    ),
    *of_file(
        "mmrecoder_jax/loop.py",
        REFERENCE_TESTS,
        (
            "rl.reference_every: resumed",
            "if self._reference_every:\n            self.reference = reference_of",
            "if False:\n            self.reference = reference_of",
        ),
        ("rl.reference_every: steps", "step % self._reference_every == 0", "True"),
        (
            "rl.reference_every: saved",
            "self.state = with_reference(self.state,",
            "_ = (self.state,",
        ),
    ),
    *of_file(
        "mmrecoder_jax/learner/checkpoint.py",
        REFERENCE_TESTS,
        (
            "rl.reference_every: of a run whose reference stayed",
            "and self._has_reference(step)",
            "",
        ),
    ),
    *of_file(
        "mmrecoder_jax/learner/update.py",
        REFERENCE_TESTS,
        (
            "rl.reference_every: updates",
            "reference=reference), metrics",
            "reference=None), metrics",
        ),
    ),
    *of_file(
        "mmrecoder_jax/checks.py",
        ["tests/test_checks.py"],
        ("check rl.kl_in and rl.reference_every", "and not rl.kl_coef:", "and False:"),
        ("check rl.kl=k1", 'if rl.kl == "k1" and rl.kl_in == "loss":', "if False:"),
        ("check rl.reference_every=1", "if rl.reference_every == 1 and", "if False and"),
    ),
    *of_file(
        "mmrecoder_jax/rl/schedule.py",
        ["tests/rl/test_rollout.py"],
        ("both pictures: places", "spec.pictures if turns > 1 else 1", "1"),
    ),
    *of_file(
        "mmrecoder_jax/rl/learner_batch.py",
        ["tests/rl/test_learner_batch.py"],
        ("rl.truncated", "if mask_truncated:", "if False:"),
        (
            "stage 1: loss on the last turn",
            "[turns[-1]] if mode == Mode.SHARED_FIRST_TURN",
            "[turns[-1]] if 0",
        ),
        ("images: pictures", "* FeedbackImage(config.feedback.image).pictures", ""),
        ("questions: places", "questions.places(groups)", "groups"),
        ("check rows of a host", "rows > 0\n        and ", ""),
        ("check prompts of a host", "and cfg.batch_size % hosts == 0", ""),
        ("check micro-batch on hosts", "and cfg.micro_batch_size % hosts == 0", ""),
        (
            "check whole micro-batches",
            "rl.mini_batches * rl.group % cfg.micro_batch_size == 0",
            "rl.mini_batches",
        ),
        ("check groups", "(rows % rl.group == 0 or rl.group % rows == 0)", "True"),
        ("check rows on devices", "if rows % ways:", "if False:"),
        ("check rows and prompts on hosts", "if count % hosts:", "if False:"),
        ("check rl.truncated", 'check_choice("rl.truncated", rl.truncated, TRUNCATED)', "pass"),
    ),
    *of_file(
        "mmrecoder_jax/sweeping/axes.py",
        ["tests/sweeping/test_axes.py"],
        ("sweep: a field twice", "if first.field == second.field:", "if False:"),
        ("sweep: a value twice", "if value in values:", "if False:"),
        ("sweep: seeds last", "axis.field != SEED", "False"),
        ("sweep: the range is in factors", "if self.log:", "if False:"),
    ),
    *of_file(
        "mmrecoder_jax/sweeping/settings.py",
        ["tests/sweeping/test_settings.py"],
        ("sweep: fixed fields", "for name, value in self.fixed.items()", "for name, value in ()"),
        ("sweep: other settings", "    if found:\n", "    if False:\n"),
        ("sweep: a directory of others", "        if held:", "        if False:"),
        ("sweep: a point's fields", 'cli.check(config, (*STAGES, "pipeline"))', "pass"),
    ),
    *of_file(
        "mmrecoder_jax/sweeping/runner.py",
        ["tests/sweeping/test_runner.py"],
        (
            "sweep: finished points",
            "for p in self._points if not self._finished(p)",
            "for p in self._points",
        ),
        (
            "sweep: locks of points",
            "if lock is None:\n                if",
            "if False:\n                if",
        ),
        ("sweep: retries", "tries[run.point.name] < self._tries", "False"),
        ("sweep: SIGTERM", "self._preempted |= number == signal.SIGTERM", "pass"),
        (
            "sweep: what is left of a group",
            "_signal(run, signal.SIGKILL)\n        run.log",
            "run.log",
        ),
    ),
    # The loop hands every option on.
    of_field("rl.group", "group=rl.group,", "group=4,", "rl/step_rollouts"),
    of_field("rl.turns", "turns=rl.turns,", "turns=2,", "rl/step_rollouts"),
    of_field("rl.temperature", "stage.engine(env, rl.temperature", "stage.engine(env, 1.0", "grpo"),
    of_field("rl.rollout_prompts", "prompts=rl.rollout_prompts", "prompts=0", "rl/step_rollouts"),
    of_field("rl.max_logp_gap", '{"logp_gap": rl.max_logp_gap}', '{"logp_gap": 0.1}', "grpo"),
    of_field("rl.rows", "rows=rl.rows", "rows=0", "rl/step_rollouts"),
    of_field("rl.ahead", "min(step + self._rl.ahead,", "min(step,", "rl/step_rollouts"),
    of_field("rl.partial", "else rl.partial, meanwhile", "else 0, meanwhile", "rl/step_rollouts"),
    of_field("rl.max_importance", "weights, rl.max_importance", "weights, 2.0", "grpo"),
    of_field("rl.top_k", '("top_k", "top_p", "min_p")', '("top_p", "min_p")', "stage"),
    of_field("rl.top_p", '("top_k", "top_p", "min_p")', '("top_k", "min_p")', "stage"),
    of_field("rl.min_p", '("top_k", "top_p", "min_p")', '("top_k", "top_p")', "stage"),
    of_field("rl.stop", 'rl.get("stop", ())', "()", "stage"),
    of_field("rl.std_eps", "rl.std_eps, rl.std_ddof", "1e-6, rl.std_ddof", "grpo"),
    of_field("rl.std_ddof", "rl.std_eps, rl.std_ddof", "rl.std_eps, 1", "grpo"),
    of_field("rl.truncated", 'rl.truncated == "mask"', "False", "grpo"),
    of_field(
        "rl.updates_per_batch",
        "updates_per_step=updates_per_step(rl)",
        "updates_per_step=1",
        "grpo",
    ),
    of_field("rl.advantage", "Baseline(rl.advantage)", "Baseline.GROUP", "grpo"),
    of_field("rl.objective", "Ratio(rl.objective)", "Ratio.GRPO", "grpo"),
    of_field("rl.clip_dual", "clip_dual=rl.clip_dual", "clip_dual=0.0", "grpo"),
    of_field("rl.kl", "kl=Divergence(rl.kl)", "kl=Divergence.K3", "grpo"),
    of_field(
        "rl.kl_in",
        "in_reward = PenaltyIn(rl.kl_in) is PenaltyIn.REWARD",
        "in_reward = False",
        "grpo",
    ),
    of_field(
        "rl.reference_every", "reference_every=rl.reference_every", "reference_every=0", "grpo"
    ),
    of_field("rl.entropy_coef", "entropy_coef=rl.entropy_coef", "entropy_coef=0.0", "grpo"),
    of_field(
        "rl.overlong", "rl.response_length, rl.overlong", "rl.response_length, 0", "rl/rewards"
    ),
    of_field("rl.kl_coef", "kl_coef=rl.kl_coef", "kl_coef=0.0", "grpo"),
    of_field("rl.clip_low", "clip_low=rl.clip_low", "clip_low=0.2", "grpo"),
    of_field("rl.clip_high", "clip_high=rl.clip_high", "clip_high=0.2", "grpo"),
    of_field("rl.trajectories_gb", "rl.trajectories_gb * 1e9", "1e9", "grpo"),
    of_field("alarms.forged", "config.alarms.to_dict()", "{}", "loop"),
    of_field("rl.trajectories_every", "rl.trajectories_every, env", "1, env", "grpo"),
    of_field("reward.alpha", " reward.alpha,", " 0.9,", "rl/rewards"),
    of_field("reward.beta", " reward.beta,", " 0.0,", "rl/rewards"),
    of_field("reward.gamma", " reward.gamma,", " 0.0,", "rl/rewards"),
    of_field("reward.eta", "reward.gamma, reward.eta", "reward.gamma, 0.0", "rl/rewards"),
    of_field("train.epochs", "config.train.epochs *", "1.0 *", "grpo"),
    of_field("seed", 'seed=derived_seed(config, "data")', "seed=0", "grpo"),
    of_field(
        "rl.aggregation",
        "aggregation=config.rl.aggregation",
        "aggregation='token_mean'",
        "rl/learner_batch",
    ),
    of_field(
        "rl.response_length", "response_length=rl.response_length", "response_length=32", "stage"
    ),
    of_field("rl.decode_chunk", "chunk=rl.decode_chunk", "chunk=24", "stage"),
    of_field("rl.prompt_length", "prompt_length=rl.prompt_length", "prompt_length=40", "stage"),
    of_field(
        "rl.feedback_length",
        'rl.feedback_length if "feedback_length" in rl else 0',
        "80",
        "stage",
    ),
    of_field("model.freeze_vision", "config.model.freeze_vision and", "False and", "stage"),
    of_field(
        "optim.lr", "stage.config.optim, steps", "load('stage2', 'smoke').optim, steps", "loop"
    ),
    of_field("checkpoint.every", "step % config.checkpoint.every == 0", "step % 1 == 0", "loop"),
    of_field("checkpoint.keep", "config.checkpoint.keep,", "2,", "loop"),
    of_field("checkpoint.keep_every", "= config.checkpoint.keep_every\n", "= 0\n", "loop"),
    of_field("checkpoint.best", "Goal.of(config.checkpoint.best)", 'Goal.of("")', "loop"),
    of_field("rl.eval_every", "self._every = config.rl.eval_every", "self._every = 0", "held_out"),
    of_field("rl.eval_count", "min(self._rl.eval_count,", "min(16,", "held_out"),
    of_field("mesh.slices", "slices=config.mesh.slices", "slices=1", "stage"),
    of_field("train.log_every", "config.train.log_every", "1", "loop"),
    of_field("log.wandb", "log.wandb", "''", "loop"),
    of_field("reward.judge", "back_end is BackEnd.NONE", "True", "rl/judge/make"),
    of_field(
        "judge.question",
        "QUESTIONS[Asked(config.judge.question)]",
        "POINTS_QUESTION",
        "rl/judge/make",
    ),
    of_field("judge.retries", "judge.retries", "6", "rl/judge/make"),
    of_field(
        "train.eval_every", "step % self._every == 0", "step % 7 == 0", "sft", "sft_chart2code"
    ),
    of_field(
        "train.single_turn_share",
        "config.train.single_turn_share",
        "0.25",
        "sft",
        "sft_self_correction",
    ),
    of_field(
        "dialogues.min_gain",
        "config.dialogues.min_gain,",
        "0.02,",
        "prepare",
        "sft_self_correction",
    ),
    *of_file(
        "mmrecoder_jax/stage.py",
        ["tests/test_stage.py::test_synthetic_charts_bring_their_house_style"],
        (
            "data.grammar: house style",
            "GRAMMARS[config.data.grammar].RC_PARAMS",
            'GRAMMARS["words"].RC_PARAMS',
        ),
    ),
    of_field(
        "dialogues.right",
        "            config.dialogues.right,",
        "            0.0,",
        "prepare",
        "sft_self_correction",
    ),
    of_field(
        "dialogues.later",
        "            config.dialogues.later,",
        "            0.0,",
        "prepare",
        "sft_self_correction",
    ),
    of_field("eval.turns", "turns=config.eval.turns", "turns=2", "evaluation", "evaluate"),
    of_field(
        "eval.remembered",
        "remembered=config.eval.remembered",
        "remembered=1",
        "evaluation",
        "evaluate",
    ),
    of_field("eval.sampled", "not config.eval.sampled", "True", "evaluation", "evaluate"),
)


class StaleTable(ValueError):
    """A mutation that no longer fits the code; the message says which and why."""


def apply(mutation: Mutation, root: Path) -> str:
    """Mutates a file below `root` and returns what it held before.

    Raises:
      StaleTable: the file does not exist, or does not hold the old text exactly once.
    """
    path = root / mutation.file
    if not path.is_file():
        raise StaleTable(f"{mutation.name}: there is no file {mutation.file}")
    before = path.read_text(encoding="utf-8")
    count = before.count(mutation.old)
    if count != 1:
        raise StaleTable(
            f"{mutation.name}: {mutation.file} holds the old text {count} times, not once: "
            f"{mutation.old!r}"
        )
    path.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    return before


def copy_checkout(source: Path, target: Path) -> None:
    """Copies what tests need: everything but hidden files, environments, caches and results."""

    def skipped(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == source
        return {
            name
            for name in names
            if name == "__pycache__" or (top and (name[0] == "." or name in NOT_COPIED))
        }

    shutil.copytree(source, target, ignore=skipped)


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Exit status and output of pytest on a checkout, up to its first failure; None for a status
    where it took too long.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    # One compilation cache for all mutations: most of them change few programs.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(root.with_name("jax_cache")))
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def verdict(status: int | None, output: str) -> tuple[bool, str]:
    """Whether a mutation was caught, and by what."""
    if status is None:
        return True, f"no end within {SECONDS} seconds"
    if status == 0:
        return False, "SURVIVED"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - |$)", output, re.M)
    if status == 1 and failed:
        return True, failed.group(1)
    # A test file that cannot be imported, or no test at all: nothing was tested.
    return False, f"NO TEST RAN: {output.strip().splitlines()[-1:]}"


def check(mutations: Sequence[Mutation], source: Path) -> int:
    """Tries all mutations on a copy of a checkout and prints the table.

    Returns:
      How many were not caught.

    Raises:
      StaleTable: a mutation does not fit the code, or its tests fail without it.
    """
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder) / "checkout"
        copy_checkout(source, root)
        for mutation in mutations:  # stale ones first: this takes no time
            (root / mutation.file).write_text(apply(mutation, root), encoding="utf-8")
        tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
        status, output = run_tests(root, tests)
        if status is None:
            raise StaleTable(f"without a mutation the tests take longer than {SECONDS} s")
        if status != 0:
            raise StaleTable(f"the tests fail without a mutation:\n{output[-3000:]}")
        width = max(len(mutation.name) for mutation in mutations)
        survivors = 0
        for mutation in mutations:
            start = time.monotonic()
            before = apply(mutation, root)
            caught, by = verdict(*run_tests(root, mutation.tests))
            (root / mutation.file).write_text(before, encoding="utf-8")
            survivors += not caught
            seconds = time.monotonic() - start
            print(f"{mutation.name:{width}} | {by} | {seconds:.0f} s", flush=True)
    print(f"{len(mutations)} mutations, {survivors} not caught")
    return survivors


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words; one must be in the name")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if any(word in m.name for word in args.only)]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: no such mutation; --list prints their names")
    if args.list:
        for mutation in chosen:
            print(f"{mutation.name} | {mutation.file} | {' '.join(mutation.tests)}")
        return 0
    try:
        return 1 if check(chosen, ROOT) else 0
    except StaleTable as problem:
        print(problem, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
