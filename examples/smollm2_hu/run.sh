#!/usr/bin/env bash
# An English model learns Hungarian on two cores without growing: Hungarian tokens replace the 500
# least used tokens of SmolLM2-135M's tokenizer. A curriculum from English to Hungarian to
# instructions, compared with the original model in bits per byte, and written back for transformers.
#
#     bash examples/smollm2_hu/run.sh --short    # a small run, to see that everything works
#     bash examples/smollm2_hu/run.sh            # everything
#
# Needs a Debian system (apt-get download) and pip. All output is in out/ next to this script, except
# the model, which examples/smollm2_zh shares; model and corpora are fetched once. Flags go to
# `chatflow train`, e.g. --train-iters 20.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../../tools/venv.sh
. "$root/tools/venv.sh"
use_environment "$root" requirements-dev.txt
# shellcheck source-path=SCRIPTDIR source=../smollm2_zh/steps.sh
. "$root/examples/smollm2_zh/steps.sh"

sizes "${1:-}"
if [ "${1:-}" = --short ]; then shift; fi
model="$shared/out/smollm2"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # one process on both cores
cd "$here"
mkdir -p out

step "1. Model and corpora"
[ -f "$model/NOTICE" ] || python "$shared/fetch_model.py" "$model"
[ -f out/corpora/hu.jsonl ] || python "$shared/fetch_corpora.py" out/corpora --hungarian
rm -rf out/data out/tokenizer out/base out/run out/smollm2-hu
mkdir -p out/data
hold_out "$held" en hu
unseen out/corpora/en-hu.jsonl out/data/pairs.jsonl
python translations.py out/data/pairs.jsonl out/data/en-hu.jsonl out/data/instruct.jsonl

step "2. A tokenizer with Hungarian tokens instead of the least used ones"
python -m megatron_chatflow tokenizer extend --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model "$model" --input out/data/hu.jsonl --base-input out/data/en.jsonl \
    --held-out hu=out/data/hu_test.jsonl en=out/data/en_test.jsonl --replace \
    --new-tokens "$tokens" --output out/tokenizer

step "3. Model and tokenizer together: new rows are means of the rows of their pieces"
python -m megatron_chatflow convert --load-dir "$model" --save-dir out/base \
    --tokenizer-folder out/tokenizer --new-rows mean

step "4. Text to Megatron's .bin/.idx"
preprocess out/data/en.jsonl en --append-eod
preprocess out/data/hu.jsonl hu --append-eod
preprocess out/data/en-hu.jsonl enhu --append-eod --kind parallel --template $'{en}\n{hu}'
preprocess out/data/instruct.jsonl instruct --kind instruct --template chatml

train_and_compare hu "$model" 'A Linux rendszerben' "$@"
