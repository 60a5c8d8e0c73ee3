#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Trains on a Cloud TPU VM: queued resources, all workers, a bucket as work directory.

  scripts/tpu_vm.sh create NAME --type=v5litepod-16 --zone=ZONE [--spot] [--runtime=VERSION]
  scripts/tpu_vm.sh setup  NAME --zone=ZONE
  scripts/tpu_vm.sh run    NAME --zone=ZONE --workdir=gs://BUCKET/DIR [--type=... --spot] -- FLAGS
  scripts/tpu_vm.sh status NAME --zone=ZONE
  scripts/tpu_vm.sh logs   NAME --zone=ZONE [--worker=0]
  scripts/tpu_vm.sh stop   NAME --zone=ZONE
  scripts/tpu_vm.sh delete NAME --zone=ZONE

create   asks for the TPU and waits until it is there
setup    copies this checkout to all workers and installs it
run      starts `python -m mmrecoder_jax.train FLAGS` on all workers and watches it; where the TPU
         is taken away, asks for it again, sets it up and goes on from the last checkpoint. FLAGS
         are of the training command: --config=stage2 --config.init_from=gs://BUCKET/stage1
status   of the TPU and of the run on each worker, with its last line of output
logs     the output of one worker, as it comes
stop     interrupts the run on all workers; the TPU stays, and costs
delete   gives the TPU back; what is on its disks is lost, the bucket stays

--project=P    by default gcloud's own; the zone too
--poll=60      seconds between two looks
--detach       run: starts and does not watch
--dry_run      prints the commands of gcloud and runs none
END
}

# Empty arrays are no error from here on, and mapfile exists.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "error: bash $BASH_VERSION is too old: install 4.4 or newer (on a Mac: brew install bash)" >&2
    exit 1
fi

fail() {
    echo "error: $*" >&2
    exit 1
}

# A dry run prints commands alone.
say() { $DRY_RUN || echo "tpu: $*"; }

# ---------------------------------------------------------------- the command line

COMMAND="" NAME="" TYPE="" ZONE="" PROJECT="" RUNTIME="" WORKDIR="" WORKER=0 POLL=60
SPOT=false DETACH=false DRY_RUN=false
FLAGS=()

read_arguments() {
    case "${1:-}" in
    create | setup | run | status | logs | stop | delete) COMMAND="$1" ;;
    "" | -h | --help | help)
        usage
        exit 0
        ;;
    *) fail "no command '$1': use create, setup, run, status, logs, stop or delete (--help)" ;;
    esac
    shift
    while (($#)); do
        case "$1" in
        --type=*) TYPE="${1#*=}" ;;
        --zone=*) ZONE="${1#*=}" ;;
        --project=*) PROJECT="${1#*=}" ;;
        --runtime=*) RUNTIME="${1#*=}" ;;
        --workdir=*) WORKDIR="${1#*=}" ;;
        --worker=*) WORKER="${1#*=}" ;;
        --poll=*) POLL="${1#*=}" ;;
        --spot) SPOT=true ;;
        --detach) DETACH=true ;;
        --dry_run) DRY_RUN=true ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            FLAGS=("$@")
            break
            ;;
        -*) fail "no flag '$1': --help lists them; those of the training command come behind --" ;;
        *)
            [[ -z "$NAME" ]] || fail "two names, '$NAME' and '$1': give one"
            NAME="$1"
            ;;
        esac
        shift
    done
    check_arguments
}

