#!/usr/bin/env bash
# Evaluates a model folder zero-shot on the seven commonsense tasks for which the MetaLA authors
# publish results, and prints its results beside theirs.
#
#   ./scripts/evaluate.sh FOLDER [options of lm_eval run, such as --limit 100 --batch_size 16]
#   TASKS=piqa,lambada_openai ./scripts/evaluate.sh FOLDER
#
# The first run downloads the tasks' data from the Hugging Face Hub. The results are kept in
# runs/evaluate/NAME-OF-FOLDER, or where --output_path says. This package builds the model; code in the folder is never run.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

folder="${1:-}"
if [ ! -f "$folder/config.json" ]; then
  echo "evaluate.sh: FOLDER: found ${folder:-none}, wanted a model's folder, with a config.json" >&2
  exit 2
fi
shift

if [ -n "${METALA_PYTHON:-}" ]; then python="$METALA_PYTHON"
elif [ -n "${VIRTUAL_ENV:-}" ]; then python="$VIRTUAL_ENV/bin/python"
elif [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"
else python=python3; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("lm_eval") is None)' || {
  echo "evaluate.sh: lm_eval is not installed: $python -m pip install 'lm_eval[hf]>=0.4.5,<0.5'" >&2
  exit 1
}

results="runs/evaluate/$(basename "$(cd "$folder" && pwd)")"
before=""
for argument in "$@"; do  # the table below shows what this evaluation writes
  case "$before" in --output_path | -o) results="$argument" ;; esac
  case "$argument" in --output_path=*) results="${argument#*=}" ;; esac
  before="$argument"
done
# The import registers MetaLA with the Auto classes, which lm_eval uses.
"$python" -c 'import megatron_patch.hf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()' \
  --model hf --model_args "pretrained=$folder" --num_fewshot 0 --batch_size auto \
  --tasks "${TASKS:-boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa}" \
  --output_path "$results" "$@"
"$python" "$root/scripts/evaluation_table.py" "$results"
