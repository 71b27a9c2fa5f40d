#!/usr/bin/env bash
# Sets everything up and runs the tests. Arguments go to pytest, as in ./scripts/test.sh tests/ops -k
# chunked. Without arguments all tests run on up to four cores. The tests of tests/hf and of the
# Hugging Face Trainer run a second time with the oldest supported transformers, and those of
# evaluation with lm_eval. The tests of the Triton kernels have processes of their own, because Triton
# decides at its import whether to interpret.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# Threads that spin while they wait slow training tenfold when several processes share few cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# More workers would not fit a GPU. Each takes tests in their order, so most fixtures are built once.
parallel=(-n logical --maxprocesses 4 --dist worksteal)
status=0
if [ $# -gt 0 ]; then
  "$METALA_PYTHON" -m pytest "$@" || status=$?
else
  # The workers keep all cores busy.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  "$METALA_PYTHON" -m pytest "${parallel[@]}" --ignore tests/ops/triton || status=$?

  echo "==== the Triton kernels, where there is no GPU in Triton's interpreter"
  "$METALA_PYTHON" -m pytest "${parallel[@]}" tests/ops/triton || status=$?

  # install_apart LIST FOLDER: installs a list of packages once, in a folder that only some tests use.
  install_apart() {
    if ! cmp -s "$1" "$2/$1"; then
      rm -rf "$2"
      "$METALA_PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --target "$2" -r "$1"
      cp "$1" "$2"
    fi
  }

  echo "==== the Hugging Face tests again, with $(grep '^transformers==' constraints-transformers4.txt)"
  install_apart constraints-transformers4.txt "$VIRTUAL_ENV/transformers4"
  PYTHONPATH="$VIRTUAL_ENV/transformers4" "$METALA_PYTHON" -m pytest "${parallel[@]}" \
    tests/hf tests/commands/test_train_hf.py tests/trainer/test_trainer_numbers.py || status=$?

  echo "==== evaluation, with $(grep '^lm_eval==' constraints-lm_eval.txt)"
  if install_apart constraints-lm_eval.txt "$VIRTUAL_ENV/lm_eval"; then
    PYTHONPATH="$VIRTUAL_ENV/lm_eval" "$METALA_PYTHON" -m pytest "${parallel[@]}" \
      tests/scripts/test_evaluate.py tests/neox/test_evaluation.py || status=$?
  else
    rm -rf "$VIRTUAL_ENV/lm_eval"
    echo "==== ITS TESTS WERE SKIPPED: lm_eval could not be installed"
  fi
fi

echo
if [ -n "$GPT_NEOX_PATH" ]; then
  echo "==== GPT-NeoX was there: its tests RAN where they were selected ($GPT_NEOX_PATH)"
else
  echo "==== NO GPT-NeoX: ITS TESTS WERE SKIPPED. Set GPT_NEOX_PATH, or make $GPT_NEOX_URL reachable."
fi
exit "$status"
