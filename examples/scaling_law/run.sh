#!/usr/bin/env bash
# A scaling law in miniature: models of 0.3M to 5M parameters learn Chinese, from scratch and
# continued from models that were trained on English here. Sweeps, a joint fit, a proposal, a report.
#
#     bash examples/scaling_law/run.sh --short    # minutes: the sample corpora, shorter runs
#     bash examples/scaling_law/run.sh            # the study, an hour or more on two cores
#
# It can be killed at any time; the same command continues. All output is in out/ next to this
# script. The full study needs a Debian system (apt-get download) and pip for its text, which it
# shares with examples/smollm2_zh. JOBS=N runs N trainings at a time (2 by default).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../../tools/venv.sh
. "$root/tools/venv.sh"
use_environment "$root" requirements-dev.txt

cd "$here"
shared=../smollm2_zh
tokenizer=../quickstart/tokenizer.model
if [ "${1:-}" = --short ]; then
    short=(--short) out=out/short corpora=../quickstart/data held=60000
    budgets=(1e12 1e13) shares=(replay30) length=24k
else
    short=() out=out/full corpora=$shared/out/corpora held=300000
    budgets=(1e14 1e15) shares=(replay10 replay30) length=300k
fi
jobs=${JOBS:-2}
mkdir -p "$out/data"

step() { printf '\n== %s\n' "$*"; }
chatflow() { python -m megatron_chatflow "$@"; }

step "1. Text: some documents of each language are held out"
[ -f "$corpora/zh.jsonl" ] || python $shared/fetch_corpora.py "$corpora"
for language in en zh; do
    [ -f "$out/data/$language.jsonl" ] || python $shared/hold_out.py "$corpora/$language.jsonl" \
        "$out/data/$language.jsonl" "$out/data/${language}_test.jsonl" --bytes "$held"
    for part in "$language" "${language}_test"; do
        [ -f "$out/data/${part}_text_document.json" ] || chatflow preprocess \
            --input "$out/data/$part.jsonl" --output-prefix "$out/data/$part" --append-eod \
            --tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer" --workers 1
    done
done

step "2. What will be trained"
python sweeps.py "$out" "${short[@]}"
sweeps=(english scratch continued mixtures)
for sweep in "${sweeps[@]}"; do
    echo "$sweep:"
    chatflow sweep "$out/$sweep.yaml" --dry-run
done

step "3. English models, then Chinese from scratch and continued"
for sweep in "${sweeps[@]}"; do
    chatflow sweep "$out/$sweep.yaml" --jobs "$jobs"
done

step "4. The law of Chinese, from scratch and continued jointly, for each share of replay"
for share in "${shares[@]}"; do
    chatflow fit "$out/runs/scratch/runs.csv" "$out"/runs/continued/*-"$share"-[0-9]* \
        --where language=zh --flops "${budgets[@]}" --output "$out/law-$share.json" \
        --plot "$out/law-$share.png"
done | tee "$out/fit.txt"

step "5. Shares for a run of this size and length"
chatflow propose "$out"/runs/continued/900k-*-"$length" "$out"/runs/mixtures/900k-*-"$length" \
    --weights zh=0.8,en=0.2 --floors en=0.05 | tee "$out/propose.txt"

step "6. Report"
python report.py "$out"
