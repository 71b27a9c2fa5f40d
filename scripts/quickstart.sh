#!/usr/bin/env bash
# Goes from nothing to a MetaLA model that writes text: set-up, data, training, conversion, a sample
# and a picture of the loss, in runs/quickstart. A second run goes on where the first stopped;
# --fresh does not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "$*" ] && [ "$*" != --fresh ]; then
  echo "quickstart.sh: found $*, wanted --fresh or nothing" >&2
  exit 2
fi
source scripts/setup.sh
exec "$METALA_PYTHON" scripts/quickstart.py "$@"
