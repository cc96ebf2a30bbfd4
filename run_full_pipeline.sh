#!/usr/bin/env bash
# Teach MedGemma Korean medicine, from the downloads to the report. Run again, it continues where it was.
#
#   ./run_full_pipeline.sh                                      # the small demonstration model, on a CPU
#   ./run_full_pipeline.sh --model medgemma-4b --background     # the real thing; then --status
#
# The stages stand at the end, in order. Every number is in script/medgemma_korean/profiles.py.
set -euo pipefail
trap '' PIPE   # `... | head` must not kill a training

project=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
script=$project/script
python=$project/.venv/bin/python

usage() {
  cat << 'END'
Teach MedGemma Korean medicine, from the downloads to the report. Run again, it continues where it was.

  ./run_full_pipeline.sh                                      the small demonstration model, on a CPU
  ./run_full_pipeline.sh --model medgemma-4b --background     the real thing

what
  --model M            tiny (default), medgemma-4b, medgemma-27b
  --data-dir D         folder that holds 01_raw (default: the model's own)
  --name N             name of the run (default: the model, or <model>-<folder of D>)
  --from S, --to S     first and last stage: download refine prepare_tokenizer add_lora train_00 train_01
                       add_lora_second train_02 report (a unique prefix will do)
  --skip-00, --skip-01, --skip-02
                       leave a training out; --skip-01 needs no dictionary and no sentence pairs
  --no-veterinary      leave the animal dictionary out
how
  --epochs-00 N, --epochs-01 N, --epochs-02 N
                       passes over the data of a training (default: the model's profile)
  --max-samples N      train on at most N rows in each training
  --new-tokens N|auto  most new tokens of the tokenizer; 0 keeps the base vocabulary, auto obeys the verdict
  --min-count N        times the training text must hold a new token
  --device D           cuda:0, cpu, ... (default: cuda:0 where there is one, else cpu)
  --precision P        of the frozen base: 8bit, nf4, bf16, fp32 (default: what a probe of the base allows)
  --processes N        train on N cards; --shard divides the base between them, with bf16
  --force              redo what differs from its record; old results are kept as .previous
  --allow-regression   go on where a gate fails
  --no-test            leave the test split closed, which the report else opens for what stage 02 made
operation
  --background         return at once; the run goes on when you log out
  --status [--json]    how the run is going, or how it ended, why, and what to do
  --stop [now]         end the run with its state saved, or at once with its last checkpoint; the same command continues
  --on-finish COMMAND  run a shell command (60 s at most) when the run ends, however it ends; in its environment
                       MEDGEMMA_KOREAN_OUTCOME (done, gate, failed, interrupted), MEDGEMMA_KOREAN_CODE, and
                       MEDGEMMA_KOREAN_RUN, MEDGEMMA_KOREAN_LAST_STAGE, MEDGEMMA_KOREAN_MESSAGE, MEDGEMMA_KOREAN_LOG
  --plan               what a run would do, without doing it
  --verify             re-hash everything that is complete, and check that it belongs together
  --help               this

A run writes data/02_refined, model/ and logs/ (below MEDGEMMA_KOREAN_ROOT where that is set).
Exit codes: 0 done, 1 a bug, 2 usage, input or environment, 3 a gate failed, 130 interrupted with the state saved.
END
}

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# options ------------------------------------------------------------------------------------------------

mode=run
json=() now=()
on_finish=
run=()                                   # which run: every program takes these
range=()                                 # for plan.py alone
force=() regression=() device=() samples=() skip_01=() veterinary=() no_test=()
epochs_00=() epochs_01=() epochs_02=() tokens=() precision=() launch=() shard=()
given=("$@")

set_mode() { [[ $mode == run ]] || die "--$mode and $1 exclude each other; leave one out"; mode=${1#--}; }

while (($#)); do
  case $1 in --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case $1 in
    --model | --data-dir | --name | --from | --to | --device | --max-samples | --epochs-0[012] | --new-tokens | \
      --min-count | --precision | --processes | --on-finish)
      [[ $# -ge 2 && $2 != --* ]] || die "$1 needs a value; see --help" ;;
  esac
  case $1 in
    --model | --data-dir | --name) run+=("$1" "$2"); shift ;;
    --from | --to) range+=("$1" "$2"); shift ;;
    --device) device=("$1" "$2"); shift ;;
    --max-samples) samples=("$1" "$2"); shift ;;
    --new-tokens | --min-count) tokens+=("$1" "$2"); shift ;;
    --precision) precision=("$1" "$2"); shift ;;
    --processes)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || die "--processes $2: not a number of processes; give 1 or more"
      [[ $2 == 1 ]] || launch=("$script/operate/launch.py" "$2")
      shift ;;
    --shard) shard=("$1") ;;
    --epochs-00) epochs_00=(--epochs "$2"); range+=("$1" "$2"); shift ;;
    --epochs-01) epochs_01=(--epochs "$2"); range+=("$1" "$2"); shift ;;
    --epochs-02) epochs_02=(--epochs "$2"); range+=("$1" "$2"); shift ;;
    --skip-00 | --skip-02) range+=("$1") ;;
    --skip-01) range+=("$1"); skip_01=("$1") ;;
    --no-veterinary) veterinary=("$1") ;;
    --force) force=("$1") ;;
    --allow-regression) regression=("$1") ;;
    --no-test) no_test=("$1") ;;
    --json) json=("$1") ;;
    --on-finish) on_finish=$2; shift ;;
    --stop) set_mode "$1"; [[ ${2-} != now ]] || { now=(now); shift; } ;;
    --background | --status | --plan | --verify) set_mode "$1" ;;
    --help | -h) usage; exit 0 ;;
    *) die "$1: no such option; see --help" ;;
  esac
  shift
