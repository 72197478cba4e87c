# shellcheck shell=bash
# What examples/smollm2_zh and examples/smollm2_hu share. Sourced; the functions run in the example's folder, which holds out/.

shared=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) # the scripts beside this file
root=$(cd "$shared/../.." && pwd)

step() { printf '\n== %s\n' "$*"; }

hold_out() { # bytes of a language, languages: corpora/NAME.jsonl is split into data/NAME.jsonl and data/NAME_test.jsonl
    local language
    for language in "${@:2}"; do
        python "$shared/hold_out.py" "out/corpora/$language.jsonl" "out/data/$language.jsonl" "out/data/${language}_test.jsonl" --bytes "$1"
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
