# shellcheck shell=bash
# Functions of examples/smollm2_zh and examples/smollm2_hu. Sourced; they run in the example's folder,
# which contains out/.
# shellcheck disable=SC2034 # the sizes are used where this file is sourced

shared=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) # the scripts next to this file
root=$(cd "$shared/../.." && pwd)

sizes() { # --short or nothing: sets the sizes of the run, and the source of the text
    if [ "${1:-}" = --short ]; then # the help of one program: enough similar text for minutes
        iterations=48 batch=2 length=256 warmup=4 decay=12 first=8 tokens=300 held=24000 source=libreoffice-help
    else
        iterations=80 batch=4 length=512 warmup=4 decay=20 first=32 tokens=500 held=48000 source=
    fi
}

step() { printf '\n== %s\n' "$*"; }

hold_out() { # bytes per language, languages: split corpora/NAME.jsonl into data/NAME{,_test}.jsonl
    local language
    for language in "${@:2}"; do
        python "$shared/hold_out.py" "out/corpora/$language.jsonl" "out/data/$language.jsonl" \
            "out/data/${language}_test.jsonl" --bytes "$1" --source "$source"
    done
    for language in "${@:2}"; do
        unseen "out/data/$language.jsonl" "out/data/$language.jsonl"
    done
}

unseen() { # input, output: remove the paragraphs of the held-out documents
    python "$shared/unseen.py" "$1" "$2" --held-out out/data/*_test.jsonl
}

preprocess() { # input, name of the corpus, further flags
    python -m megatron_chatflow preprocess --input "$1" --output-prefix "out/data/$2" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model out/tokenizer --workers 2 "${@:3}"
}

settings_for() { # run, curriculum, further flags of `train`: sets blend and settings
    blend=( # what `plan` reads, too
        --config out/base/config.yaml --load out/base --finetune --save "$1" --curriculum "$2"
        --seq-length "$length" --micro-batch-size "$batch" --global-batch-size "$batch"
        --train-iters "$iterations" --split '980,20,0' --reset-attention-mask
        --train-new-rows-samples "$first"
    )
    settings=(
        "${blend[@]}" --bf16 --lr 4e-4 --min-lr 1.3e-4 --lr-decay-style WSD
        --lr-wsd-decay-iters "$decay" --lr-wsd-decay-style minus_sqrt --lr-warmup-iters "$warmup"
        --adam-beta2 0.95 --weight-decay 0.1 --no-save-optim --log-interval 5 "${@:3}"
    )
}

compare_with() { # run, original model, language
    python -m megatron_chatflow evaluate --load "$1" --reference "$2" \
        --text "$3=out/data/$3_test.jsonl" --text en=out/data/en_test.jsonl
}

train_and_compare() { # language, original model, a prompt in the language, flags of `train`
    settings_for out/run curriculum.yaml "${@:4}"
    step "5. What the curriculum means for these corpora, and the training"
    python -m megatron_chatflow plan "${blend[@]}" --plot out/plan.png
    python -m megatron_chatflow train "${settings[@]}"
    python -m megatron_chatflow plot out/run

    step "6. Comparison with the original model, on the same held-out documents"
    compare_with out/run "$2" "$1"

    step "7. Back to Hugging Face"
    python -m megatron_chatflow convert --load-dir out/run --save-dir "out/smollm2-$1"

    step "8. Text"
    python -m megatron_chatflow generate --load out/run --prompt "$3" \
        --prompt 'In a Linux system,' --max-new-tokens 40

    step "Done"
    echo "checkpoint:    $PWD/out/run"
    echo "TensorBoard:   $PWD/out/run/tensorboard   (tensorboard --logdir \"$PWD/out/run/tensorboard\")"
    echo "plots:         $PWD/out/plan.png (planned), $PWD/out/run/run.png (shares and losses of the run)"
    echo "transformers:  $PWD/out/smollm2-$1"
}
