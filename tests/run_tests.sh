#!/usr/bin/env bash
# Set up the environment, check style, run the fast tests and then the slow ones; any failure is a failure.
#
#   tests/run_tests.sh                  # from any folder
#   tests/run_tests.sh --full           # series of kills, the benchmarks and, where there is a GPU, its tests too
#   tests/run_tests.sh -k tokenizer     # other arguments go to pytest
set -uo pipefail

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit 2
full=
[[ ${1:-} != --full ]] || { full=yes; shift; }

script/setup_env.sh --quiet || exit $?
python=.venv/bin/python
failed=()

check() {  # NAME COMMAND...
  echo "== $1"
  "${@:2}" < /dev/null || failed+=("$1")
}

tests() {  # pytest, for which "no test was selected" is no failure: -k may select fast or slow ones alone
  "$python" -m pytest --ignore=tests/bench "$@"
  local code=$?
  [[ $code == 5 ]] || return $code
}

known_faults() {  # of the installed packages: information, and no failure, for it is of the day and not of a change
  local options=(--local --skip-editable --progress-spinner off --timeout 15 --format json)
  { "$python" -m pip_audit "${options[@]}" 2> /dev/null || true; } | "$python" -c '
import json, sys
text = sys.stdin.read()
packages = json.loads(text)["dependencies"] if text.strip() else []
asked = [p for p in packages if "skip_reason" not in p]
for p in asked:
    for fault in p["vulns"]:
        print(p["name"], p["version"], fault["id"], "fixed in", ", ".join(fault["fix_versions"]) or "no version")
if not asked:
    print("not asked: pip-audit is not installed, or its service is not reachable from here")
else:
    print(f"asked about {len(asked)} of {len(packages)} packages; what stands above is for information")
'
}

check "style" "$python" -m ruff check .
check "format" "$python" -m ruff format --check .
# Two at a time, each file in one process: the models of the tests are too small for a second thread of their own.
check "fast tests" tests -n 2 --dist loadfile -m "not slow and not full and not gpu" "$@"
# In conftest's order: the whole run and the chaos suite go side by side, and the rest follows the shorter one.
check "slow tests" tests -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not full and not gpu" "$@"
if [[ $full ]]; then
  check "known faults of packages" known_faults
  check "series" tests -m "full" "$@"
  [[ ! -d tests/bench ]] || check "benchmarks" "$python" -m pytest tests/bench "$@"
  ! command -v nvidia-smi > /dev/null || check "GPU tests" tests -m "gpu and not slow" "$@"
fi

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