check_arguments() {
    [[ -n "$NAME" ]] || fail "$COMMAND needs a name: scripts/tpu_vm.sh $COMMAND NAME --zone=ZONE"
    [[ "$NAME" =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] ||
        fail "'$NAME' is no name of a TPU: use lower-case letters, digits and dashes, a letter first"
    [[ "$POLL" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll=$POLL: give seconds"
    [[ "$WORKER" =~ ^[0-9]+$ ]] || fail "--worker=$WORKER: give the number of one worker, from 0"
    if [[ -n "$ZONE" && ! "$ZONE" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$ ]]; then
        fail "--zone=$ZONE is no zone: it looks like us-west4-a"
    fi
    if [[ "$COMMAND" == create && -z "$TYPE" ]]; then
        fail "create needs --type, such as --type=v5litepod-16 (v5e), v5p-8, v6e-16 or v4-8"
    fi
    [[ -z "$TYPE" || -n "$RUNTIME" ]] || RUNTIME="$(runtime_of "$TYPE")"
    if [[ "$COMMAND" == run ]]; then
        check_run
    elif ((${#FLAGS[@]})); then
        fail "$COMMAND takes no flags of the training command: leave out -- and what follows"
    fi
}

check_run() {
    local word has_config=false
    ((${#FLAGS[@]})) ||
        fail "run needs the flags of the training command behind --, such as -- --config=stage2"
    case "$WORKDIR" in
    gs://?*/?* | /?*) ;;
    gs://*) fail "--workdir=$WORKDIR: name a folder in the bucket too, such as gs://BUCKET/stage2" ;;
    "") fail "run needs --workdir=gs://BUCKET/DIR, or a folder that all workers share" ;;
    *) fail "--workdir=$WORKDIR: give gs://BUCKET/DIR, or an absolute folder that all workers share" ;;
    esac
    for word in "${FLAGS[@]}"; do
        case "$word" in
        --config=*) has_config=true ;;
        --workdir | --workdir=*) fail "$word behind --: give it before, as --workdir=gs://BUCKET/DIR" ;;
        esac
    done
    $has_config || fail "no --config=... behind --: name a configuration, such as --config=stage2"
}

# The system image for a kind of chip.
runtime_of() {
    case "$1" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    v5e-*) fail "--type=$1: Cloud TPU calls it v5litepod-${1#v5e-}" ;;
    *) fail "--type=$1 is no type that is known here: give its system too, as --runtime=VERSION" ;;
    esac
}

# ---------------------------------------------------------------- gcloud

ERRORS="$(mktemp)"
trap 'rm -f "$ERRORS" "$ERRORS.tgz" "$ERRORS.said"' EXIT

place() {
    [[ -z "$ZONE" ]] || printf -- '--zone=%s\n' "$ZONE"
    [[ -z "$PROJECT" ]] || printf -- '--project=%s\n' "$PROJECT"
}

# gcloud compute tpus WORDS in the zone. What it prints on its standard error is kept in $ERRORS.
tpus() {
    local places=()
    mapfile -t places < <(place)
    if $DRY_RUN; then
        printf '%q ' gcloud compute tpus "$@" "${places[@]}" --quiet | sed 's/ $//'
        echo
        return 0
    fi
    # Nobody would see a question of gcloud's, such as whether to make a key for ssh.
    gcloud compute tpus "$@" "${places[@]}" --quiet 2>"$ERRORS"
}

check_gcloud() {
    $DRY_RUN && return 0
    command -v gcloud >/dev/null ||
        fail "there is no gcloud on this machine: install it (https://cloud.google.com/sdk/docs/install)"
}

# Ends with what gcloud said in $ERRORS, in one line with a remedy.
explain() {
    local said where="${ZONE:-the zone of gcloud}"
    if said="$(grep -m 1 '^error: ' "$ERRORS")"; then
        fail "${said#error: }" # of scripts/tpu_worker.sh
    fi
    said="$(grep -m 1 -E 'ERROR|denied|refused|timed out|not found' "$ERRORS" || head -n 1 "$ERRORS")"
    case "$(tr '\n' ' ' <"$ERRORS")" in
    *"active account"* | *"auth login"* | *"eauthentication"*)
        fail "gcloud is not logged in: run 'gcloud auth login', then the same command again"
        ;;
    *"nvalid choice"*)
        fail "this gcloud is too old ($said): run 'gcloud components update'"
        ;;
    *"attribute [project]"* | *"property [project]"*)
        fail "gcloud knows no project: give --project=P, or run 'gcloud config set project P'"
        ;;
    *"attribute [zone]"* | *"property [compute/zone]"*)
        fail "gcloud knows no zone: give --zone=ZONE, such as us-west4-a"
        ;;
    *"has not been used in project"* | *"SERVICE_DISABLED"*)
        fail "the project has no TPU service ($said): run 'gcloud services enable tpu.googleapis.com'"
        ;;
    *"uota"* | *"RESOURCE_EXHAUSTED"*)
        fail "no quota for ${TYPE:-this} in $where ($said): ask for it in the console (IAM, Quotas)," \
            "delete requests that are FAILED or SUSPENDED, which count, or take another --zone"
        ;;
    *"no more capacity"* | *"nsufficient"*"capacity"*)
        fail "no ${TYPE:-TPU} is free in $where ($said): try later, another --zone, or without --spot"
        ;;
    *"ueuedResources/"*"not found"* | *"/nodes/"*"not found"*)
        fail "there is no $NAME in $where: 'tpu_vm.sh create $NAME' asks for it"
        ;;
    *"Permission denied on 'locations"* | *"ocation"*"not found"* | *"nvalid"*"ocation"* | \
        *"nvalid"*"zone"* | *"nknown zone"*)
        fail "there are no TPUs in $where ($said): 'gcloud compute tpus locations list' names the zones"
        ;;
    *"ccelerator"*"not found"* | *"nvalid"*"ccelerator"*)
        fail "there is no ${TYPE:-such type} in $where ($said):" \
            "'gcloud compute tpus accelerator-types list --zone=ZONE' names the types"
        ;;
    *"ALREADY_EXISTS"* | *"already exists"*)
        fail "$NAME is already there: use it, take another name, or 'tpu_vm.sh delete $NAME' first"
        ;;
    *"publickey"*)
        fail "a worker of $NAME does not take your key ($said): 'gcloud compute config-ssh' makes one" \
            "known; with OS Login this account needs the role roles/compute.osAdminLogin"
        ;;
    *"PERMISSION_DENIED"* | *"does not have permission"*)
        fail "this account may not do that ($said): it needs the role roles/tpu.admin"
        ;;
    *"Could not SSH"* | *"onnection refused"* | *"timed out"* | *"onnection reset"* | *"[255]"*)
        fail "a worker of $NAME cannot be reached by ssh ($said): a new one takes a minute, so try" \
            "again; else see that the firewall lets port 22 through" \
            "('gcloud compute firewall-rules list')"
        ;;
    *) fail "gcloud: ${said:-it failed and said nothing}" ;;
    esac
}

