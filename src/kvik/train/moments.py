"""Dates and times of day, and sentences about them."""

from __future__ import annotations

import datetime
from random import Random

from kvik.train.numerals import chinese, chinese_digits, english, english_year, native, ordinal, sino, suffixed
from kvik.train.parts import CITIES, PEOPLE, Phrase, fill, pick, word, words

WEEKDAYS = words("""
Monday | 星期一 | 월요일
Tuesday | 星期二 | 화요일
Wednesday | 星期三 | 수요일
Thursday | 星期四 | 목요일
Friday | 星期五 | 금요일
Saturday | 星期六 | 토요일
Sunday | 星期日 | 일요일
""")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October"),
    *("November", "December"),
)
EVENTS = words("""
meeting | 会议 | 회의
exam | 考试 | 시험
concert | 音乐会 | 음악회
party | 聚会 | 파티
wedding | 婚礼 | 결혼식
interview | 面试 | 면접
game | 比赛 | 경기
lecture | 讲座 | 강의
""")
STARTING = [*EVENTS, *words("""
class | 课程 | 수업
film | 电影 | 영화
show | 演出 | 공연
""")]  # fmt: skip
LEAVING = words("""
train | 火车 | 기차
bus | 公共汽车 | 버스
plane | 飞机 | 비행기
ship | 船 | 배
""")
PLACES = words("""
shop | 商店 | 가게
library | 图书馆 | 도서관
bank | 银行 | 은행
museum | 博物馆 | 박물관
restaurant | 餐厅 | 식당
post office | 邮局 | 우체국
pharmacy | 药店 | 약국
""")
AT_DATES = [
    "the {what} is {on}. | {what}在{on}举行。 | {what:은} {on}에 있습니다.",
    "the {what} will be held {on}. | {what}将在{on}举行。 | {what:은} {on}에 열릴 예정입니다.",
]
AT_TIMES = [
    "the {what} starts at {time}. | {what}在{time}开始。 | {what:은} {time}에 시작합니다.",
    "the {what} begins at {time}. | {what}在{time}开始。 | {what:은} {time}에 시작합니다.",
    "the {what} ends at {time}. | {what}在{time}结束。 | {what:은} {time}에 끝납니다.",
]
TRIPS = [
    "the {what} leaves at {time}. | {what}在{time}出发。 | {what:은} {time}에 출발합니다.",
    "the {what} arrives at {time}. | {what}在{time}到达。 | {what:은} {time}에 도착합니다.",
    "the {what} to {city} leaves at {time}. | 去{city}的{what}在{time}出发。 | {city}행 {what:은} {time}에 출발합니다.",
    "the {what} from {city} arrives at {time}. | 从{city}来的{what}在{time}到达。 | "
    "{city}발 {what:은} {time}에 도착합니다.",
]
REQUESTS = [
    "please call me at {time}. | 请在{time}给我打电话。 | {time}에 전화해 주세요.",
    "please call me before {time}. | 请在{time}以前给我打电话。 | {time} 전에 전화해 주세요.",
    "please call me after {time}. | 请在{time}以后给我打电话。 | {time} 이후에 전화해 주세요.",
    "please wake me up at {time}. | 请在{time}叫醒我。 | {time}에 깨워 주세요.",
    "let's meet at {time}. | 我们{time}见面吧。 | {time}에 만납시다.",
    "it is {time}. | 现在是{time}。 | 지금은 {time}입니다.",
    "I get up at {time}. | 我{time}起床。 | 저는 {time}에 일어납니다.",
    "I go to bed at {time}. | 我{time}睡觉。 | 저는 {time}에 잡니다.",
]
HOURS = [
    "the {what} opens at {time}. | {what}{time}开门。 | {what:은} {time}에 엽니다.",
    "the {what} closes at {time}. | {what}{time}关门。 | {what:은} {time}에 닫습니다.",
    "the {what} opens at {time} and closes at {other}. | {what}{time}开门，{other}关门。 | "
    "{what:은} {time}에 열고 {other}에 닫습니다.",
    "the {what} is open from {time} to {other}. | {what}从{time}到{other}开门。 | "
    "{what:은} {time}부터 {other}까지 엽니다.",
]


