#!/usr/bin/env bash
# What one worker of a TPU VM does; scripts/tpu_vm.sh copies it there and calls it on all of them.
#
#   tpu_worker.sh setup             a virtual environment with the package, for the TPU
#   tpu_worker.sh start FLAGS...    trains in the background
#   tpu_worker.sh status            running, ended STATUS or idle, and the last line of output
#   tpu_worker.sh logs [LINES]      the output, as it comes
#   tpu_worker.sh stop              interrupts the training and waits for its end
#
# The checkout is the folder above this script; what a run leaves is in ~/mmrecoder_run.
set -euo pipefail

readonly RUN="$HOME/mmrecoder_run"
readonly STOP_SECONDS="${STOP_SECONDS:-60}"
CHECKOUT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly CHECKOUT

fail() {
    echo "error: $(hostname): $*" >&2
    exit 1
}

# A Python of its own, because the systems of TPU VMs have an older one than the package needs.
setup() {
    cd "$CHECKOUT"
    export PATH="$HOME/.local/bin:$PATH"
    if ! command -v uv >/dev/null; then
        python3 -m pip install -q --user uv || fail "uv cannot be installed with pip: is there a network?"
    fi
    [[ -x .venv/bin/python ]] || uv venv -q --python 3.12 .venv || fail "no Python 3.12 from uv"
    uv pip install -q --python .venv/bin/python -e '.[tpu,gcs]' || fail "the package cannot be installed"
    echo "worker $(hostname): set up"
}

# The process of the run, where it still goes.
process() {
    local pid
    [[ -f "$RUN/pid" ]] || return 1
    pid="$(<"$RUN/pid")"
    kill -0 "$pid" 2>/dev/null && printf '%s\n' "$pid"
}

start() {
    [[ -x "$CHECKOUT/.venv/bin/python" ]] || fail "not set up: run 'tpu_vm.sh setup' first"
    if process >/dev/null; then
        fail "a run goes already (process $(process)): 'tpu_vm.sh stop' ends it"
    fi
    mkdir -p "$RUN"
    rm -f "$RUN/status"
    cd "$CHECKOUT"
    # A session of its own outlives the connection. The shell has its children ignore Ctrl-C, which
    # `stop` sends.
    # shellcheck disable=SC2016 # the inner shell expands these
    setsid nohup env --default-signal=INT,QUIT bash -c '
        run="$1"; shift
        status=0; "$@" || status=$?
        echo "$status" > "$run/status.new"; mv "$run/status.new" "$run/status"
    ' bash "$RUN" .venv/bin/python -m mmrecoder_jax.train "$@" \
        >>"$RUN/output.txt" 2>&1 </dev/null &
    echo "$!" >"$RUN/pid"
    echo "worker $(hostname): started"
}

status() {
    local what=idle last=""
    if process >/dev/null; then
        what="running"
    elif [[ -f "$RUN/status" ]]; then
        what="ended $(<"$RUN/status")"
    elif [[ -f "$RUN/pid" ]]; then
        what="ended lost" # killed with its shell, or the VM was started anew
    fi
    if [[ -f "$RUN/output.txt" ]]; then
        last="$(tail -c 4000 "$RUN/output.txt" | sed '/^ *$/d' | tail -n 1)"
    fi
    echo "worker $(hostname): $what | $last"
}

logs() {
    [[ -f "$RUN/output.txt" ]] || fail "no run has been started here"
    tail -n "${1:-50}" -F "$RUN/output.txt"
}

stop() {
    local pid look
    pid="$(process)" || {
        echo "worker $(hostname): nothing runs"
        return
    }
    kill -INT -- "-$pid" 2>/dev/null || true
    for ((look = 0; look < 5 * STOP_SECONDS; look++)); do
        process >/dev/null || break
        sleep 0.2
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
    echo "worker $(hostname): stopped"
}

case "${1:-}" in
setup | start | status | logs | stop) "$@" ;;
*) fail "use setup, start, status, logs or stop, not '${1:-}'" ;;
esac
