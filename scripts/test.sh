#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest, e.g. ./scripts/test.sh tests/ops -k
# chunked. Without arguments all tests run, those of tests/hf also with the oldest transformers, and
# those of the Triton kernels in a process of their own, since Triton is told to interpret when loaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# Threads that spin while they wait slow several processes on few cores tenfold.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
status=0
if [ $# -gt 0 ]; then
  "$METALA_PYTHON" -m pytest "$@" || status=$?
else
  "$METALA_PYTHON" -m pytest --ignore tests/ops/triton || status=$?

  echo "==== the Triton kernels, where there is no GPU in Triton's interpreter"
  "$METALA_PYTHON" -m pytest tests/ops/triton || status=$?

  oldest="$VIRTUAL_ENV/transformers4"
  if ! cmp -s constraints-transformers4.txt "$oldest/constraints-transformers4.txt"; then
    rm -rf "$oldest"
    "$METALA_PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --target "$oldest" \
      -r constraints-transformers4.txt
    cp constraints-transformers4.txt "$oldest"
  fi
  echo "==== tests/hf again, with $(grep '^transformers==' constraints-transformers4.txt)"
  PYTHONPATH="$oldest" "$METALA_PYTHON" -m pytest tests/hf || status=$?
fi

echo
if [ -n "$GPT_NEOX_PATH" ]; then
  echo "==== GPT-NeoX was there: its tests RAN where they were selected ($GPT_NEOX_PATH)"
else
  echo "==== NO GPT-NeoX: ITS TESTS WERE SKIPPED. Set GPT_NEOX_PATH, or make $GPT_NEOX_URL reachable."
fi
exit "$status"
