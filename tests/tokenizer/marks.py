"""Text of scripts with combining marks, and pre-tokenizers that cut it."""

import json
import unicodedata
from functools import cache
from pathlib import Path

import tokenizers

from megatron_chatflow.tokenizer.pre_tokenizer import join_marks
from tests.tokenizer import bases

ROOT = Path(__file__).resolve().parents[2]


LINES = {
    "THAI": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "LAO": "ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສິດ ສິດທິ ເສລີພາບ ແລະ ຄວາມສະເໝີພາບເທົ່າທຽມກັນ",
    "DEVANAGARI": (
        "सभी मनुष्यों को गौरव और अधिकारों के मामले में मनुष्यों की समानता और सभी अधिकारों की "
        "समानता के मामले में समानता"
    ),
    "BENGALI": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে",
    "TAMIL": "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்",
    "TELUGU": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు",
    "MALAYALAM": "മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും അന്തസ്സോടും സ്വാതന്ത്ര്യത്തോടുംകൂടി ജനിച്ചവരാണ്",
    "SINHALA": "සියලු මනුෂ්\u200dයයෝ නිදහස්ව උපත ලබා ඇත ශ්\u200dරී",
    "KHMER": "មនុស្សទាំងអស់កើតមកមានសេរីភាពនិងភាពស្មើៗគ្នាក្នុងសិទ្ធិនិងសេចក្ដីថ្លៃថ្នូរ",
    "MYANMAR": "လူတိုင်းသည် တူညီလွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း",
    "TIBETAN": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང་",
    "HEBREW": "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ",
    "ARABIC": "بِسْمِ ٱللَّهِ ٱلرَّحْمَٰنِ ٱلرَّحِيمِ می\u200cخواهم خانه\u200cها",
}


QWEN2 = bases.LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


O200K = (
    r"[^\r\n"
    r"\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n"
    r"\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**changes) -> dict:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    } | changes


def split_by(pattern: str, **changes) -> dict:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split | changes, byte_level(use_regex=False)]}


PRE_TOKENIZERS = {
    "gpt2": byte_level(),
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level()],
    },
    "llama3": split_by(bases.LLAMA3),
    "cl100k": split_by(bases.LLAMA3, behavior="Removed", invert=True),
    "qwen2": split_by(QWEN2),
    "o200k": split_by(O200K),
}


@cache
def splitter(name: str, joined: tuple[str, ...] = ()):
    """The words of a text, before and after the marks of scripts are joined."""
    step = PRE_TOKENIZERS[name]
    step = join_marks(name, step, joined) if joined else step
    model = {"type": "BPE", "vocab": {}, "merges": []}
    backend = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "pre_tokenizer": step, "model": model})
    )
    return lambda text: backend.pre_tokenizer.pre_tokenize_str(text)


FRENCH = unicodedata.normalize(
    "NFD",
    (
        "L'été où Zoé a garçonné près de la forêt, l'œuvre naïve coûte 1 234,50 €\u202f: déjà "
        "vu\u200d!"
    ),
)


LATIN = [
    FRENCH,
    *bases.documents("en")[150:170],
    unicodedata.normalize("NFD", "Tiếng Việt, Ελλάδα, ёлка й, はじめまして が 한국어, 中文。"),
    "👩\u200d👩\u200d👧 a\u200cb x\ufe0f \u0301 \u20dd",
    (ROOT / "megatron_chatflow" / "tokenizer" / "extend.py").read_text(encoding="utf-8"),
]
