"""Text in an encoding of one language: whether it can be Windows-1252, and how it would read in others.

No byte is wrong in most of these encodings, so nothing can be proven. Text of Western Europe in Windows-1252 has single
accented letters inside words of plain ones; what is meant otherwise has signs inside words then, capitals behind small
letters, or whole words of high bytes.
"""

import re

MOST_WRONG = 0.1  # of what is not ASCII, in text that reads well
MOST_READINGS, MOST_WORDS = 3, 5
_UNUSED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # Windows-1252 has no characters here
_HIGH = re.compile(r"[^\x00-\x7f]")
_RUN = re.compile(r"[^\x00-\x7f]{3,}")
_LETTERS = "A-Za-zß-öø-ÿœšžÀ-ÖØ-ÞŒŠŽŸ"
_ODD = re.compile(  # signs inside words, and capitals behind small letters
    rf"(?<=[{_LETTERS}])[¢£¤¥¦§¨¬±²³¹´¶¸¼½¾¿¡«»×÷†‡ˆ‰˜‚„“”•](?=[a-zß-öø-ÿ])|(?<=[a-zß-öø-ÿ])[À-ÖØ-ÞŒŠŽŸ](?=[^A-ZÀ-ÞŒŠŽŸ]|$)"
)
_MARKS = set("’‘“”„‚…–—«»‹›•·€£°§©®™¡¿ \xa0\xad")
_WORD = re.compile(r"[^\s,;|\"]*[^\x00-\x7f][^\s,;|\"]*")
_TURKISH, _ICELANDIC = re.compile("[þðýÞÐÝ]"), re.compile("[áíæÁÍÆ]")  # the Turkish letters are in the same places
_INNER_CAPITAL = re.compile(r"(?<=[^\W\d_])[À-ÖØ-Þ\u0388-\u03ab\u0401-\u042f]")
_MIXED_SCRIPTS = re.compile(r"[A-Za-z][^\x00-\x7f]|[^\x00-\x7f][A-Za-z]")
_LATIN = {"MACINTOSH", "CP850", "ISO-8859-2", "CP1250", "CP1254"}
_KANJI, _SIGNS, _CYRILLIC = "\u4e00-\u9fff", "\u3000-\u303f\uff01-\uff60", "\u0400-\u04ff"
_WESTERN, _CENTRAL = "ß-öø-ÿÀ-ÖØ-Þ", "ß-öø-žÀ-ÖØ-Þ"
_OTHERS = {  # name for iconv: codec of Python, and the letters that such text consists of
    "CP1251": ("cp1251", _CYRILLIC), "KOI8-R": ("koi8_r", _CYRILLIC), "CP866": ("cp866", _CYRILLIC),
    "CP1253": ("cp1253", "\u0370-\u03ff"), "CP1255": ("cp1255", "\u0590-\u05ff"),
    "CP1256": ("cp1256", "\u0600-\u06ff"), "CP874": ("cp874", "\u0e00-\u0e7f"),
    "SHIFT_JIS": ("cp932", f"\u3040-\u30ff{_KANJI}{_SIGNS}"), "GB18030": ("gb18030", _KANJI + _SIGNS),
    "BIG5": ("cp950", _KANJI + _SIGNS), "EUC-KR": ("cp949", f"\uac00-\ud7a3{_SIGNS}"),
    "MACINTOSH": ("mac_roman", f"œŒ’‘“”„…–—{_WESTERN}"), "CP850": ("cp850", _WESTERN), "CP1250": ("cp1250", _CENTRAL),
    "ISO-8859-2": ("iso8859_2", _CENTRAL), "CP1254": ("cp1254", f"ğışĞİŞ{_WESTERN}"),
}  # fmt: skip


def is_western(lines: bytes) -> bool:
    """Whether lines read as a Western European language in Windows-1252."""
    if _UNUSED.search(lines):
        return False
    text = lines.decode("cp1252")
    high = len(_HIGH.findall(text))
    turkish = 0 if _ICELANDIC.search(text) else len(_TURKISH.findall(text))
    return not is_mixed(lines) and max(_in_runs(text), len(_ODD.findall(text)), turkish) <= MOST_WRONG * high


def is_mixed(lines: bytes) -> bool:
    """Whether some of the lines that are not ASCII are UTF-8, though not all are."""
    others = [line for line in lines.splitlines() if not line.isascii()]
    return sum(map(_is_utf8, others)) > MOST_WRONG * len(others)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def words(lines: bytes) -> list[str]:
    """Words that show the letters that are not ASCII, as Windows-1252, for the user to judge."""
    return [f'"{word}"' for word in _telling_words(lines.decode("cp1252"))]


def readings(lines: bytes) -> list[tuple[str, str]]:
    """In which encodings the lines may be, each with words in it; the likely ones first."""
    ranked = []
    for name, (codec, letters) in _OTHERS.items():
        try:
            text = lines.decode(codec)
        except UnicodeDecodeError:
            continue
        high = _HIGH.findall(text)
        own = len(re.findall(f"[{letters}]", text)) - len(_INNER_CAPITAL.findall(text))
        own -= _in_runs(text) if name in _LATIN else len(_MIXED_SCRIPTS.findall(text))
        ranked.append((-own / max(1, len(high)), name, " ".join(_telling_words(text))))
    likely = [(name, f'"{text}"') for share, name, text in sorted(ranked) if share < -0.5 and text.isprintable()]
    return likely[:MOST_READINGS]


def _in_runs(text: str) -> int:
    """How many characters stand in runs of such as are not ASCII, quotes and dashes aside: no Western word has them."""
    return sum(len(run) for run in _RUN.findall(text) if not _MARKS.issuperset(run))


def _telling_words(text: str) -> list[str]:
    """Words with characters that the ones before them do not have."""
    found: list[str] = []
    seen: set[str] = set()
    for word in _WORD.findall(text):
        new = set(_HIGH.findall(word)) - seen
        if new and len(found) < MOST_WORDS:
            found.append(word[:30])
            seen |= new
    return found
