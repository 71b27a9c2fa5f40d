#!/usr/bin/env bash
# Sets up everything that the quickstart and the tests need. It can be run again at any time.
#   - a virtual environment: the active one, else .venv (made with $PYTHON, by default python3)
#   - this package and its dependencies, in the versions of constraints.txt; an installed torch is kept
#   - GPT-NeoX: $GPT_NEOX_PATH, else a clone of the tested commit in third_party/gpt-neox. Without
#     GPT-NeoX, and with METALA_ENGINE=trainer, the Hugging Face Trainer takes its place.
# When sourced, it also activates the environment and sets METALA_PYTHON (its interpreter) and
# GPT_NEOX_PATH (empty for the Hugging Face Trainer).
set -euo pipefail

METALA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
GPT_NEOX_URL="${GPT_NEOX_URL:-https://github.com/EleutherAI/gpt-neox}"

say() { echo "set-up: $*"; }
fail() { echo "set-up: $*" >&2; exit 1; }

if [ "$0" = "${BASH_SOURCE[0]}" ] && [ $# -gt 0 ]; then fail "found $*, wanted no arguments"; fi

wants_trainer() { [ "${METALA_ENGINE:-}" = trainer ]; }
if [ -n "${METALA_ENGINE:-}" ] && ! wants_trainer; then
  fail "METALA_ENGINE: found $METALA_ENGINE, wanted trainer or nothing"
fi

make_environment() {
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    VIRTUAL_ENV="$METALA_ROOT/.venv"
    if [ ! -x "$VIRTUAL_ENV/bin/python" ]; then
      local python="${PYTHON:-python3}" options=()
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is missing or older than Python 3.10; name another by PYTHON="
      # A container's own torch fits its driver, so do not install another.
      if "$python" -c 'import torch' 2>/dev/null; then options=(--system-site-packages); fi
      say "making $VIRTUAL_ENV"
      "$python" -m venv ${options[@]+"${options[@]}"} "$VIRTUAL_ENV" || {
        rm -rf "$VIRTUAL_ENV"
        fail "python -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
      }
    fi
  fi
  export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
  METALA_PYTHON="$VIRTUAL_ENV/bin/python"
}

# Prints pip's option for torch without CUDA on a Linux machine without a GPU, to save gigabytes.
cpu_torch_index() {
  local url=https://download.pytorch.org/whl/cpu
  if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && "$METALA_PYTHON" -c \
    "import urllib.request as r; r.urlopen('$url/torch/', timeout=5)" 2>/dev/null; then
    echo "--extra-index-url=$url"
  fi
}

pip_install() {
  "$METALA_PYTHON" -m pip install -qq --disable-pip-version-check -c "$1" "${@:2}"
}

install_package() {
  local stamp="$VIRTUAL_ENV/.metala-set-up" key constraints torch
  key="$(cat "$METALA_ROOT"/{constraints.txt,setup.py,scripts/setup.sh} | cksum) $METALA_ROOT"
  if [ -f "$stamp" ] && [ "$(head -1 "$stamp")" = "$key" ]; then
    NEOX_INSTALLED="$(tail -1 "$stamp")"
    # Tries a failed installation again: the network or a compiler may be there by now.
    if [ "$NEOX_INSTALLED" = yes ] || wants_trainer; then return; fi
  fi
  constraints="$(mktemp)"
  torch="$("$METALA_PYTHON" -c 'import torch; print(torch.__version__)' 2>/dev/null || true)"
  if [ -n "$torch" ]; then
    say "keeping torch $torch"
    sed "s/^torch==.*/torch==$torch/" "$METALA_ROOT/constraints.txt" >"$constraints"
  else
    say "installing torch"
    cp "$METALA_ROOT/constraints.txt" "$constraints"
    pip_install "$constraints" torch $(cpu_torch_index)
  fi
  say "installing packages (minutes, once)"
  pip_install "$constraints" setuptools
  # DeepSpeed's build imports the installed torch.
  pip_install "$constraints" --no-build-isolation -e "$METALA_ROOT[hf,wandb,dev]"
  NEOX_INSTALLED=yes
  pip_install "$constraints" --no-build-isolation -e "$METALA_ROOT[neox]" || NEOX_INSTALLED=no
  rm -f "$constraints"
  printf '%s\n%s\n' "$key" "$NEOX_INSTALLED" >"$stamp"
}

# Runs a command with a time limit, or without where the system has no `timeout`.
within() {
  if command -v timeout >/dev/null; then timeout "$@"; else "${@:2}"; fi
}

# Fetches only the tested commit. Gives up within seconds where the network is unreachable.
clone_neox() {
  local target="$1" commit="$2" temporary="$1.part"
  export GIT_TERMINAL_PROMPT=0
  within 15 git ls-remote --quiet "$GPT_NEOX_URL" HEAD >/dev/null 2>&1 || return 1
  say "cloning $GPT_NEOX_URL"
  rm -rf "$temporary"
  mkdir -p "$temporary"
  git -C "$temporary" init --quiet &&
    within 300 git -C "$temporary" fetch --quiet --depth 1 "$GPT_NEOX_URL" "$commit" &&
    git -C "$temporary" checkout --quiet FETCH_HEAD &&
    rm -rf "$target" &&
    mv "$temporary" "$target" && return
  rm -rf "$temporary"
  return 1
}

find_neox() {
  local given="${GPT_NEOX_PATH:-}" clone="$METALA_ROOT/third_party/gpt-neox" commit
  commit="$(sed -n 's/^TESTED_COMMIT = "\(.*\)"/\1/p' "$METALA_ROOT/megatron_patch/commands/link_neox.py")"
  GPT_NEOX_PATH=""
  if wants_trainer; then
    say "Hugging Face Trainer, as METALA_ENGINE says"
  elif [ "$NEOX_INSTALLED" != yes ]; then
    say "Hugging Face Trainer: what GPT-NeoX needs could not be installed (see above)"
  elif ! command -v make >/dev/null || ! command -v g++ >/dev/null; then
    say "Hugging Face Trainer: GPT-NeoX compiles a helper, and there is no make or g++"
  elif [ -n "$given" ]; then
    GPT_NEOX_PATH="$given"
  elif [ "$(git -C "$clone" rev-parse HEAD 2>/dev/null)" = "$commit" ] ||
    clone_neox "$clone" "$commit" || [ -e "$clone/train.py" ]; then
    GPT_NEOX_PATH="$clone"
  else
    say "Hugging Face Trainer: cannot clone $GPT_NEOX_URL (GPT_NEOX_PATH can name a checkout)"
  fi
  if [ -n "$GPT_NEOX_PATH" ]; then
    GPT_NEOX_PATH="$(cd "$GPT_NEOX_PATH" 2>/dev/null && pwd)" || fail "GPT_NEOX_PATH: no folder $given"
    "$METALA_PYTHON" "$METALA_ROOT/scripts/link_neox.py" "$GPT_NEOX_PATH"
  fi
  export GPT_NEOX_PATH
}

make_environment
install_package
find_neox
say "ready: $("$METALA_PYTHON" --version), $VIRTUAL_ENV, engine ${GPT_NEOX_PATH:-Hugging Face Trainer}"
