#!/usr/bin/env bash
# All that one GPU can prove in ten minutes, every step kept as soon as it has ended.
#
#   scripts/first_gpu.sh [FOLDER]           default: first-gpu; results.md and results.json there, a log per step
#   scripts/first_gpu.sh --tiny [FOLDER]    the same steps with tiny models, on a CPU too: a rehearsal
#
# LIMIT_S: seconds in all (600; tiny: 3600, since other work may keep a CPU busy). PYTHON: the interpreter. A step that
# fails or runs out of time does not stop the next.
set -uo pipefail

TINY=0
if [[ ${1:-} == --tiny ]]; then
    TINY=1
    shift
fi
OUT=${1:-first-gpu}
PYTHON=${PYTHON:-python}
LIMIT_S=${LIMIT_S:-$((TINY ? 3600 : 600))}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/*.status "$OUT"/*.json
cd "$ROOT" || exit 1
BEGAN=$SECONDS

# step NAME SECONDS COMMAND...: runs the command for at most so long, and no longer than is left in all.
step() {
    local name=$1 limit=$2 left=$((LIMIT_S - SECONDS + BEGAN)) started=$SECONDS code
    shift 2
    ((TINY)) && limit=$((10 * limit))
    if ((left < 10)); then
        echo "124 0" >"$OUT/$name.status"
    else
        ((limit > left)) && limit=$left
        echo "== $name (at most $limit s)"
        timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
        code=$?
        echo "$code $((SECONDS - started))" >"$OUT/$name.status"
        echo "   exit code $code, $((SECONDS - started)) s"
    fi
    "$PYTHON" scripts/first_gpu_report.py "$OUT"
}

if [[ $TINY == 1 ]]; then
    SIZE=(--size valley-eagle-tiny)
    CHECKS=(versions speed kernels equivalence sampling)
    BENCH=(--quick --repeats 1)
    DECODE=(--questions 2 --samples 2 --new-tokens 4)
    # On a CPU they are skipped; found by name, so that nothing else is collected.
    TESTS=(tests/test_meter.py)
else
    SIZE=(--size valley-eagle-7b)
    CHECKS=()
    BENCH=(--repeats 5)
    DECODE=()
    mapfile -t TESTS < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
fi

# What is most wanted comes first: a GPU may be gone before ten minutes are.
step environment 60 "$PYTHON" -m align env
step train 150 "$PYTHON" scripts/bench_dpo.py "${SIZE[@]}" "${BENCH[@]}" --no-checkpointing --response 200 \
    --json "$OUT/train.json"
step selftest 240 "$PYTHON" -m align selftest "${CHECKS[@]}" --out "$OUT/selftest.json"
step decode 120 "$PYTHON" scripts/first_gpu_decode.py decode "${SIZE[@]}" "${DECODE[@]}" --json "$OUT/decode.json"
step tests 150 "$PYTHON" -m pytest -q -m gpu "${TESTS[@]}"
step recomputed 90 "$PYTHON" scripts/bench_dpo.py "${SIZE[@]}" "${BENCH[@]}" --checkpointing --response 200 \
    --json "$OUT/recomputed.json"
if "$PYTHON" -c 'import torchao.optim' 2>"$OUT/eight-bit.log" >&2 && [[ $TINY == 0 ]]; then
    step eight-bit 150 "$PYTHON" scripts/bench_dpo.py "${SIZE[@]}" "${BENCH[@]}" --no-checkpointing --response 200 \
        --optim adamw_torch_8bit --json "$OUT/eight-bit.json"
fi
step vllm 240 "$PYTHON" scripts/first_gpu_decode.py vllm "${SIZE[@]}" "${DECODE[@]}" --json "$OUT/vllm.json"

cat "$OUT/results.md"
