"""Captions cleaned as those that LlamaGen was trained on: lower case, without what web pages leave around a text.

After the cleaning of DeepFloyd IF, which LlamaGen applies twice: markup, links, sizes, file names, ids and sales talk
go, quotes and dashes become plain. Wrongly decoded letters are left as they are.
"""

import html
import re
from urllib.parse import unquote_plus

LINK = r"\b(?:https?://|www\.)\S+|\b[\w.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b(?:/\S*)?"
IDS = r"#\d+\b|\b\d{6,}\b|\b[a-z]{1,3}\d{3,}\b|\b[a-z]+\d+[a-z]+\d\w*\b|\b\d{1,3}(?:\.\d{1,3}){3}\b"
SALES = r"\b(?:worldwide\s+)?free\s+shipping\b|\bfree\s+download(?:\s+\w+)?\b|\bclick\s+(?:for|on)\s+\w+"
CJK = "[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+"

RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<person>", "person"),
        (r"<[^<>]*>", " "),  # markup
        (LINK, " "),
        (r"@\w+\b", " "),
        (CJK, " "),
        ("[\u2010-\u2015\u2212\u2500\u30fc]+", "-"),
        ("[\u00ab\u00bb\u201c-\u201f\u2033]|''|``", '"'),
        ("[\u2018-\u201b\u2032\u00b4`]", "'"),
        (r"\\n|\b\d:\d\d\s*$", " "),
        (IDS, " "),
        (r"\b\S+\.(?:png|jpe?g|bmp|webp|gif|eps|pdf|apk|mp4|svg)\b", " "),
        (SALES, " "),
        (r"\bpage\s+\d+\b|\b\d+(?:\.\d+)?\s*[x\u00d7]\s*\d+(?:\.\d+)?\b", " "),
        ("[#&@~|*/\\\\(){}\\[\\]\u00a1\u00a7\u00a9\u00ae\u00b7\u00ba\u00bd-\u00bf\u2022\u2122]+", " "),
        (r"([\"'.])\1+", r"\1"),
        (r"\s+([:.])\s+", r"\1 "),
        (r"(?<=\D[,.])(?=[^\W\d])", " "),  # words that a comma or full stop runs together
        (r"\s+", " "),
        (r"^[\s'_,\-:;]+|[\s'_,\-:;+]+$|^\.\S+$", ""),
        (r'^"([^"]*)"$', r"\1"),
    )
)


def clean_caption(caption: str) -> str:
    """A caption without what does not describe the picture; in lower case."""
    return _clean(_clean(caption))


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(unquote_plus(text).lower()))
    if len(re.findall(r"[-_]", text)) > 3 and " " not in text:
        text = re.sub(r"[-_]", " ", text)  # a file's name that stands for a caption
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text.strip()