# The state of the request: ACTIVE, SUSPENDED, ..., or MISSING.
state() {
    local found
    if found="$(tpus queued-resources describe "$NAME" '--format=value(state.state)')"; then
        echo "${found:-UNKNOWN}"
    elif grep -q 'ueuedResources/.*not found' "$ERRORS"; then
        echo MISSING
    else
        explain
    fi
}

# Why a request has failed, in Google's words.
reason() {
    local found
    found="$(tpus queued-resources describe "$NAME" '--format=value(state.failedData.error.message)')" ||
        found=""
    [[ -z "$found" ]] || printf ' (%s)' "$(head -n 1 <<<"$found")"
}

# Runs scripts/tpu_worker.sh on workers: on_workers WHICH WORDS...
on_workers() {
    local which="$1" words
    shift
    printf -v words '%q ' "$@"
    tpus tpu-vm ssh "$NAME" "--worker=$which" \
        "--command=bash mmrecoder_jax/scripts/tpu_worker.sh ${words% }"
}

# ---------------------------------------------------------------- commands

request() {
    local spot=()
    ! $SPOT || spot=(--spot)
    [[ -n "$TYPE" ]] || fail "$NAME must be asked for anew: give --type, and --spot where it was one"
    say "asking for $NAME ($TYPE)"
    tpus queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$TYPE" \
        "--runtime-version=$RUNTIME" "${spot[@]}" || explain
}

