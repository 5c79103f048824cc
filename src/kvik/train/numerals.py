"""Whole numbers in words: English, Chinese, and both of Korean's ways to count.

2304        two thousand three hundred and four      两千三百零四       이천삼백사
23 books    twenty-three                             二十三本           스물세 권        (native, before a counter)
"""

from __future__ import annotations

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_IRREGULAR = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip
_HAN, _HANGUL = "零一二三四五六七八九", ("영", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")
_NATIVE = ("", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")
_NATIVE_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")
MOST = 10**9 - 1


def english(n: int, *, british: bool = False) -> str:
    """Words of 0 to `MOST`; British English has an "and" before tens and ones."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + ("-" + _ONES[n % 10] if n % 10 else "")
    joint = " and " if british else " "
    if n < 1000:
        rest = joint + english(n % 100) if n % 100 else ""
        return f"{_ONES[n // 100]} hundred{rest}"
    size, name = (1_000_000, "million") if n >= 1_000_000 else (1000, "thousand")
    rest = (joint if n % size < 100 else " ") + english(n % size, british=british) if n % size else ""
    return f"{english(n // size, british=british)} {name}{rest}"


def ordinal(n: int) -> str:
    """first, second, twenty-first …: 1 to 99."""
    head, dash, last = english(n).rpartition("-")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    else:
        last = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return head + dash + last


def suffixed(n: int) -> str:
    """1st, 2nd, 11th …"""
    return f"{n}" + ("th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th"))


def english_year(year: int) -> str:
    """nineteen ninety-eight, nineteen oh five, two thousand and five, twenty twenty-five: 1100 to 2099."""
    head, tail = divmod(year, 100)
    if head == 20 and tail < 10:
        return english(year, british=True)
    if tail == 0:
        return english(head) + " hundred"
    return f"{english(head)} {'oh ' if tail < 10 else ''}{english(tail)}"


def chinese(n: int) -> str:
    """0 to `MOST`. A leading 2 of thousands and more is 两, as in speech; one inside is 二."""
    if n < 10:
        return _HAN[n]
    if n < 20:
        return "十" + (_HAN[n % 10] if n % 10 else "")
    text = _chinese(n).removeprefix("一") if str(n)[0] == "1" and len(str(n)) in (2, 6) else _chinese(n)  # 十万
    return "两" + text[1:] if text.startswith("二") and text[1] in "千万亿" else text


def _chinese(n: int) -> str:
    for size, name in ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if n >= size:
            rest = n % size
            gap = "零" if 0 < rest < size // 10 else ""
            return _chinese(n // size) + name + gap + (_chinese(rest) if rest else "")
    return _HAN[n]


def chinese_count(n: int) -> str:
    """Before a counter, where 2 alone is 两."""
    return "两" if n == 2 else chinese(n)


def chinese_digits(n: int) -> str:
    """Digit by digit, as years are read: 一九九八, 二〇〇五."""
    return "".join(_HAN[int(digit)] for digit in str(n)).replace("零", "〇")


def sino(n: int) -> str:
    """Sino-Korean, 0 to `MOST`, a space behind each 만 and 억: 십이만 삼천사백."""
    if n == 0:
        return _HANGUL[0]
    parts = [(n // 10**8, "억"), (n // 10**4 % 10**4, "만"), (n % 10**4, "")]
    words = ["만" if (count, name) == (1, "만") and n < 20_000 else _under_ten_thousand(count) + name
             for count, name in parts if count]  # fmt: skip
    return " ".join(words)


def _under_ten_thousand(n: int) -> str:
    text = ""
    for size, name in ((1000, "천"), (100, "백"), (10, "십"), (1, "")):
        digit = n // size % 10
        if digit:
            text += ("" if digit == 1 and name else _HANGUL[digit]) + name
    return text


def native(n: int) -> str:
    """Native Korean before a counter, 1 to 99: 한, 스무, 스물세."""
    return "스무" if n == 20 else _NATIVE_TENS[n // 10] + _NATIVE[n % 10]


def ends_in(word: str) -> int:
    """The final consonant of a Korean word's last syllable: 0 = none, 8 = ㄹ."""
    return (ord(word[-1]) - ord("가")) % 28


def particle(word: str, kind: str) -> str:
    """A Korean word with the particle that its sound asks for, of 은/는, 이/가, 을/를 or 으로/로."""
    closed, opened = kind.split("/")
    final = ends_in(word)
    return word + (closed if final and not (kind == "으로/로" and final == 8) else opened)
