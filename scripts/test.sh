#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest, e.g. ./scripts/test.sh tests/ops -k chunked
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

status=0
"$METALA_PYTHON" -m pytest "$@" || status=$?

echo
if [ -n "$GPT_NEOX_PATH" ]; then
  echo "==== GPT-NeoX was there: its tests RAN where they were selected ($GPT_NEOX_PATH)"
else
  echo "==== NO GPT-NeoX: ITS TESTS WERE SKIPPED. Set GPT_NEOX_PATH, or make $GPT_NEOX_URL reachable."
fi
exit "$status"
