"""What a cache for transformers must do, as small checks against any class: `python -m kvik.hf.conformance`.

Truth is never another cache: it is the same model without one (`use_cache=False`), row by row and without padding.
All models are tiny, have random weights and are made here; nothing is downloaded.

    verdicts.py    what can come of a case
    caches.py      the classes under test, and how each is made
    models.py      the tiny models
    subject.py     a tiny model and its twin: logits without a cache, and how far others are from them
    given.py       what a case gets
    cases.py       all cases, in order
    turns.py batches.py search.py windows.py architectures.py encoders.py uses.py mixture.py manners.py
                   the cases
    registries.py  what an import changed in transformers (run by path, in a process of its own)
    run.py         runs cases
    view.py        tables: for a terminal, as JSON, and the one in docs/conformance.md
"""
