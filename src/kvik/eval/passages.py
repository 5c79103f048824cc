"""Tasks for lm-eval that need no download, made from a text: the user's own, or the topics that come with Python.

    kvik_perplexity   how likely whole documents are
    kvik_last_word    a long beginning, and the word that comes next (as LAMBADA asks, arXiv:1606.06031)
    kvik_choice       a long beginning, and which of four runs of words goes on from it (as HellaSwag, arXiv:1905.07830)
    kvik_recall       a key that is hidden in a long text (arXiv:2305.16300), written out by the model

`lm_eval_tasks/` says what lm-eval does with them. Lengths are in words, so that any tokenizer has the same tasks; they
and the text's file are set with lm-eval's `--metadata`. lm-eval puts every argument of the model there as well: that
is what the functions leave alone (`**others`).
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from kvik.errors import UsageError

Row = dict[str, Any]
DOCUMENTS, WORDS, PLACES = 8, 300, 4
CHOICES, CHOICE_WORDS = 4, 12
DEPTHS = (0.1, 0.5, 0.9)
KEY = " The pass key is {}. Remember it."
QUESTION = "\n\nWhat is the pass key? The pass key is"


def perplexity(text: str | None = None, documents: int = DOCUMENTS, words: int = WORDS, **others: object) -> Row:
    """Documents, whole."""
    return _dataset([{"text": each} for each in cut(_read(text), documents, words)])


def last_word(
    text: str | None = None, documents: int = DOCUMENTS, words: int = WORDS, places: int = PLACES, **others: object
) -> Row:
    """Places in the second half of each document: what stands before, and the word there."""
    return _dataset([row for each in cut(_read(text), documents, words) for row in next_words(each, places)])


def choice(
    text: str | None = None, documents: int = DOCUMENTS, words: int = WORDS, places: int = PLACES, **others: object
) -> Row:
    """Places in the second half of each document: what stands before, and four ways to go on."""
    pieces = cut(_read(text), documents, words)
    return _dataset([row for number in range(len(pieces)) for row in choices(pieces, number, places)])


def recall(text: str | None = None, documents: int = DOCUMENTS, words: int = WORDS, **others: object) -> Row:
    """Each document with a key at three depths, and the question at its end."""
    return _dataset([row for each in cut(_read(text), documents, words) for row in hidden(each)])


def cut(text: str, documents: int, words: int) -> list[str]:
    """Pieces of so many words, evenly spread over a text, none overlapping, white space inside them as it was.

    Raises:
        UsageError: the text has fewer words, or a size is too small for tasks.

    >>> cut("a b  c d e f", documents=2, words=2)
    ['a b', 'd e']
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    if documents < 1 or words < 2:
        raise UsageError(f"{documents} documents of {words} words leave nothing to ask; use at least 1 of 2")
    if len(spans) < documents * words:
        raise UsageError(
            f"the text's {len(spans):,} words are fewer than the {documents * words:,} of {documents} documents of "
            f"{words}; give a longer text, or smaller documents or words"
        )
    starts = [number * len(spans) // documents for number in range(documents)]
    return [text[spans[start][0] : spans[start + words - 1][1]] for start in starts]


def next_words(document: str, places: int) -> list[Row]:
    """{"context", "word"} for words of four letters or more, evenly spread over a document's second half.

    >>> next_words("one two, three four five", 1)
    [{'context': 'one two, three', 'word': 'four'}]
    """
    words = list(re.finditer(r"(?<=\s)[A-Za-z]{4,}(?!\S)", document))
    late = [match for match in words if match.start() >= len(document) // 2]
    return [{"context": document[: each.start()].rstrip(), "word": each[0]} for each in _spread(late, places)]


def choices(documents: list[str], number: int, places: int) -> list[Row]:
    """{"context", "choices", "label"}: what comes next in one document among runs of words from anywhere in all of
    them. Equal documents give equal choices.

    Raises:
        UsageError: the documents have too few runs that differ.
    """
    runs = [_runs(each) for each in documents]
    known = sorted({run for each in runs for _, run in each})
    if len(known) < CHOICES:
        raise UsageError(f"the documents have too few different words for {CHOICES} choices; give longer ones")
    chance, rows = random.Random(f"kvik_choice {number}"), []
    for start, right in _spread(runs[number][len(runs[number]) // 2 :], places):
        wrong = [run for run in chance.sample(known, CHOICES) if run != right][: CHOICES - 1]
        label = chance.randrange(CHOICES)
        context = documents[number][:start].rstrip()
        rows.append({"context": context, "choices": [*wrong[:label], right, *wrong[label:]], "label": label})
    return rows


def hidden(document: str) -> list[Row]:
    """{"context", "key"}: a document with a key behind the word at each depth."""
    ends = [match.end() for match in re.finditer(r"\S+", document)]
    rows = []
    for depth in DEPTHS:
        key = str(random.Random(f"kvik_recall {depth} {document[:64]}").randrange(10_000, 100_000))
        at = ends[round(depth * (len(ends) - 1))]
        rows.append({"context": document[:at] + KEY.format(key) + document[at:] + QUESTION, "key": key})
    return rows


def _runs(document: str) -> list[tuple[int, str]]:
    """Where every run of CHOICE_WORDS words starts that has words before it, and the run."""
    spans = [match.span() for match in re.finditer(r"\S+", document)]
    ends = zip(spans[1:], spans[CHOICE_WORDS:], strict=False)
    return [(start, document[start:stop]) for (start, _), (_, stop) in ends]


def _spread(found: Any, count: int) -> list[Any]:
    """So many of a sequence, evenly spread; all of a shorter one."""
    count = min(count, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def _read(text: str | None) -> str:
    if text is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(text).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"text {text}: can't be read ({error.strerror}); name a text file in --metadata") from None


def _dataset(rows: list[Row]) -> Row:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
