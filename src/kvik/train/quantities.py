"""Prices, counts, measures and ordinals, and sentences about them."""

from __future__ import annotations

from random import Random

from kvik.train.numerals import chinese, chinese_count, english, native, ordinal, sino, suffixed
from kvik.train.parts import CITIES, PEOPLE, Phrase, fill, pick, word, words

THINGS = words("""
book books | 本 书 | 책 권
person people | 个 人 | 사람 명
student students | 名 学生 | 학생 명
child children | 个 孩子 | 아이 명
dog dogs | 只 狗 | 개 마리
cat cats | 只 猫 | 고양이 마리
bird birds | 只 鸟 | 새 마리
horse horses | 匹 马 | 말 마리
car cars | 辆 汽车 | 자동차 대
bicycle bicycles | 辆 自行车 | 자전거 대
computer computers | 台 电脑 | 컴퓨터 대
apple apples | 个 苹果 | 사과 개
egg eggs | 个 鸡蛋 | 달걀 개
bag bags | 个 包 | 가방 개
chair chairs | 把 椅子 | 의자 개
table tables | 张 桌子 | 탁자 개
tree trees | 棵 树 | 나무 그루
flower flowers | 朵 花 | 꽃 송이
letter letters | 封 信 | 편지 통
pencil pencils | 支 铅笔 | 연필 자루
ticket tickets | 张 票 | 표 장
photo photos | 张 照片 | 사진 장
house houses | 栋 房子 | 집 채
newspaper newspapers | 份 报纸 | 신문 부
cup of coffee cups of coffee | 杯 咖啡 | 커피 잔
glass of water glasses of water | 杯 水 | 물 잔
bottle of wine bottles of wine | 瓶 葡萄酒 | 포도주 병
pair of shoes pairs of shoes | 双 鞋 | 신발 켤레
""")
WHERE = words("""
in the room | 房间里 | 방에
in the library | 图书馆里 | 도서관에
in the shop | 商店里 | 가게에
at the school | 学校里 | 학교에
in the box | 箱子里 | 상자에
in the garden | 花园里 | 정원에
on the table | 桌子上 | 탁자 위에
""")
MONEY = words("""
dollar dollars $ | 美元 | 달러
euro euros € | 欧元 | 유로
pound pounds £ | 英镑 | 파운드
won won ₩ | 韩元 | 원
yuan yuan ¥ | 元 | 위안
yen yen - | 日元 | 엔
""")
GOODS = words("""
this book | 这本书 | 이 책
this bag | 这个包 | 이 가방
the ticket | 票 | 표
this chair | 这把椅子 | 이 의자
this car | 这辆汽车 | 이 자동차
this computer | 这台电脑 | 이 컴퓨터
the coffee | 咖啡 | 커피
""")
ORDERED = words("""
chapter | 章 | 장
lesson | 课 | 과
volume | 卷 | 권
""")
ASKED = words("""
question | 个问题 | 질문
time | 次 | 번
answer | 个答案 | 답
sentence | 个句子 | 문장
photo | 张照片 | 사진
""")
OFFICES = words("""
office | 办公室 | 사무실
library | 图书馆 | 도서관
restaurant | 餐厅 | 식당
bookshop | 书店 | 서점
classroom | 教室 | 교실
""")
DURATIONS = {  # most of them, how a number stands before it: Chinese, Korean in words
    "minute": (59, "分钟", " 분", sino),
    "hour": (48, "个小时", " 시간", native),
    "day": (60, "天", " 일", sino),
    "week": (52, "周", " 주", sino),
    "month": (36, "个月", " 개월", sino),
    "year": (99, "年", " 년", sino),
}
UNITS = words("""
kilometre kilometres | 公里 | 킬로미터
kilometer kilometers | 公里 | 킬로미터
metre metres | 米 | 미터
meter meters | 米 | 미터
kilogram kilograms | 公斤 | 킬로그램
litre litres | 升 | 리터
""")


