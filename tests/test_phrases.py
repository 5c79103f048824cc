"""What a translator is taught: numbers, dates and sentences, checked by hand; and that no test sentence is taught."""

import datetime
from itertools import islice
from random import Random

import pytest

from kvik.train import moments, parts, quantities
from kvik.train.numerals import (
    chinese,
    chinese_count,
    chinese_digits,
    english,
    english_year,
    native,
    ordinal,
    particle,
    sino,
    suffixed,
)
from kvik.train.phrases import HELD_OUT, KINDS, LANGUAGES, draw, held_out

NUMBERS = {
    0: ("zero", "零", "영"),
    2: ("two", "二", "이"),
    10: ("ten", "十", "십"),
    15: ("fifteen", "十五", "십오"),
    20: ("twenty", "二十", "이십"),
    101: ("one hundred and one", "一百零一", "백일"),
    110: ("one hundred and ten", "一百一十", "백십"),
    111: ("one hundred and eleven", "一百一十一", "백십일"),
    200: ("two hundred", "二百", "이백"),
    1005: ("one thousand and five", "一千零五", "천오"),
    1050: ("one thousand and fifty", "一千零五十", "천오십"),
    2300: ("two thousand three hundred", "两千三百", "이천삼백"),
    10_000: ("ten thousand", "一万", "만"),
    12_300: ("twelve thousand three hundred", "一万二千三百", "만 이천삼백"),
    20_002: ("twenty thousand and two", "两万零二", "이만 이"),
    100_000: ("one hundred thousand", "十万", "십만"),
    110_000: ("one hundred and ten thousand", "十一万", "십일만"),
    120_304: ("one hundred and twenty thousand three hundred and four", "十二万零三百零四", "십이만 삼백사"),
    1_500_000: ("one million five hundred thousand", "一百五十万", "백오십만"),
    100_200_304: (
        "one hundred million two hundred thousand three hundred and four", "一亿零二十万零三百零四",
        "일억 이십만 삼백사",
    ),
    100_010_000: ("one hundred million ten thousand", "一亿零一万", "일억 일만"),
    200_000_000: ("two hundred million", "两亿", "이억"),
}  # fmt: skip


@pytest.mark.parametrize("n", NUMBERS)
def test_numbers_in_words(n):
    assert (english(n, british=True), chinese(n), sino(n)) == NUMBERS[n]
    assert english(n) == NUMBERS[n][0].replace(" and ", " ")


def test_counters_take_two_and_korean_counts_in_its_own_words():
    assert [chinese_count(n) for n in (1, 2, 12, 22, 2000)] == ["一", "两", "十二", "二十二", "两千"]
    ones = "한 두 세 네 다섯 여섯 일곱 여덟 아홉 열 열한 열두 스무 스물한 서른세"
    assert [native(n) for n in (*range(1, 13), 20, 21, 33)] == ones.split()
    tens = "마흔 쉰두 예순여덟 일흔다섯 여든네 아흔아홉"
    assert [native(n) for n in (40, 52, 68, 75, 84, 99)] == tens.split()


def test_ordinals_and_years():
    assert [ordinal(n) for n in (1, 2, 3, 5, 8, 9, 12, 20, 21, 30, 99)] == [
        "first", "second", "third", "fifth", "eighth", "ninth", "twelfth", "twentieth", "twenty-first", "thirtieth",
        "ninety-ninth",
    ]  # fmt: skip
    assert [suffixed(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd",
    ]  # fmt: skip
    years = [english_year(year) for year in (1998, 1905, 1900, 2000, 2005, 2010, 2025)]
    assert years == [
        "nineteen ninety-eight", "nineteen oh five", "nineteen hundred", "two thousand", "two thousand and five",
        "twenty ten", "twenty twenty-five",
    ]  # fmt: skip
    assert (chinese_digits(1998), chinese_digits(2005)) == ("一九九八", "二〇〇五")


def test_particles_follow_the_sound():
    assert [particle(w, "은/는") for w in ("책", "회의", "서울")] == ["책은", "회의는", "서울은"]
    assert [particle(w, "으로/로") for w in ("부산", "서울", "도쿄")] == ["부산으로", "서울로", "도쿄로"]
    assert [particle(w, "을/를") for w in ("과", "장")] == ["과를", "장을"]


class Always(Random):
    """Chance that gives what it was told to."""

    def __init__(self, *numbers):
        super().__init__(0)
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0) if self.numbers else 0.5


def test_the_sentence_of_the_readme():
    day = parts.word("Monday, 3 March 2025", "2025年3月3日星期一", "2025년 3월 3일 월요일")
    hour = parts.word("4:30 pm", "下午4点30分", "오후 4시 30분")
    on = parts.word(f"on {day.en} at {hour.en}", day.zh + hour.zh, f"{day.ko} {hour.ko}")
    made = parts.fill(moments.AT_DATES[0], what=moments.EVENTS[0], on=on)
    assert made.en == "the meeting is on Monday, 3 March 2025 at 4:30 pm."
    assert made.zh == "会议在2025年3月3日星期一下午4点30分举行。"
    assert made.ko == "회의는 2025년 3월 3일 월요일 오후 4시 30분에 있습니다."


