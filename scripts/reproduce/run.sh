#!/usr/bin/env bash
# Runs one of the paper's experiments: scripts/reproduce/run.sh NAME [--tiny] [ARGUMENTS]
# NAME is that of a file beside this one, such as mqar; `run.sh NAME --help` lists its arguments.
# Results go to runs/reproduce/NAME.jsonl; scripts/reproduce/report.py makes the table from them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
experiments=$(grep -l '^EXPERIMENT = ' scripts/reproduce/*.py | xargs -n1 basename -s .py | xargs)
if [[ ! " $experiments " == *" ${1:-none given} "* ]]; then
    echo "run.sh: found ${1:-no experiment}, wanted one of $experiments" >&2
    exit 2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${METALA_PYTHON:-python}" "scripts/reproduce/$1.py" "${@:2}"
