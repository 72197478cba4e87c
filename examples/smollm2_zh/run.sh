#!/usr/bin/env bash
# An English model learns Chinese on two cores: SmolLM2-135M with an extended tokenizer and a
# curriculum from English to Chinese to instructions, compared with the original model in bits per
# byte, and written back for transformers.
#
#     bash examples/smollm2_zh/run.sh --short    # about ten minutes
#     bash examples/smollm2_zh/run.sh            # everything, on all sources
#
# control.sh then repeats the training with constant shares, or with Chinese only.
#
# Needs a Debian system (apt-get download) and pip. All output is in out/ next to this script; model
# and corpora are fetched once. Flags go to `chatflow train`, e.g. --train-iters 20.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../../tools/venv.sh
. "$root/tools/venv.sh"
use_environment "$root" requirements-dev.txt
# shellcheck source-path=SCRIPTDIR source=steps.sh
. "$here/steps.sh"

sizes "${1:-}"
if [ "${1:-}" = --short ]; then shift; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # one process on both cores
cd "$here"
mkdir -p out

step "1. Model and corpora"
[ -f out/smollm2/NOTICE ] || python fetch_model.py out/smollm2
[ -f out/corpora/sources.json ] || python fetch_corpora.py out/corpora
rm -rf out/data out/tokenizer out/base out/run out/smollm2-zh
mkdir -p out/data
hold_out "$held" en zh
unseen out/corpora/en-zh.jsonl out/data/en-zh.jsonl
unseen out/corpora/instruct.jsonl out/data/instruct.jsonl

step "2. A tokenizer with Chinese tokens"
python -m megatron_chatflow tokenizer extend --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model out/smollm2 --input out/data/zh.jsonl --base-input out/data/en.jsonl \
    --held-out zh=out/data/zh_test.jsonl en=out/data/en_test.jsonl --new-tokens "$tokens" \
    --output out/tokenizer

step "3. Model and tokenizer together: new rows are means of the rows of their pieces"
python -m megatron_chatflow convert --load-dir out/smollm2 --save-dir out/base \
    --tokenizer-folder out/tokenizer --new-rows mean

step "4. Text to Megatron's .bin/.idx"
preprocess out/data/en.jsonl en --append-eod
preprocess out/data/zh.jsonl zh --append-eod
preprocess out/data/en-zh.jsonl enzh --append-eod --kind parallel --template $'{en}\n{zh}'
preprocess out/data/instruct.jsonl instruct --kind instruct --template chatml

train_and_compare zh out/smollm2 '在 Linux 系统中，' "$@"
