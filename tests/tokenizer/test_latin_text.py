"""An extension for another script leaves the tokens of all text in Latin letters, also of rare
ones.
"""

import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer.extend import extend
from megatron_chatflow.tokenizer.unicode_scripts import ZERO_WIDTH
from tests.tokenizer import bases
from tests.tokenizer.marks import LINES as MARKED

LINES = {
    **MARKED,
    "GEORGIAN": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით",
    "CYRILLIC": (
        "за\u0301мок замо\u0301к мука\u0301 дом\ufe0f о\u20d7 вода\u0301 \u0301а е\u0308 и\u0306"
    ),
    "GREEK": "ἄνθρωποι ἐλεύθεροι καὶ ἴσοι ᾰ\u0313\u0301νθρωπος Ͳͳ ἐλε\u0301υθερος ͻα ͻα",
    "ETHIOPIC": "ꬁꬂꬃ ꬄꬅꬆ ሰው ሁሉ ነጻ ኾኖ ተወለደ ⷀⷁ ⷂⷃ",
    "CHEROKEE": "ꮎꮝꭹ ꭰꮒᏼꮻ ꭱꮅꮚꮝ ᎠᏂᏴᏫ ᏂᎦᏓ",
    "CJK": "人人生而自由，在尊严和权利上一律平等。「他们」 𠀀𠀁 か\u3099き\u3099 がぎ",
    "HANGUL": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다",
}
KINDS = ("gpt2", pytest.param("llama3", marks=pytest.mark.slow), "sentencepiece")
BLOCKS = (
    *((0x20, 0x7F), (0xA0, 0x250), (0x250, 0x300), (0x300, 0x370), (0x1AB0, 0x1ACF)),
    *((0x1D00, 0x1DC0), (0x1DC0, 0x1E00), (0x1E00, 0x1F00), (0x2000, 0x2C00), (0x2C60, 0x2C80)),
    *((0x2E00, 0x2E5E), (0xA700, 0xA800), (0xAB30, 0xAB6C), (0xFB00, 0xFB07), (0xFE00, 0xFE10)),
    *((0xFE20, 0xFE30), (0xFEFF, 0xFF00), (0xFFFC, 0xFFFE), (0x10780, 0x107BB), (0x1D400, 0x1D800)),
    *((0x1DF00, 0x1DF1F), (0x1F300, 0x1FB00), (0xE0100, 0xE01F0)),
)
"""Unicode blocks of Latin and phonetic letters, combining marks, punctuation, symbols and emoji."""
TEXTS = (
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng. Ở ấy ỷ ẩn ểnh ệ",
    "L'été où Zoé a garçonné près de la forêt, l'œuvre naïve coûte 1 234,50 €\u202f: déjà vu",
    "ˈɪntəˈnæʃənəl fəˈnɛtɪk ᴀ ᵃ ᶏ ꬱ ꭓ ꜳ Ɥ ⱡ t͡ʃ ɔ̃ ŋ̊",
    "👩\u200d👩\u200d👧 ❤\ufe0f a\u20dd “x” — … ™ 𝐛𝐨𝐥𝐝 ﬁ ﬂ \ufeffimport \u0301\u0302",
    'def f(x: str) -> str:\n    return x or "👩\u200d💻"  # ≈ 3\n',
)
letters = st.one_of(*(st.characters(min_codepoint=a, max_codepoint=b - 1) for a, b in BLOCKS))
latin = st.lists(letters | st.sampled_from([" ", "  ", "a", *TEXTS]), max_size=12).map("".join)


@cache
def extended(folder: Path, kind: str, script: str):
    """A vocabulary, and the same with as many new tokens as the line of the script gives."""
    base = bases.open_base(folder / f"{kind}-{script}", kind)
    for count in (70, 40, 20, 10, 5):
        try:
            outcome = extend(base, bases.corpus([LINES[script]] * 50), count)
        except ChatflowError as error:
            assert "more than the corpus holds" in str(error)
        else:
            assert outcome.other_script
            return base, outcome.vocabulary
    raise AssertionError(f"no new tokens for {script}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(text=latin, script=st.sampled_from([*LINES]), form=st.sampled_from(["NFC", "NFD"]))
@example(text=" ".join(TEXTS), script="ETHIOPIC", form="NFC")
@example(text=" ".join(TEXTS), script="CYRILLIC", form="NFD")
@example(text=" ".join(TEXTS), script="GREEK", form="NFD")
@example(text=" ".join(TEXTS), script="CHEROKEE", form="NFC")
def test_text_in_latin_letters_keeps_its_tokens(folder, kind, text, script, form):
    text = unicodedata.normalize(form, text).replace("\u03a9", "")  # what U+2126 becomes
    if kind == "sentencepiece":  # a piece for a joiner is needed before a piece can reach across it
        text = text.translate({ord(char): None for char in ZERO_WIDTH if char in LINES[script]})
    base, changed = extended(folder, kind, script)
    assert changed.encode([text])[0].tolist() == base.encode([text])[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", LINES)
def test_held_out_english_french_vietnamese_and_code_keep_their_tokens(folder, kind, script):
    base, changed = extended(folder, kind, script)
    code = Path(__file__).read_text(encoding="utf-8").split("LINES = {")[0]
    for text in (*TEXTS[:3], *TEXTS[4:], *bases.documents("en")[150:170], code):
        text = text.replace("\u200d", "") if kind == "sentencepiece" else text
        for form in (text, unicodedata.normalize("NFD", text)):
            assert changed.encode([form])[0].tolist() == base.encode([form])[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", LINES)
def test_the_script_itself_takes_fewer_tokens(folder, kind, script):
    base, changed = extended(folder, kind, script)
    before, after = (len(v.encode([LINES[script]])[0]) for v in (base, changed))
    assert after < 0.95 * before
