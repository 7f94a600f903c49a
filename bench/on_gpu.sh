#!/usr/bin/env bash
# Everything that wants a GPU, in one command: bash bench/on_gpu.sh OUT_DIR [FROM_DIR] [--dry-run]
#
# Installs the package from this checkout without a network, compiles what the suites launch in as many processes as there are cores,
# runs the suites, the tests that need a device, a profiler pass, and looks for races (by repeats, and with compute-sanitizer where
# there is one). Leaves four files in OUT_DIR: log.txt, rows.jsonl (`python -m bench import OUT_DIR` files it), profile.txt and
# stages.txt. Run again with the same OUT_DIR it goes on where it was: stages.txt names those that ended, and rows that are there are
# not measured again. In a new OUT_DIR it goes on from FROM_DIR, the files of an earlier run, which are copied first; then it installs
# and compiles anew. --dry-run does the same on the CPU at toy sizes.
#
# MINUTES (9) is the time it has. What is missed most comes first, for a quarter of an hour in two halves. MINUTES=5: everything
# compiled (1), a first look at whether results are right (1), the CIFAR suite and the model that a target is set for (3). MINUTES=7
# goes on: large maps (1), all tests (4), profiles, models; races, the sanitizer and compiled peers have what is left.
#
# Every row has to come from a commit, or it cannot be filed. In a copy of the checkout without its history VISATTN_COMMIT names it.
set -uo pipefail
cd "$(dirname "$0")/.."
fail() { echo "on_gpu.sh: $1" >&2 && exit 2; }
USAGE="usage: bash bench/on_gpu.sh OUT_DIR [FROM_DIR] [--dry-run]"
PYTHON=${PYTHON:-python3}
DEADLINE=$((SECONDS + ${MINUTES:-9} * 60))
FAILED=0
CORES=$(nproc)
PARALLEL=(-n "$((CORES > 2 ? CORES - 2 : 1))")
export PYTHONUNBUFFERED=1 # or what a stage has said is lost when its time is over

LOOK=("${PARALLEL[@]}" -m "gpu or kernels" -k "test_gpu or test_branch_and_gradients and bfloat16" tests/test_gpu.py tests/test_correctness.py)
TESTS=("${PARALLEL[@]}" -m "gpu or kernels" -k "not TestOnTheDevice" --ignore tests/test_gpu.py tests)
RACES=("${PARALLEL[@]}" tests/test_state.py::TestOnTheDevice)
SIZE=()
PROFILED=("attention 64×64×32×32" "attention 64×128×8×8 "{float32,bf} "attention 64×256×32×32 bf" "sagan 64×64×32×32 bf")
COMPILED=("attention 64×64×32×32 bf" "attention 64×128×8×8 bf")
DRY=
if [ "${*: -1}" = --dry-run ]; then
  DRY=yes
  set -- "${@:1:$#-1}"
  LOOK=(--collect-only tests/test_gpu.py) TESTS=("${LOOK[@]}") RACES=(--collect-only tests/test_state.py::TestOnTheDevice)
  SIZE=(--toy --device cpu) PROFILED=(attention) COMPILED=(attention)
fi
[ $# -eq 1 ] || [ $# -eq 2 ] || fail "$USAGE"

COMMIT=$("$PYTHON" -c "from visattn import provenance; print(provenance.commit())")
if [ -z "$DRY" ]; then
  case $COMMIT in
    "" | None | *+)
      fail "expected a commit that rows can be filed under, got '$COMMIT': commit what has changed, or without history set VISATTN_COMMIT"
      ;;
  esac
fi

OUT=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
if [ $# -eq 2 ] && [ ! -e "$OUT/stages.txt" ]; then
  [ -e "$2/stages.txt" ] || fail "expected the OUT_DIR of an earlier run as FROM_DIR, but $2 holds no stages.txt"
  for name in log.txt rows.jsonl profile.txt; do
    [ -e "$2/$name" ] && cat "$2/$name" >"$OUT/$name"
  done
  grep -vx -e install -e warm "$2/stages.txt" >"$OUT/stages.txt"
fi

# stage NAME SECONDS COMMAND…: runs a command that may take SECONDS, unless it ended before or too little time is left. One whose device
# has died (75, or a signal on its way out) is run again, up to five times, since it goes on where it was.
stage() {
  local name=$1 end=$((SECONDS + $2)) try rest code=0
  shift 2
  grep -qsx "$name" "$OUT/stages.txt" && echo "$name: ended before" && return
  echo "== $name" >>"$OUT/log.txt"
  for try in 1 2 3 4 5; do
    rest=$(((end < DEADLINE ? end : DEADLINE) - SECONDS))
    [ "$rest" -lt 15 ] && echo "$name: no time left, run again" && FAILED=1 && return
    timeout -s INT -k 15 "$rest" "$@" >>"$OUT/log.txt" 2>&1
    code=$?
    [ "$code" -eq 75 ] || { [ "$code" -gt 128 ] && [ "$code" -ne 137 ]; } || break
    echo "$name: try $try ended with $code, $(tail -n 1 "$OUT/log.txt")"
  done
  if [ "$code" -eq 0 ]; then echo "$name" >>"$OUT/stages.txt"; else FAILED=1; fi
  echo "$name: $([ "$code" -eq 0 ] && echo ended || echo "failed with $code"), $(tail -n 1 "$OUT/log.txt")"
}

EAGER=(naive sdpa visattn)
stage install 120 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --editable .
stage environment 60 "$PYTHON" -m bench env
stage warm 120 "$PYTHON" -m bench warm "${SIZE[@]}"
stage look 90 "$PYTHON" -m pytest -v --tb=short "${LOOK[@]}"
stage cifar 180 "$PYTHON" -m bench run "${SIZE[@]}" --suite cifar --provider "${EAGER[@]}" --out "$OUT"
stage early 60 "$PYTHON" -m bench run "${SIZE[@]}" --suite models --case cnn_early_attention --out "$OUT"
stage large 90 "$PYTHON" -m bench run "${SIZE[@]}" --suite large --provider "${EAGER[@]}" --out "$OUT"
stage tests 300 "$PYTHON" -m pytest -v --tb=short "${TESTS[@]}"
stage profile 60 "$PYTHON" -m bench profile "${SIZE[@]}" --case "${PROFILED[@]}" --out "$OUT"
stage models 120 "$PYTHON" -m bench run "${SIZE[@]}" --suite models --out "$OUT"
stage races 120 "$PYTHON" -m pytest -v --tb=short "${RACES[@]}"
stage sanitizer 120 "$PYTHON" -m tests.reliability.sanitized
stage compiled 300 "$PYTHON" -m bench run "${SIZE[@]}" --suite cifar --case "${COMPILED[@]}" --out "$OUT"
exit "$FAILED"
