#!/usr/bin/env bash
# The complete path on a machine with two cores: text to .bin/.idx, a curriculum, a small GPT
# trained on two CPU processes (TP=2).
#
#     bash examples/quickstart/run.sh            # from any folder, any number of times
#
# All output is in out/ next to this script and is replaced each time. Flags after run.sh go to
# `chatflow train`, e.g. --train-iters 300.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../../tools/venv.sh
. "$root/tools/venv.sh"
use_environment "$root" requirements.txt

out="$here/out"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two processes share the machine
rm -rf "$out"
mkdir -p "$out/data"
cd "$here"

step() { printf '\n== %s\n' "$*"; }

preprocess() { # name of the jsonl file, name of the corpus, further flags
    python -m megatron_chatflow preprocess --input "data/$1.jsonl" --output-prefix "$out/data/$2" \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --workers 2 "${@:3}"
}

step "1. Text to Megatron's .bin/.idx"
preprocess en en --append-eod
preprocess zh zh --append-eod
preprocess en-zh enzh --append-eod --kind parallel --template $'{en}\n{zh}'
preprocess instruct instruct --kind instruct

step "2. What the curriculum means for these corpora"
length=() # the flags of the training that the plan reads too
for ((i = 1; i < $#; i++)); do
    case "${!i}" in --train-iters | --train-samples | --global-batch-size | --seq-length)
        length+=("${@:i:2}") ;;
    esac
done
python -m megatron_chatflow plan --config run.yaml --curriculum curriculum.yaml --plot "$out/plan.png" "${length[@]}"

step "3. Training on two processes"
torchrun --standalone --nproc-per-node 2 -m megatron_chatflow train --config run.yaml \
    --curriculum curriculum.yaml --save "$out/run" "$@"

python -m megatron_chatflow plot "$out/run"

step "4. What the model read in iteration 57"
python -m megatron_chatflow locate --iteration 57 --checkpoint "$out/run"

step "Done"
echo "checkpoint:  $out/run (iteration $(cat "$out/run/latest_checkpointed_iteration.txt"))"
echo "TensorBoard: $out/run/tensorboard   (tensorboard --logdir \"$out/run/tensorboard\")"
echo "metrics:     $out/run/metrics.jsonl"
echo "plots:       $out/plan.png (planned), $out/run/run.png (shares and losses of the run)"