# Waits for the TPU; 1 where it was taken away before anybody could use it.
wait_until_active() {
    local now before=""
    ! $DRY_RUN || return 0
    while true; do
        now="$(state)" || exit 1
        [[ "$now" == "$before" ]] || say "$NAME is $now"
        before="$now"
        case "$now" in
        ACTIVE) return ;;
        FAILED)
            fail "$NAME is FAILED$(reason): 'tpu_vm.sh delete $NAME', then try another --zone or" \
                "--type, or without --spot"
            ;;
        SUSPENDED | SUSPENDING) return 1 ;;
        MISSING) fail "the request for $NAME is gone: somebody else has deleted it" ;;
        esac
        sleep "$POLL"
    done
}

create() {
    local now=MISSING
    $DRY_RUN || now="$(state)" || exit 1
    case "$now" in
    MISSING) ;;
    FAILED | SUSPENDED | SUSPENDING)
        fail "$NAME is already there and $now; it gives no TPU any more, and counts against the quota:" \
            "'tpu_vm.sh delete $NAME' first"
        ;;
    *) fail "$NAME is already there ($now): use it, or take another name" ;;
    esac
    request
    wait_until_active ||
        fail "$NAME was taken away at once: 'tpu_vm.sh delete $NAME', then try again or without --spot"
    say "$NAME is there; it costs until 'tpu_vm.sh delete $NAME'"
}

need_active() {
    local now
    ! $DRY_RUN || return 0
    now="$(state)" || exit 1
    case "$now" in
    ACTIVE) ;;
    MISSING) fail "there is no $NAME${ZONE:+ in $ZONE}: 'tpu_vm.sh create $NAME' asks for it" ;;
    FAILED | SUSPENDED | SUSPENDING)
        fail "$NAME is $now, so its TPU is gone: 'tpu_vm.sh delete $NAME', then create it anew" \
            "('tpu_vm.sh run' does both)"
        ;;
    *) fail "$NAME is $now, not yet ACTIVE: wait; 'tpu_vm.sh status $NAME' says how far it is" ;;
    esac
}

# A worker that has just been started refuses connections for a while.
patiently() {
    local left
    for left in 4 3 2 1 0; do
        "$@" && return 0
        grep -q -E 'Could not SSH|Connection (refused|reset)|timed out|\[255\]' "$ERRORS" || break
        ((left)) || break
        say "a worker cannot be reached yet; trying again" >&2
        sleep "$POLL"
    done
    explain
}

# The files of the checkout, without what git ignores.
files_of() {
    git -C "$1" ls-files -z --cached --others --exclude-standard 2>/dev/null ||
        (cd "$1" && find . -path './.*' -prune -o -path './runs' -prune -o -path './data' -prune -o \
            -name __pycache__ -prune -o -type f -print0)
}

setup() {
    local root packed=mmrecoder_jax.tgz
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    need_active
    say "copying the checkout to all workers of $NAME"
    if ! $DRY_RUN; then
        packed="$ERRORS.tgz"
        files_of "$root" | tar -C "$root" --null -T - -czf "$packed" 2>"$ERRORS" ||
            fail "the files of $root cannot be packed ($(head -n 1 "$ERRORS"))"
    fi
    patiently tpus tpu-vm scp "$packed" "$NAME:mmrecoder_jax.tgz" --worker=all
    patiently tpus tpu-vm ssh "$NAME" --worker=all \
        "--command=mkdir -p mmrecoder_jax && tar -xzf mmrecoder_jax.tgz -C mmrecoder_jax"
    say "installing on all workers: some minutes"
    patiently on_workers all setup
}

start() {
    say "starting on all workers of $NAME"
    patiently on_workers all start "--workdir=$WORKDIR" "${FLAGS[@]}"
}

run() {
    local now=MISSING
    $DRY_RUN || now="$(state)" || exit 1
    case "$now" in
    ACTIVE) going || { setup && start; } ;;
    *) renew "$now" ;;
    esac
    if $DETACH || $DRY_RUN; then
        say "'tpu_vm.sh status $NAME' and 'tpu_vm.sh logs $NAME' show it; nobody watches for its end"
        return
    fi
    watch
}