@pytest.mark.parametrize(
    ("hour", "minute", "zh", "ko"),
    [
        (0, 15, "凌晨0点15分", "오전 0시 15분"), (5, 0, "凌晨5点", "오전 5시"), (9, 5, "上午9点05分", "오전 9시 5분"),
        (12, 30, "中午12点30分", "오후 12시 30분"), (16, 30, "下午4点30分", "오후 4시 30분"),
        (20, 0, "晚上8点", "오후 8시"),
    ],
)  # fmt: skip
def test_hours_have_their_part_of_the_day(hour, minute, zh, ko):
    made = moments._of_twelve(Random(0), hour, minute)
    assert (made.zh, made.ko) == (zh, ko), made.en


def test_hours_in_words():
    said = {moments._in_words(Always(0.1, 0.5), h, m).en: (h, m) for h in range(24) for m in range(0, 60, 5)}
    made = {}
    for en, (h, m) in said.items():
        phrase = moments._in_words(Always(0.1, 0.5), h, m)
        made[en] = (phrase.zh, phrase.ko)
    assert made["half past three"] == ("三点半", "세 시 반")
    assert made["a quarter to eight"] == ("七点三刻", "일곱 시 사십오 분")
    assert made["two oh five"] == ("两点零五分", "두 시 오 분")
    assert made["noon"] == ("中午十二点", "낮 열두 시")
    with_part = moments._in_words(Always(0.9, 0.9), 15, 30)
    assert (with_part.en, with_part.zh, with_part.ko) == (
        "three thirty in the afternoon", "下午三点三十分", "오후 세 시 삼십 분"
    )  # fmt: skip


def test_dates_in_words_have_the_months_that_lose_a_sound():
    made = moments._written_out(datetime.date(2025, 6, 1), True, False)
    assert (made.zh, made.ko) == ("二〇二五年六月一日", "이천이십오년 유월 일일")
    assert made.en == "the first of June, twenty twenty-five"
    made = moments._written_out(datetime.date(1998, 10, 22), False, True)
    assert (made.en, made.zh, made.ko) == ("October twenty-second", "十月二十二日", "시월 이십이일")


def test_things_are_counted_with_their_counters():
    by_name = {thing.en.split()[0]: thing for thing in quantities.THINGS}

    def counted(name, n, spelled):
        many, noun = quantities._counted(Always(*[0.9] * 4), by_name[name], n, spelled)
        return many.en, many.zh, f"{noun.ko} {many.ko}"

    assert counted("book", 1204, False) == ("1,204 books", "1204本书", "책 1,204권")
    assert counted("book", 23, True) == ("twenty-three books", "二十三本书", "책 스물세 권")
    assert counted("dog", 2, True) == ("two dogs", "两只狗", "개 두 마리")
    assert counted("cup", 1, True) == ("one cup of coffee", "一杯咖啡", "커피 한 잔")
    assert counted("pair", 3, False) == ("3 pairs of shoes", "3双鞋", "신발 3켤레")
    assert counted("person", 20, True) == ("twenty people", "二十个人", "사람 스무 명")
    assert counted("person", 500, False) == ("500 people", "500人", "사람 500명")
    big = quantities.figures(Always(0.1), 2_500_000)
    assert (big.en, big.zh, big.ko) == ("2.5 million", "250万", "250만")
    most = quantities.figures(Always(0.1), 120_000_000)
    assert (most.en, most.zh, most.ko) == ("120 million", "1亿2000万", "1억 2000만")


def test_the_same_english_has_one_translation():
    known = {}
    for item in islice(draw(3), 12_000):
        assert known.setdefault(item.source, item.targets) == item.targets, item.source
    assert len(known) > 9000


def test_no_sentence_of_the_examination_is_taught():
    examined = [item.source for item in islice(draw(0, testing=True), 250)]
    assert len(set(examined)) == 250
    plain = {source.casefold().rstrip(".") for source in examined}
    taught = [item.source for item in islice(draw(0), 20_000)]
    assert not plain & {source.casefold().rstrip(".") for source in taught}
    assert all(held_out(source) and held_out(source.lower()) for source in examined)
    assert 0.5 < sum(held_out(f"{n} books") for n in range(20_000)) / 20_000 * HELD_OUT < 2


def test_every_kind_comes_and_all_is_written_out():
    kinds, seen = set(), list(islice(draw(1), 2500))
    for item in seen:
        kinds.add(item.kind)
        for text in (item.source, *(item.targets[to] for to in LANGUAGES)):
            assert text.strip() == text and "  " not in text and not set("{}|") & set(text), text
            assert ".." not in text, text
        assert not any("a" <= c <= "z" for to in LANGUAGES for c in item.targets[to]), item
    assert kinds == set(KINDS)
    assert [item.source for item in seen[:50]] == [item.source for item in islice(draw(1), 50)]
    assert [item.source for item in seen[:50]] != [item.source for item in islice(draw(2), 50)]
