#!/usr/bin/env bash
# From nothing to a MetaLA model that writes text: set-up, data, training, conversion, a sample and a
# picture of the loss, in runs/quickstart. Running it again reuses what is done; --fresh starts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
exec "$METALA_PYTHON" scripts/quickstart.py "$@"