def date(rng: Random) -> Phrase:
    """A day of 1900 to 2099, written in one of several ways; with its weekday, or its year, or without."""
    day = datetime.date(1900, 1, 1) + datetime.timedelta(days=rng.randrange(73_049))
    if rng.random() < 0.7:
        day = day.replace(year=rng.randint(1990, 2035), day=min(day.day, 28))
    month, name = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    years = rng.random() < 0.75
    if rng.random() < 0.15:
        return _written_out(day, years, rng.random() < 0.5)
    form = rng.choice(("{d} {m}{y}", "{d} {m}{y}", "{m} {d}{c}", "{m} {th}{c}", "{th} {m}{y}", "the {th} of {m}{y}"))
    if years and rng.random() < 0.08:
        plain = f"{day:%Y-%m-%d}"
    else:
        y, c = (f" {day.year}", f", {day.year}") if years else ("", "")
        plain = form.format(d=day.day, m=month, y=y, c=c, th=suffixed(day.day))
    zh, ko = f"{day.month}月{day.day}日", f"{day.month}월 {day.day}일"
    if years:
        zh, ko = f"{day.year}年{zh}", f"{day.year}년 {ko}"
    if rng.random() < 0.5:
        comma = "," if rng.random() < 0.7 else ""
        return word(f"{name.en}{comma} {plain}", zh + name.zh, f"{ko} {name.ko}")
    return word(plain, zh, ko)


def _written_out(day: datetime.date, years: bool, american: bool) -> Phrase:
    """The third of March, twenty twenty-five; or March third."""
    month, number = MONTHS[day.month - 1], ordinal(day.day)
    en = f"{month} {number}" if american else f"the {number} of {month}"
    months = {6: "유", 10: "시"}
    zh = f"{chinese(day.month)}月{chinese(day.day)}日"
    ko = f"{months.get(day.month, sino(day.month))}월 {sino(day.day)}일"
    if not years:
        return word(en, zh, ko)
    return word(f"{en}, {english_year(day.year)}", f"{chinese_digits(day.year)}年{zh}", f"{sino(day.year)}년 {ko}")


def _part_of_day(hour: int) -> tuple[str, str]:
    """What Chinese and Korean call the hour of 0 to 23."""
    names = ((6, "凌晨"), (12, "上午"), (13, "中午"), (18, "下午"), (24, "晚上"))
    return next(name for end, name in names if hour < end), "오전" if hour < 12 else "오후"


def time(rng: Random) -> Phrase:
    """A time of day: in digits by 12 or 24 hours, or in words."""
    hour = rng.randrange(24) if rng.random() < 0.4 else rng.randint(7, 21)
    minute = rng.choice((0, 15, 30, 45, rng.randrange(60), rng.randrange(0, 60, 5)))
    way = rng.random()
    if way < 0.2:
        return _in_words(rng, hour, minute)
    if way < 0.35:
        ko = f"{hour}시" + (f" {minute}분" if minute else "")
        return word(f"{hour}:{minute:02}", f"{hour}点{_minutes(minute)}", ko)
    return _of_twelve(rng, hour, minute)


def _of_twelve(rng: Random, hour: int, minute: int) -> Phrase:
    """In digits, with am or pm in one of several spellings."""
    zh_part, ko_part = _part_of_day(hour)
    shown = hour % 12 or 12
    local = 0 if hour == 0 else shown  # just after midnight clocks start from 0
    en = f"{shown}:{minute:02}" if minute or rng.random() < 0.5 else f"{shown}"
    mark = ("am", "a.m.", "AM") if hour < 12 else ("pm", "p.m.", "PM")
    gap = "" if rng.random() < 0.2 else " "
    ko = f"{ko_part} {local}시" + (f" {minute}분" if minute else "")
    return word(f"{en}{gap}{rng.choice((mark[0], *mark))}", f"{zh_part}{local}点{_minutes(minute)}", ko)


def _minutes(minute: int) -> str:
    """In digits; nothing on the hour."""
    return f"{minute:02}分" if minute else ""


def _in_words(rng: Random, hour: int, minute: int) -> Phrase:
    """half past three in the afternoon, three fifteen, twenty to four …: from one in the morning to eleven at night."""
    if hour in (0, 12):
        return word("noon", "中午十二点", "낮 열두 시") if hour else word("midnight", "午夜十二点", "밤 열두 시")
    parts = {6: "", 12: " in the morning", 18: " in the afternoon", 21: " in the evening", 24: " at night"}
    behind = next(text for end, text in parts.items() if hour < end)
    zh_part, ko_part = _part_of_day(hour)
    if not behind or rng.random() < 0.4:
        zh_part = ko_part = behind = ""
    shown, minute = (hour - 1) % 12 + 1, minute // 5 * 5
    following, way = shown % 12 + 1, rng.random()
    zh, ko = f"{chinese(shown) if shown != 2 else '两'}点", f"{native(shown)} 시"
    if minute == 0:
        en = f"{english(shown)} o'clock"
    elif minute == 30 and way < 0.6:
        en, zh, ko = f"half past {english(shown)}", zh + "半", ko + " 반"
    elif minute == 15 and way < 0.6:
        en, zh, ko = f"a quarter past {english(shown)}", zh + "一刻", ko + " 십오 분"
    elif minute == 45 and way < 0.6 and shown != 11:
        en, zh, ko = f"a quarter to {english(following)}", zh + "三刻", ko + " 사십오 분"
    elif minute < 30 and minute != 15 and way < 0.3:
        en, zh, ko = f"{english(minute)} past {english(shown)}", *_after(zh, ko, minute)
    else:
        spoken = "oh five" if minute == 5 else english(minute)
        en, zh, ko = f"{english(shown)} {spoken}", *_after(zh, ko, minute)
    return word(en + behind, zh_part + zh, f"{ko_part} {ko}".strip())


