"""What the grammar is made of: pieces of text in three languages at once, and words that fill them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvik.train.numerals import particle

_KINDS = {"은": "은/는", "이": "이/가", "을": "을/를", "로": "으로/로"}


@dataclass(frozen=True)
class Phrase:
    """The same in English, Chinese and Korean.

    Attributes:
        fragment: it is no sentence: nothing ends it, and it may stand in one.
    """

    en: str
    zh: str
    ko: str
    fragment: bool = False


def word(en: str, zh: str, ko: str) -> Phrase:
    """A piece of a sentence."""
    return Phrase(en, zh, ko, fragment=True)


def words(table: str) -> list[Phrase]:
    """One a line: English | Chinese | Korean."""
    return [word(*(part.strip() for part in line.split("|"))) for line in table.strip().splitlines()]


def fill(pattern: str, **parts: Phrase) -> Phrase:
    """A sentence: English | Chinese | Korean, with names of parts in braces. In Korean a particle follows a part's name
    behind a colon, as the topic in {who:은}, the subject {what:이}, the object {what:을} or the way {where:로}."""
    en, zh, ko = (side.strip() for side in pattern.split("|"))
    korean = {name: _Korean(part.ko) for name, part in parts.items()}
    return Phrase(
        en.format(**{name: part.en for name, part in parts.items()}),
        zh.format(**{name: part.zh for name, part in parts.items()}),
        ko.format(**korean),
    )


def pick(rng: Random, patterns: list[str], **parts: Phrase) -> Phrase:
    """One of some sentences."""
    return fill(rng.choice(patterns), **parts)


class _Korean(str):
    """A word that takes particles where it is written out."""

    def __format__(self, asked: str) -> str:
        return particle(str(self), _KINDS[asked]) if asked else str(self)


CITIES = words("""
Seoul | 首尔 | 서울
Beijing | 北京 | 베이징
Shanghai | 上海 | 상하이
Busan | 釜山 | 부산
Tokyo | 东京 | 도쿄
London | 伦敦 | 런던
Paris | 巴黎 | 파리
New York | 纽约 | 뉴욕
Berlin | 柏林 | 베를린
""")
PEOPLE = words("""
he | 他 | 그
she | 她 | 그녀
I | 我 | 저
my mother | 我妈妈 | 어머니
my father | 我爸爸 | 아버지
my friend | 我的朋友 | 제 친구
our teacher | 我们的老师 | 우리 선생님
""")