def amount(rng: Random, most: int = 9) -> int:
    """A number of up to so many digits, each length as often."""
    digits = rng.randint(1, most)
    n = rng.randrange(1 if digits == 1 else 10 ** (digits - 1), 10**digits)
    return n // 10 ** (zeros := rng.randrange(digits)) * 10**zeros if rng.random() < 0.35 else n


def figures(rng: Random, n: int) -> Phrase:
    """In digits. Chinese has no commas; where there are millions Chinese and Korean count by ten thousands."""
    if n >= 10**6 and n % 10**5 == 0 and rng.random() < 0.6:
        en = f"{n / 10**6:g} million" if n < 10**8 else f"{n // 10**6} million"
        if float(en.split()[0]) * 10**6 == n:
            whole, rest = divmod(n // 10**4, 10**4)
            zh = (f"{whole}亿" if whole else "") + (f"{rest}万" if rest else "")
            ko = " ".join([f"{whole}억"] * bool(whole) + [f"{rest}만"] * bool(rest))
            return word(en, zh, ko)
    plain = 1000 <= n < 10_000 and rng.random() < 0.4
    return word(str(n) if plain else f"{n:,}", str(n), f"{n:,}")


def price(rng: Random) -> Phrase:
    """What something costs."""
    money = rng.choice(MONEY)
    one, many, sign = money.en.split()
    n, way = amount(rng, 7 if one in ("won", "yen") else 5), rng.random()
    if way < 0.25:
        n = amount(rng, 4)
        cost = word(f"{english(n)} {one if n == 1 else many}", chinese_count(n) + money.zh, f"{sino(n)} {money.ko}")
    else:
        said = figures(rng, n)
        if one in ("dollar", "euro", "pound") and rng.random() < 0.35:
            n, cents = n % 1000 + 2, f".{rng.choice((50, 99, 95, rng.randrange(10, 100))):02}"
            said = word(*(f"{n}{cents}" for _ in range(3)))
        signed = sign != "-" and way < 0.6 and "million" not in said.en
        en = f"{sign}{said.en}" if signed else f"{said.en} {one if said.en == '1' else many}"
        cost = word(en, said.zh + money.zh, (said.ko + " " if said.ko[-1] in "만억" else said.ko) + money.ko)
    if rng.random() < 0.2:
        return cost
    return pick(rng, [
        "it costs {cost}. | 价格是{cost}。 | 가격은 {cost}입니다.",
        "the price is {cost}. | 价格是{cost}。 | 가격은 {cost}입니다.",
        "{what} costs {cost}. | {what}的价格是{cost}。 | {what:은} {cost}입니다.",
        "I paid {cost} for {what}. | 我花了{cost}买{what}。 | 저는 {what}에 {cost:을} 냈습니다.",
    ], cost=cost, what=rng.choice(GOODS))  # fmt: skip


def number(rng: Random) -> Phrase:
    """A number by itself: in words, or between 10,000 and a billion in digits too."""
    n = amount(rng, rng.choice((3, 6, 9)))
    if rng.random() < 0.7:
        said = word(english(n, british=rng.random() < 0.5), chinese(n), sino(n))
    else:
        said = figures(rng, n)
    if rng.random() < 0.6:
        return said
    return fill("the number is {n}. | 这个数是{n}。 | 그 수는 {n}입니다.", n=said)


def _counted(rng: Random, thing: Phrase, n: int, spelled: bool) -> tuple[Phrase, Phrase]:
    """So many of something: before its counter in Chinese; in Korean the number and counter alone, and the noun."""
    forms, (unit, zh), (noun, counter) = thing.en.split(" "), thing.zh.split(), thing.ko.split()
    unit = "" if zh == "人" and n >= 100 else unit
    half = len(forms) // 2
    name = " ".join(forms[:half] if n == 1 else forms[half:])
    if spelled:
        many = word(english(n), chinese_count(n), f"{native(n)} {counter}")
    else:
        said = figures(rng, n)
        many = word(said.en, said.zh, said.ko + (" " if said.ko[-1] in "만억" else "") + counter)
    return word(f"{many.en} {name}", f"{many.zh}{unit}{zh}", many.ko), word("", "", noun)


def counted(rng: Random) -> Phrase:
    """How many of something there are."""
    thing, spelled = rng.choice(THINGS), rng.random() < 0.5
    n = rng.randint(1, 20 if rng.random() < 0.5 else 99) if spelled else amount(rng, rng.choice((2, 4, 7)))
    many, noun = _counted(rng, thing, n, spelled)
    who = rng.choice(PEOPLE[:2])
    forms = word("is" if n == 1 else "are", "", "")
    way = rng.random()
    if way < 0.15:
        return word(many.en, many.zh, f"{noun.ko} {many.ko}")
    if way < 0.3 and thing.en.startswith("person"):
        return fill(
            "{n} live in {city}. | 有{n}住在{city}。 | {city}에는 {m:이} 삽니다." if n > 1 else
            "{n} lives in {city}. | 有{n}住在{city}。 | {city}에는 {m:이} 삽니다.",
            n=many, m=word("", "", f"{noun.ko} {many.ko}"), city=rng.choice(CITIES),
        )  # fmt: skip
    return pick(rng, [
        "there {are} {n}. | 有{n}。 | {noun:이} {n} 있습니다.",
        "there {are} {n} {where}. | {where}有{n}。 | {where} {noun:이} {n} 있습니다.",
        "I see {n}. | 我看见{n}。 | {noun:이} {n} 보입니다.",
        "{who} has {n}. | {who}有{n}。 | {who}에게는 {noun:이} {n} 있습니다.",
        "we need {n}. | 我们需要{n}。 | 우리는 {noun:이} {n} 필요합니다.",
    ], n=many, noun=noun, where=rng.choice(WHERE), who=who, are=forms)  # fmt: skip


def _either(rng: Random, n: int, zh: str, ko: str, count: bool = False) -> Phrase:
    """A number before a unit, in digits or in words; `ko` begins with a space that only words keep."""
    if rng.random() < 0.5:
        return word(str(n), f"{n}{zh}", f"{n}{ko.strip()}")
    return word(english(n), (chinese_count if count else chinese)(n) + zh, sino(n) + ko)


def _lasting(rng: Random) -> Phrase:
    unit = rng.choice(list(DURATIONS))
    most, zh, ko, korean = DURATIONS[unit]
    n = rng.randint(1, most)
    name = unit if n == 1 else unit + "s"
    if rng.random() < 0.5:
        return word(f"{n} {name}", f"{n}{zh}", f"{n}{ko.strip()}")
    return word(f"{english(n)} {name}", chinese_count(n) + zh, korean(n) + ko)


def measured(rng: Random) -> Phrase:
    """Durations, ages, temperatures, percentages, lengths."""
    way, who = rng.random(), rng.choice(PEOPLE)
    if way < 0.4:
        return pick(rng, [
            "it takes {n}. | 需要{n}。 | {n} 걸립니다.",
            "it takes {n} to get to {city}. | 到{city}需要{n}。 | {city}까지 {n} 걸립니다.",
            "{who} stayed in {city} for {n}. | {who}在{city}待了{n}。 | {who:은} {city}에 {n} 동안 머물렀습니다.",
            "we waited for {n}. | 我们等了{n}。 | 우리는 {n} 동안 기다렸습니다.",
        ], n=_lasting(rng), who=who, city=rng.choice(CITIES))  # fmt: skip
    n, spelled = rng.randint(1, 99), rng.random() < 0.5
    if way < 0.55:
        age = word(english(n), chinese_count(n), native(n) + " ") if spelled else word(*[str(n)] * 3)
        old = word(f"{'am' if who.en == 'I' else 'is'} {age.en} year{'s' * (n > 1)} old", age.zh, age.ko)
        return fill("{who} {n}. | {who}{n}岁。 | {who:은} {n}살입니다.", who=who, n=old)
    if way < 0.7:
        below = rng.random() < 0.3
        degrees = _either(rng, n, "度", " 도", True)
        sign = ("minus ", "零下", "영하 ") if below else ("", "", "")
        what = word(f"{sign[0]}{degrees.en} degree{'s' * (n > 1)}", sign[1] + degrees.zh, sign[2] + degrees.ko)
        return fill("the temperature is {n}. | 气温是{n}。 | 기온은 {n}입니다.", n=what)
    if way < 0.85:
        if spelled:
            share = word(f"{english(n)} percent", f"百分之{chinese(n)}", f"{sino(n)} 퍼센트")
        else:
            share = word(f"{n}{rng.choice(('%', '%', ' percent'))}", f"{n}%", f"{n}%")
        return pick(rng, [
            "{n} of the students passed the exam. | {n}的学生通过了考试。 | 학생의 {m} 시험에 합격했습니다.",
            "the price rose by {n}. | 价格上涨了{n}。 | 가격이 {n} 올랐습니다.",
            "the price fell by {n}. | 价格下降了{n}。 | 가격이 {n} 내렸습니다.",
        ], n=share, m=word("", "", share.ko + "가"))  # fmt: skip
    unit = rng.choice(UNITS)
    one, many = unit.en.split()
    n = amount(rng, 4)
    if spelled:
        size = word(english(n), chinese_count(n), sino(n) + " ")
    else:
        size = figures(rng, n)
    said = word(f"{size.en} {one if n == 1 else many}", size.zh + unit.zh, size.ko + unit.ko)
    if one in ("kilogram", "litre"):
        return pick(
            rng,
            ["it is {n}. | 这是{n}。 | 이것은 {n}입니다.", "we need {n}. | 我们需要{n}。 | {n:이} 필요합니다."],
            n=said,
        )
    return pick(rng, [
        "it is {n} from here. | 离这里有{n}。 | 여기에서 {n}입니다.",
        "it is {n} to {city}. | 到{city}有{n}。 | {city}까지 {n}입니다.",
    ], n=said, city=rng.choice(CITIES))  # fmt: skip


def ordered(rng: Random) -> Phrase:
    """Chapters, pages, floors, rooms, questions."""
    way, spelled = rng.random(), rng.random() < 0.5
    n = rng.randint(1, 31 if spelled else 99)
    nth = ordinal(n) if spelled else suffixed(n)
    zh, ko = (chinese(n), sino(n) + " ") if spelled else (str(n), str(n))
    if way < 0.25:
        what = rng.choice(ORDERED)
        part = word(f"the {nth} {what.en}", f"第{zh}{what.zh}", f"제{ko}{what.ko}")
        return pick(rng, [
            "this is {n}. | 这是{n}。 | 이것은 {n}입니다.",
            "we are reading {n}. | 我们在读{n}。 | 우리는 {n:을} 읽고 있습니다.",
        ], n=part)  # fmt: skip
    if way < 0.45:
        floor = word(f"the {nth} floor", f"{zh}楼", f"{ko}층")
        sentence = "the {what} is on {n}. | {what}在{n}。 | {what:은} {n}에 있습니다."
        return fill(sentence, what=rng.choice(OFFICES), n=floor)
    if way < 0.6:
        n = rng.randint(1, 900)
        page = _either(rng, n, "页", " 쪽")
        return pick(rng, [
            "turn to page {p}. | 请翻到第{p}。 | {p:을} 펴세요.",
            "please read page {p}. | 请读第{p}。 | {p:을} 읽어 주세요.",
        ], p=page)  # fmt: skip
    if way < 0.7:
        n = rng.randint(101, 2999)
        return pick(rng, [
            "my room number is {n}. | 我的房间号是{n}。 | 제 방은 {n}호입니다.",
            "she is in room {n}. | 她在{n}号房间。 | 그녀는 {n}호실에 있습니다.",
        ], n=word(*[str(n)] * 3))  # fmt: skip
    what = rng.choice(ASKED)
    count = "첫" if n == 1 and spelled else native(n) if spelled else str(n)
    count = count + " " if spelled else count
    tail = "번째입니다." if what.en == "time" else f"번째 {what.ko}입니다."
    return Phrase(f"this is the {nth} {what.en}.", f"这是第{zh}{what.zh}。", f"이것은 {count}{tail}")