def _after(zh: str, ko: str, minute: int) -> tuple[str, str]:
    return f"{zh}{'零' if minute < 10 else ''}{chinese(minute)}分", f"{ko} {sino(minute)} 분"


def when(rng: Random) -> Phrase:
    """A date or a weekday, with a time or without, or a time, as it follows a verb: "on Monday, 3 March at 4 pm"."""
    if rng.random() < 0.15:
        hour = time(rng)
        return word(f"at {hour.en}", hour.zh, hour.ko)
    if rng.random() < 0.75:
        day = date(rng)
    else:
        day = rng.choice(WEEKDAYS)
    if rng.random() < 0.5:
        return word(f"on {day.en}", day.zh, day.ko)
    hour = time(rng)
    return word(f"on {day.en} at {hour.en}", day.zh + hour.zh, f"{day.ko} {hour.ko}")


def dated(rng: Random) -> Phrase:
    """About a day."""
    if rng.random() < 0.2:
        return date(rng)
    who, day = rng.choice(PEOPLE), date(rng) if rng.random() < 0.9 else rng.choice(WEEKDAYS)
    return pick(rng, [
        "today is {day}. | 今天是{day}。 | 오늘은 {day}입니다.",
        "{who} was born on {day}. | {who}出生于{day}。 | {who:은} {day}에 태어났습니다.",
        "{who} will arrive on {day}. | {who}将于{day}到达。 | {who:은} {day}에 도착할 예정입니다.",
        "my birthday is {day}. | 我的生日是{day}。 | 제 생일은 {day}입니다.",
        "the letter was written on {day}. | 这封信写于{day}。 | 이 편지는 {day}에 쓰였습니다.",
    ], who=who, day=day)  # fmt: skip


def timed(rng: Random) -> Phrase:
    """About a time of day."""
    hour, way = time(rng), rng.random()
    if way < 0.2:
        return hour
    if way < 0.4:
        return pick(rng, AT_TIMES, what=rng.choice(STARTING), time=hour)
    if way < 0.6:
        return pick(rng, TRIPS, what=rng.choice(LEAVING), city=rng.choice(CITIES), time=hour)
    if way < 0.8:
        return pick(rng, HOURS, what=rng.choice(PLACES), time=hour, other=time(rng))
    return pick(rng, REQUESTS, time=hour)


def meeting(rng: Random) -> Phrase:
    """About something at a date, often with a time."""
    way = rng.random()
    if way < 0.7:
        return pick(rng, AT_DATES, what=rng.choice(EVENTS), on=when(rng))
    if way < 0.85:
        return fill("let's meet {on}. | 我们{on}见面吧。 | {on}에 만납시다.", on=when(rng))
    return pick(rng, [
        "the {place} is closed on {day}s. | {place}{day}休息。 | {place:은} {day}에 쉽니다.",
        "we have a meeting every {day} at {time}. | 我们每个{day}{time}开会。 | "
        "우리는 매주 {day} {time}에 회의를 합니다.",
    ], place=rng.choice(PLACES), day=rng.choice(WEEKDAYS), time=time(rng))  # fmt: skip


def yearly(rng: Random) -> Phrase:
    """About a year, in digits, a month before it or not, or in words."""
    year = rng.randint(1100, 2099) if rng.random() < 0.3 else rng.randint(1900, 2040)
    if rng.random() < 0.5:
        said = word(str(year), f"{year}年", f"{year}년")
        if rng.random() < 0.3:
            month = rng.randint(1, 12)
            said = word(f"{MONTHS[month - 1]} {year}", f"{said.zh}{month}月", f"{said.ko} {month}월")
    else:
        said = word(english_year(year), f"{chinese_digits(year)}年", f"{sino(year)}년")
    return pick(rng, [
        "the house was built in {year}. | 这座房子建于{year}。 | 이 집은 {year}에 지어졌습니다.",
        "the book was written in {year}. | 这本书写于{year}。 | 이 책은 {year}에 쓰였습니다.",
        "{who} moved to {city} in {year}. | {who}{year}搬到了{city}。 | {who:은} {year}에 {city:로} 이사했습니다.",
        "{who} was born in {year}. | {who}出生于{year}。 | {who:은} {year}에 태어났습니다.",
    ], year=said, who=rng.choice(PEOPLE), city=rng.choice(CITIES))  # fmt: skip
