# shellcheck shell=bash
# What examples/smollm2_zh and examples/smollm2_hu share. Sourced; the functions run in the example's folder, which holds out/.
# shellcheck disable=SC2034 # the sizes are used where this file is sourced

shared=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) # the scripts beside this file
root=$(cd "$shared/../.." && pwd)

sizes() { # --short or nothing: how much is held out and learnt, and from where
    if [ "${1:-}" = --short ]; then # the help of one program alone: enough of the same kind for a few minutes
        iterations=48 batch=2 length=256 warmup=4 decay=12 first=8 tokens=300 held=24000 source=libreoffice-help
    else
        iterations=80 batch=4 length=512 warmup=4 decay=20 first=32 tokens=500 held=48000 source=
    fi
}

step() { printf '\n== %s\n' "$*"; }

hold_out() { # bytes of a language, languages: corpora/NAME.jsonl is split into data/NAME.jsonl and data/NAME_test.jsonl
    local language
    for language in "${@:2}"; do
        python "$shared/hold_out.py" "out/corpora/$language.jsonl" "out/data/$language.jsonl" "out/data/${language}_test.jsonl" --bytes "$1" \
            --source "$source"
    done
    for language in "${@:2}"; do
        unseen "out/data/$language.jsonl" "out/data/$language.jsonl"
    done
}

unseen() { # input, output: without what the held-out documents have
    python "$shared/unseen.py" "$1" "$2" --held-out out/data/*_test.jsonl
}

preprocess() { # input, name of the corpus, further flags
    python "$root/tools/preprocess_data.py" --input "$1" --output-prefix "out/data/$2" --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model out/tokenizer --workers 2 "${@:3}"
}

settings_for() { # run, curriculum, further flags: sets settings, the flags of a training
    settings=(
        --config out/base/config.yaml --load out/base --finetune --save "$1" --curriculum "$2" --bf16 --seq-length "$length"
        --micro-batch-size "$batch" --global-batch-size "$batch" --train-iters "$iterations" --split '980,20,0' --reset-attention-mask
        --lr 4e-4 --min-lr 1.3e-4 --lr-decay-style WSD --lr-wsd-decay-iters "$decay" --lr-wsd-decay-style minus_sqrt --lr-warmup-iters "$warmup"
        --adam-beta2 0.95 --weight-decay 0.1 --train-new-rows-samples "$first" --no-save-optim --log-interval 5 "${@:3}"
    )
}

judge() { # run, untouched model, language
    python -m megatron_chatflow evaluate --load "$1" --reference "$2" --text "$3=out/data/$3_test.jsonl" --text en=out/data/en_test.jsonl
}

learn_and_judge() { # language, untouched model, a prompt in the language, flags for the training
    settings_for out/run curriculum.yaml "${@:4}"
    step "5. What the curriculum means for these corpora, and the training"
    python -m megatron_chatflow plan "${settings[@]}" --plot out/plan.png
    python -m megatron_chatflow train "${settings[@]}"
    python "$root/tools/plot_run.py" out/run

    step "6. Against the untouched model, on the same held-out documents"
    judge out/run "$2" "$1"

    step "7. Back to Hugging Face"
    python "$root/tools/convert_checkpoint.py" --load-dir out/run --save-dir "out/smollm2-$1"

    step "8. Text"
    python -m megatron_chatflow generate --load out/run --prompt "$3" --prompt 'In a Linux system,' --max-new-tokens 40

    step "Done"
    echo "checkpoint:    $PWD/out/run"
    echo "TensorBoard:   $PWD/out/run/tensorboard   (tensorboard --logdir \"$PWD/out/run/tensorboard\")"
    echo "plots:         $PWD/out/plan.png (planned), $PWD/out/run/run.png (shares and losses of the run)"
    echo "transformers:  $PWD/out/smollm2-$1"
}