done
[[ ${#json[@]} == 0 || $mode == status ]] || die "--json goes with --status; ask --status --json"
[[ ! $on_finish || $mode =~ ^(run|background)$ ]] || die "--on-finish goes with a run; leave --$mode out"
[[ ${#shard[@]} == 0 || ${#launch[@]} -gt 0 ]] || die "--shard goes with --processes N"
[[ ${#shard[@]} == 0 || ${#precision[@]} -gt 0 ]] || precision=(--precision bf16)   # 8-bit weights cannot be divided
training=("${precision[@]}" "${shard[@]}")
asked=("${run[@]}" "${range[@]}" "${samples[@]}" "${device[@]}" "${force[@]}" "${regression[@]}")
asked+=("${tokens[@]}" "${precision[@]}" "${veterinary[@]}")
[[ ${#launch[@]} == 0 ]] || asked+=(--processes "${launch[1]}" "${shard[@]}")

# environment and operation ------------------------------------------------------------------------------

[[ -x $python && $mode =~ ^(status|stop)$ ]] || "$script/setup_env.sh" --quiet

case $mode in
  # These two answer although the set-up is out of date, for instance after the folder was moved.
  status | stop) PYTHONPATH=$script exec "$python" "$script/operate/$mode.py" "${run[@]}" "${json[@]}" "${now[@]}" ;;
  verify) exec "$python" "$script/operate/$mode.py" "${run[@]}" ;;
  plan) exec "$python" "$script/operate/plan.py" "${asked[@]}" ;;
esac

# name, log, pid, lock, progress, chosen, skipped, demonstration: folder names are spelled in paths.py alone.
answers=$("$python" "$script/operate/plan.py" "${asked[@]}" --paths) || exit $?
name='' log='' pid='' lock='' progress='' chosen='' skipped='' demonstration=''
while IFS='=' read -r key value; do printf -v "$key" '%s' "$value"; done <<< "$answers"

note() { "$python" "$script/operate/note.py" "${run[@]}" "$@"; }

# One run of a name. The lock ends with the processes that hold it; who they are stands in a file beside it. The
# driver of a background run is handed the lock, open.
mkdir -p "$(dirname "$log")" 2> /dev/null ||
  die "$(dirname "$log") cannot be made; move it away, or set MEDGEMMA_KOREAN_ROOT to another folder"
[[ /proc/$$/fd/9 -ef $lock ]] || exec 9>> "$lock" || exit 2
locked=0
flock --nonblock --conflict-exit-code 75 9 || locked=$?
if [[ $locked == 75 ]]; then
  exec 9>&-
  die "$(note holder --locked)"
elif [[ $locked != 0 ]]; then   # a disk without locks: the file beside it must do
  holder=$(note holder)
  [[ ! $holder ]] || die "$holder"
fi

if [[ $mode == background ]]; then
  arguments=()
  for argument in "${given[@]}"; do [[ $argument == --background ]] || arguments+=("$argument"); done
  # A shell's background jobs ignore SIGINT for good, unless what starts them sets it back.
  heed='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])'
  setsid nohup "$python" -c "$heed" "$BASH" "$project/run_full_pipeline.sh" "${arguments[@]}" < /dev/null > /dev/null 2>> "$log" &
  driver=$!
  exec 9>&-
  # It has begun when it has written its pid; a start that fails says why in the log.
  for _ in {1..200}; do
    [[ $(cat "$pid" 2> /dev/null) != "$driver" ]] || break
    kill -0 "$driver" 2> /dev/null || { code=0; wait "$driver" || code=$?; tail -n 3 "$log" >&2; exit "$code"; }
    sleep 0.05
  done
  [[ ! $demonstration ]] || echo "$demonstration"
  which=$(printf ' %q' "${run[@]}")
  [[ ${#run[@]} -gt 0 ]] || which=
  printf '%s\n' "run $name started in the background, pid $driver" \
    "  watch   tail -F $(printf %q "$log")" \
    "          cat $(printf %q "$progress")" \
    "          ./run_full_pipeline.sh$which --status" \
    "  stop    ./run_full_pipeline.sh$which --stop     (the same command continues)"
  exit 0
fi

# the driver ---------------------------------------------------------------------------------------------

say() {  # to the terminal, and with the time to the log, as the programs do; a closed terminal is no reason to end
  printf '%s\n' "$*" || true
  printf '%(%Y-%m-%d %H:%M:%S)T pipeline: %s\n' -1 "$*" >> "$log" || true
} 2> /dev/null

# What is to be written down is, whatever signals come meanwhile and however full the disk is.
note_stage() { (trap '' TERM INT HUP; note stage --stage "$@") || true; }

last_stage='' message='ended by a bug of the driver' why=''
child='' heart='' stopping=''
# shellcheck disable=SC2329   # the trap calls it
on_signal() {
  stopping=yes
  [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true
}

told() {  # run the command of --on-finish; what it prints goes to the log as a program's words do, secrets masked
  local output result=0
  output=$(mktemp) || output=/dev/null
  MEDGEMMA_KOREAN_OUTCOME=$outcome MEDGEMMA_KOREAN_CODE=$code MEDGEMMA_KOREAN_RUN=$name \
    MEDGEMMA_KOREAN_LAST_STAGE=$last_stage MEDGEMMA_KOREAN_MESSAGE=$message${why:+: $why} MEDGEMMA_KOREAN_LOG=$log \
    timeout --kill-after=5 60 "$BASH" -c "$on_finish" < /dev/null > "$output" 2>&1 || result=$?
  note words < "$output"
  [[ $output == /dev/null ]] || rm -f "$output"
  [[ $result == 0 ]] || say "warning: the command of --on-finish ended with exit code $result"
}

# shellcheck disable=SC2329   # the trap calls it
at_end() {
  local code=$? outcome=failed
  trap - EXIT
  trap : TERM INT HUP   # a handler that does nothing, unlike an ignored signal, is not passed on to the command below
  case $code in 0) outcome="done" ;; 3) outcome=gate ;; 130) outcome=interrupted ;; esac
  [[ ! $heart ]] || kill "$heart" 2> /dev/null || true
  (trap '' TERM INT HUP; note end --pid $$ --stage "$last_stage" --code "$code" --message "$message") || true
  [[ $(cat "$pid" 2> /dev/null) != "$$" ]] || rm -f "$pid" || true   # a failure here would be the exit code of the run
  exec 9>&-   # the command may start the next run
  [[ ! $on_finish ]] || told || true
  exit "$code"
}

finish() {  # CODE MESSAGE
  message=$2
  say "$2"
  [[ ! $demonstration ]] || say "$demonstration"
  exit "$1"
}

stage() {  # NAME PROGRAM [ARGUMENT...]: run one stage, unless it is skipped or out of the range
  local stage=$1 program=$2 code=0 several=()
  shift 2
  [[ $program != train/* ]] || several=("${launch[@]}")
  [[ " $chosen " == *" $stage "* && " $skipped " != *" $stage "* ]] || return 0
  [[ ! $stopping ]] || finish 130 "interrupted before $stage; the same command continues"
  say "== $stage"
  last_stage=$stage
  note_stage "$stage" --state running --pid $$
  # Its own session: Ctrl-C reaches the driver alone, which tells the stage once. A second signal would end it
  # before its checkpoint is saved. It keeps the lock open, so that an orphan does not look like a free lock.
  MEDGEMMA_KOREAN_STAGE=$stage \
    setsid "$python" "${several[@]}" "$script/$program" "${run[@]}" "${force[@]}" "$@" < /dev/null &
  child=$!
  [[ ! $stopping ]] || kill -TERM "$child" 2> /dev/null || true   # the signal came before there was a child
  wait "$child" || code=$?
  # A signal ends `wait` early, with a code of its own; the stage's own code is had when it is gone.
  while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done
  if [[ $stopping ]]; then
    # A signal that comes just when bash reaps the child makes it forget that: it would wait for the heart, for ever.
    code=130
    [[ $'\n'$(jobs -rp)$'\n' == *$'\n'$child$'\n'* ]] || { code=0; wait "$child" || code=$?; }
  fi
  # A program that was killed, or interrupted while it started another one, could not end what it had begun.
  ((code == 0)) || kill -KILL -- "-$child" 2> /dev/null || true
  child=
  # 143, 129: SIGTERM or SIGHUP came before the program was ready to catch it; 137 after a signal: --stop now.
  [[ $code != 143 && $code != 129 && ! ($stopping && $code == 137) ]] || code=130
  case $code in
    0) note_stage "$stage" --state complete ;;
    3) why=$(note_stage "$stage" --state gate --code 3); finish 3 "stopped at $stage by its gate" ;;
    130) note_stage "$stage" --state interrupted; finish 130 "interrupted in $stage; the same command continues" ;;
    1 | 2) why=$(note_stage "$stage" --state failed --code "$code"); finish "$code" "stopped at $stage (exit code $code)" ;;
    *)   # it could not say itself why it ended
      why=$(note_stage "$stage" --state failed --code "$code")
      say "error: $stage: $why"
      [[ $code =~ ^(126|127|137)$ ]] && code=2 || code=1
      finish "$code" "stopped at $stage" ;;
  esac
}

trap on_signal TERM INT HUP
typed=./run_full_pipeline.sh before=''
for argument in "${given[@]}"; do
  case $before:$argument in   # the command may hold a password
    --on-finish:*) argument=... ;;
    *:--on-finish=*) argument=--on-finish=... ;;
  esac
  before=$argument typed+=" $(printf %q "$argument")"
done
stale=$(note begin --pid $$ --stages "$chosen" --command "$typed") || exit $?
trap at_end EXIT
"$python" "$script/operate/note.py" "${run[@]}" alive --pid $$ > /dev/null 2>&1 9>&- &
heart=$!
[[ ! $stale ]] || say "$stale"
[[ ! $demonstration ]] || say "$demonstration"
say "run $name: ${chosen// /, }${skipped:+; without ${skipped// /, }}; log $log"
for skip in $skipped; do note_stage "$skip" --state skipped; done

# the stages ---------------------------------------------------------------------------------------------
{ # Bash reads a block as a whole before it runs: this file may be replaced in the days that follow.

# Get the data and the base model, or check what is there already.
stage download download/download_all.py "${skip_01[@]}"

# Clean, filter, de-duplicate and decontaminate the data.
stage refine refine/refine_all.py "${skip_01[@]}" "${veterinary[@]}"

# Extend the tokenizer for Korean medicine.
stage prepare_tokenizer model/prepare_tokenizer.py "${tokens[@]}"

# Give the base model the new token rows and the first adapter; score it before and after.
stage add_lora model/add_lora.py "${device[@]}" "${precision[@]}" "${regression[@]}"

# Stage 00: continued pre-training on Korean plain text.
stage train_00 train/train_00_plain_text.py "${device[@]}" "${training[@]}" "${regression[@]}" "${samples[@]}" "${epochs_00[@]}"

# Stage 01: the medical dictionary and translation.
stage train_01 train/train_01_medical_dict.py "${device[@]}" "${training[@]}" "${regression[@]}" "${samples[@]}" "${epochs_01[@]}"

# Merge what was trained, and put the second adapter on it.
stage add_lora_second model/add_lora.py --second "${device[@]}" "${precision[@]}" "${regression[@]}"

# Stage 02: exam questions.
stage train_02 train/train_02_kor_med_test.py "${device[@]}" "${training[@]}" "${regression[@]}" "${samples[@]}" "${epochs_02[@]}"

# Write the report, the test split's scores among it, and print the final table.
stage report evaluate/report.py "${device[@]}" "${no_test[@]}"

[[ ! $stopping ]] || finish 130 "interrupted after the last stage; the same command continues"
finish 0 "run $name: done"
}