# Whether all workers run already, so that `run` has only to watch.
going() {
    local said
    said="$(on_workers all status)" || return 1
    [[ "$said" == *": running |"* && ! "$said" =~ :\ (idle|ended) ]] || return 1
    say "the run of $NAME goes already"
}

# Takes what is left of a request away, asks again until there is a TPU, sets up and starts.
renew() {
    local now="$1"
    while true; do
        case "$now" in
        MISSING) request ;;
        FAILED | SUSPENDED | SUSPENDING)
            [[ -n "$TYPE" ]] ||
                fail "$NAME is $now and must be asked for anew: give --type, and --spot where it was one"
            say "$NAME is $now: deleting what is left of it"
            tpus queued-resources delete "$NAME" --force || explain
            request
            ;;
        esac # else it is on its way
        wait_until_active && break
        now=SUSPENDED
        sleep "$POLL"
    done
    setup
    start
}

# Whether the VM itself is gone, which its request may say later.
taken_away() {
    local node
    node="$(tpus tpu-vm describe "$NAME" '--format=value(state)')" || node=""
    case "$node" in
    PREEMPTED | TERMINATED | STOPPED | DELETING) true ;;
    "") grep -q '/nodes/.*not found' "$ERRORS" ;;
    *) false ;;
    esac
}

# Until the run has ended: restarts it where the TPU was taken away or a worker was started anew.
watch() {
    local now said lost=0 unknown=0
    say "watching $NAME; Ctrl-C ends the watching, not the run"
    while true; do
        sleep "$POLL"
        if ! now="$(state 2>"$ERRORS.said")"; then # a network may be away for a while
            said="$(<"$ERRORS.said")"
            unknown=$((unknown + 1))
            ((unknown < 10)) || fail "${said#error: }"
            say "no answer ($said): asking again"
            continue
        fi
        unknown=0
        case "$now" in
        ACTIVE) ;;
        FAILED | SUSPENDED | SUSPENDING | MISSING)
            say "$NAME was taken away ($now)"
            renew "$now"
            continue
            ;;
        *) continue ;;
        esac
        if ! said="$(on_workers all status)"; then
            lost=$((lost + 1))
            ((lost < 10)) || explain
            if taken_away; then
                say "the VM of $NAME was taken away"
                renew SUSPENDED
            fi
            continue
        fi
        lost=0
        if [[ "$said" == *": running |"* ]]; then
            say "$(grep -m 1 ': running |' <<<"$said")"
        elif [[ "$said" =~ :\ (idle|ended\ lost|ended\ 75|ended\ 143)\ \| ]]; then
            # 75, 143: a worker was told that it is about to be taken away, and has saved or had no time.
            say "the run is gone from a worker: setting up again"
            on_workers all stop >/dev/null || true
            setup
            start
        elif grep ': ended ' <<<"$said" | grep -q -v ': ended 0 |'; then
            fail "the run has failed: $(grep ': ended ' <<<"$said" | grep -m 1 -v ': ended 0 |');" \
                "'tpu_vm.sh logs $NAME' shows more, and 'tpu_vm.sh run' goes on from its last checkpoint"
        elif [[ -n "$said" ]]; then
            say "the run has ended well; $NAME costs until 'tpu_vm.sh delete $NAME'"
            return
        fi
    done
}

status() {
    local now=ACTIVE
    if $DRY_RUN; then
        tpus queued-resources describe "$NAME" '--format=value(state.state)'
    else
        now="$(state)" || exit 1
    fi
    say "$NAME is $now$([[ "$now" != FAILED ]] || reason)"
    [[ "$now" != ACTIVE ]] || on_workers all status || explain
}

logs() {
    need_active
    on_workers "$WORKER" logs || explain
}

stop() {
    need_active
    patiently on_workers all stop
}

delete() {
    tpus queued-resources delete "$NAME" --force || explain
    say "$NAME is given back"
}

read_arguments "$@"
check_gcloud
"$COMMAND"
