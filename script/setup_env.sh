#!/usr/bin/env bash
# Make .venv in the project folder and install requirements.txt into it; does nothing when it is up to date.
#
#   script/setup_env.sh             # from any folder; an interrupted set-up is finished by running it again
#   script/setup_env.sh --quiet     # say nothing when nothing is to be done
#   TORCH_INDEX_URL=<index of torch's CPU builds> script/setup_env.sh
#
# Up to date means: .venv/.requirements.sha256 is the hash of what decides the content of .venv (below), and
# that file is written last. Exit codes: 0 done or up to date, 2 with one message, 130 interrupted.
set -euo pipefail

FREE_GB=12    # torch with its CUDA libraries, unpacked, beside the downloaded archives
UPDATE_GB=1   # the same, once torch is there
MINIMUM=3.10  # requires-python of pyproject.toml

project=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
cd "$project"   # `-e .` in requirements.txt means the current folder
venv=$project/.venv
python=$venv/bin/python
stamp=$venv/.requirements.sha256
unfinished=$venv/.unfinished   # stands while packages are being installed
quiet=
[[ ${1:-} != --quiet ]] || quiet=yes

say() { printf '%s\n' "$*" >&2; }   # not to stdout, which may be the JSON of --status
die() { say "error: $*"; exit 2; }
trap 'say "interrupted; run the same command again to finish the set-up"; exit 130' INT TERM HUP

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# True when version $1 is at least MINIMUM.
is_enough() { [[ $(printf '%s\n' "$MINIMUM" "$1" | sort -V | head -n 1) == "$MINIMUM" ]]; }

# The hash of everything that decides what .venv holds. The folder is in it because `-e .` points there.
wanted() {
  { cat requirements.txt pyproject.toml; [[ ! -f requirements-dev.txt ]] || cat requirements-dev.txt
    printf '%s\n' "${TORCH_INDEX_URL:-}" "$(version_of "$python")" "$project"; } | sha256sum | cut -d ' ' -f 1
}

is_up_to_date() { [[ -x $python && -f $stamp && $(< "$stamp") == "$(wanted)" ]]; }

# The first Python that is new enough and can make an environment.
find_python() {
  local candidate version old='' bare=''
  for candidate in python3 python3.12 python3.11 python3.10; do
    version=$(version_of "$candidate") || continue
    if ! is_enough "$version"; then
      old="$old $candidate is $version,"
    elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      bare="$candidate ($version)"
    else
      printf '%s\n' "$candidate"
      return
    fi
  done
  [[ -z $bare ]] || die "$bare cannot make a virtual environment; install the system's package python3-venv and run again"
  die "Python $MINIMUM or newer is needed;${old:- no python3 was found,} so install a newer one and run again"
}

check_disk() {
  local need=$FREE_GB free installed
  installed=("$venv"/lib/python*/site-packages/torch)
  [[ ! -d ${installed[0]} ]] || need=$UPDATE_GB
  free=$(df -Pk "$project" | awk 'NR == 2 { print int($4 / 1000000) }')
  (( free >= need )) || die "$free GB are free on the disk of $project, and the set-up needs $need GB; free some and run again"
}

make_venv() {
  # Anew, not on top: the old one is of another Python, or an interruption left half a package in it.
  "$1" -m venv --clear "$venv" || die "$1 could not make $venv (see above)"
}

# Through uv where it can be had (seconds instead of minutes), else through pip. Takes what both understand.
install() {
  if "$python" -m uv --version > /dev/null 2>&1; then
    # Compiled once, as pip does: where nothing may write bytecode, each program would compile torch's sources anew
    # (on two cores 14 s instead of 7 s before a training begins).
    "$python" -m uv pip install --compile-bytecode --python "$python" "$@" && return
    say "uv could not install; trying pip, which may know another index"
  fi
  "$python" -m pip install "$@"
}

# Both unpack only what they have whole, so a failure, unlike an interruption, leaves nothing half done.
give_up() { rm -f "$unfinished"; die "$*"; }

# True when .venv can be installed into as it is.
is_sound() {
  local version
  [[ -x $python && ! -f $unfinished ]] && version=$(version_of "$python") && is_enough "$version" &&
    [[ -d $venv/lib/python${version%.*} ]] && "$python" -m pip --version > /dev/null 2>&1
}

if is_up_to_date; then
  [[ $quiet ]] || say ".venv is up to date"
  exit 0
fi

# Two runs that start together make the environment once.
exec 8< requirements.txt
if command -v flock > /dev/null; then
  flock -n 8 || { say "another set-up is at work; waiting for it"; flock 8 || true; }
  ! is_up_to_date || exit 0
fi

started=$SECONDS
interpreter=
is_sound || interpreter=$(find_python)
check_disk
[[ -z $interpreter ]] || make_venv "$interpreter"
say "setting up .venv with Python $(version_of "$python") (the first time: some minutes, several GB)"

rm -f "$stamp"
touch "$unfinished"

"$python" -m uv --version > /dev/null 2>&1 || "$python" -m pip install --quiet uv || say "uv cannot be had; pip will do"
if [[ ${TORCH_INDEX_URL:-} ]]; then
  torch=$(grep -m 1 -oE '^torch[<>=!~][^ #]*' requirements.txt) || die "requirements.txt has no line for torch"
  install --quiet --index-url "$TORCH_INDEX_URL" "$torch" || give_up "torch could not be installed from TORCH_INDEX_URL (see above)"
fi
files=(-r requirements.txt)
[[ ! -f requirements-dev.txt ]] || files+=(-r requirements-dev.txt)
install --quiet "${files[@]}" || give_up "the packages of requirements.txt could not be installed (see above); check the connection and run again"

wanted > "$stamp.part"
rm -f "$unfinished"
mv "$stamp.part" "$stamp"
say ".venv is ready ($((SECONDS - started)) s)"
