#!/usr/bin/env bash
# The controls of run.sh: the same base model, corpora and length with constant average shares, or
# with Chinese only.
#
#     bash examples/smollm2_zh/control.sh constant            # after run.sh
#     bash examples/smollm2_zh/control.sh chinese --short     # after run.sh --short
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../../tools/venv.sh
. "$root/tools/venv.sh"
use_environment "$root" requirements-dev.txt
# shellcheck source-path=SCRIPTDIR source=steps.sh
. "$here/steps.sh"

control=${1:-}
if [ ! -f "$here/$control.yaml" ]; then
    echo "control.sh: '$control' is not a control; use constant or chinese" >&2
    exit 2
fi
shift
sizes "${1:-}"
if [ "${1:-}" = --short ]; then shift; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
cd "$here"

step "Training: $control.yaml"
rm -rf "out/$control"
settings_for "out/$control" "$control.yaml" "$@"
python -m megatron_chatflow train "${settings[@]}"

step "Comparison with the original model"
compare_with "out/$control" out/smollm2 zh
