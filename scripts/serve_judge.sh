#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'END'
Serves the judge on a machine of its own, by vLLM or SGLang, and says when it can be asked.

  scripts/serve_judge.sh vllm   [--model=Qwen/Qwen2.5-VL-72B-Instruct] [--devices=8] [--port=8000]
  scripts/serve_judge.sh sglang [the same] [-- FLAGS OF THE SERVER]

--model=M      an id of the hub, or a directory
--devices=N    accelerators that the model is cut over
--port=P       of the server
--host=H       it listens on; 127.0.0.1 answers this machine alone
--length=L     tokens of a question with its two images and of its answer
--wait=S       seconds until the server must answer (loading 72B takes minutes)
--dry_run      prints the server's command and starts nothing

A key in MMRECODER_JUDGE_KEY is asked for by the server; training needs the same variable. The server
is installed beforehand, in an environment of its own: `pip install vllm`, `vllm-tpu` or `sglang`.
END
}

fail() {
    echo "error: $*" >&2
    exit 1
}

KIND="" MODEL=Qwen/Qwen2.5-VL-72B-Instruct DEVICES=8 PORT=8000 HOST=0.0.0.0 LENGTH=8192 WAIT=3600
DRY_RUN=false
REST=()

whole() { [[ "$2" =~ ^[1-9][0-9]{0,6}$ ]] || fail "$1=$2: use a whole number from 1"; }

case "${1:-}" in
vllm | sglang) KIND="$1" ;;
"" | -h | --help | help)
    usage
    exit 0
    ;;
*) fail "no server '$1': use vllm or sglang (--help)" ;;
esac
shift
while (($#)); do
    case "$1" in
    --model=?*) MODEL="${1#*=}" ;;
    --devices=*) DEVICES="${1#*=}" ;;
    --port=*) PORT="${1#*=}" ;;
    --host=?*) HOST="${1#*=}" ;;
    --length=*) LENGTH="${1#*=}" ;;
    --wait=*) WAIT="${1#*=}" ;;
    --dry_run) DRY_RUN=true ;;
    -h | --help)
        usage
        exit 0
        ;;
    --)
        shift
        REST=("$@")
        break
        ;;
    *) fail "unknown argument '$1': --help lists them; flags of the server come behind --" ;;
    esac
    shift
done
whole --devices "$DEVICES"
whole --port "$PORT"
whole --length "$LENGTH"
whole --wait "$WAIT"
((PORT < 65536)) || fail "--port=$PORT: use 1 to 65535"

KEY="${MMRECODER_JUDGE_KEY:-}"
[[ "$KEY" =~ ^[[:graph:]]*$ ]] || fail "MMRECODER_JUDGE_KEY holds a space or a line end: take it off"

if [[ "$KIND" == vllm ]]; then
    COMMAND=(vllm serve "$MODEL" --tensor-parallel-size "$DEVICES" --max-model-len "$LENGTH"
        --limit-mm-per-prompt '{"image": 2}')
else
    COMMAND=(python -m sglang.launch_server --model-path "$MODEL" --tp "$DEVICES"
        --context-length "$LENGTH")
fi
COMMAND+=(--served-model-name "$MODEL" --host "$HOST" --port "$PORT" ${REST[@]+"${REST[@]}"})

if $DRY_RUN; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit 0
fi

command -v curl >/dev/null || fail "curl is not installed: it asks the server whether it is ready"
if [[ "$KIND" == vllm ]]; then
    command -v vllm >/dev/null || fail "vllm is not installed here: pip install vllm (vllm-tpu on a TPU)"
    export VLLM_API_KEY="$KEY"
    [[ -n "$KEY" ]] || unset VLLM_API_KEY
else
    python -c 'import sglang' 2>/dev/null || fail "sglang is not installed here: pip install sglang"
    # SGLang takes its key as a flag: other users of this machine can read it there.
    [[ -z "$KEY" ]] || COMMAND+=(--api-key "$KEY")
fi

"${COMMAND[@]}" &
SERVER=$!
trap 'kill "$SERVER" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ready() {
    # The key goes through a file that curl reads from its input, not through an argument.
    printf 'header = "Authorization: Bearer %s"\n' "$KEY" |
        curl --silent --fail --max-time 5 --config - "http://127.0.0.1:$PORT/v1/models" >/dev/null
}

END=$((SECONDS + WAIT))
until ready; do
    kill -0 "$SERVER" 2>/dev/null || {
        wait "$SERVER" && code=0 || code=$?
        fail "the server ended with $code before it answered; its own output says why"
    }
    ((SECONDS < END)) || fail "the server did not answer on port $PORT within $WAIT s (--wait)"
    sleep 1
done
echo "judge: ready; train with --config.reward.judge=http --config.judge.url=http://$(hostname):$PORT/v1 --config.judge.model=$MODEL"
wait "$SERVER"
