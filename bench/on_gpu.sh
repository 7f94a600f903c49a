#!/usr/bin/env bash
# Everything that wants a GPU, in one command: bash bench/on_gpu.sh OUT_DIR [--dry-run]
#
# Installs the package from this checkout without a network, runs the tests that need a device, looks for races (by repeats, and with
# compute-sanitizer where there is one), runs the suites and a profiler pass, and leaves four files in OUT_DIR: log.txt, rows.jsonl
# (`python -m bench import OUT_DIR` files it), profile.txt and stages.txt. Run again with the same OUT_DIR it goes on where it was:
# stages.txt names those that ended, and rows that are there are not measured again. --dry-run does the same on the CPU at toy
# sizes. MINUTES (9) is the time it has. In a copy of the checkout without its history, VISATTN_COMMIT says which commit it is.
set -uo pipefail
cd "$(dirname "$0")/.."
USAGE="usage: bash bench/on_gpu.sh OUT_DIR [--dry-run]"
OUT=$(mkdir -p "${1:?$USAGE}" && cd "$1" && pwd)
PYTHON=${PYTHON:-python3}
DEADLINE=$((SECONDS + ${MINUTES:-9} * 60))
FAILED=0

case ${2:-} in
  --dry-run) TESTS=(--collect-only tests/test_gpu.py) RACES=(--collect-only) SIZE=(--toy --device cpu) ;;
  "") TESTS=(-n 8 -m "gpu or kernels" -k "not TestOnTheDevice" tests) RACES=() SIZE=() ;;
  *) echo "$USAGE" >&2 && exit 2 ;;
esac

# stage NAME SECONDS COMMAND…: runs a command that may take SECONDS, unless it ended before or too little time is left.
stage() {
  local name=$1 limit=$2 rest=$((DEADLINE - SECONDS)) code
  shift 2
  grep -qsx "$name" "$OUT/stages.txt" && echo "$name: ended before" && return
  [ "$rest" -lt 15 ] && echo "$name: no time left, run again" && FAILED=1 && return
  echo "== $name" >>"$OUT/log.txt"
  timeout "$((limit < rest ? limit : rest))" "$@" >>"$OUT/log.txt" 2>&1
  code=$?
  if [ "$code" -eq 0 ]; then echo "$name" >>"$OUT/stages.txt"; else FAILED=1; fi
  echo "$name: $([ "$code" -eq 0 ] && echo ended || echo "failed with $code"), $(tail -n 1 "$OUT/log.txt")"
}

stage install 120 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --editable .
stage environment 60 "$PYTHON" -m bench env
stage tests 210 "$PYTHON" -m pytest -q "${TESTS[@]}"
stage races 120 "$PYTHON" -m pytest -q "${RACES[@]}" tests/test_state.py::TestOnTheDevice
stage cifar 150 "$PYTHON" -m bench run "${SIZE[@]}" --suite cifar --provider naive sdpa visattn --out "$OUT"
stage large 90 "$PYTHON" -m bench run "${SIZE[@]}" --suite large --provider naive sdpa visattn --out "$OUT"
stage models 90 "$PYTHON" -m bench run "${SIZE[@]}" --suite models --out "$OUT"
stage profile 60 "$PYTHON" -m bench profile "${SIZE[@]}" --out "$OUT"
stage sanitizer 90 "$PYTHON" -m tests.reliability.sanitized
stage compiled 300 "$PYTHON" -m bench run "${SIZE[@]}" --suite cifar --out "$OUT"
exit "$FAILED"
