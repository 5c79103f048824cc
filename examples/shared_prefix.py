"""Two questions about one document: the second finds the document's rows in the cache. Prints what that saved."""

import time

import kvik

DOCUMENT = (
    """Kvik is a small harbour town on a cold coast. Its lighthouse was built in 1874 by Marta Lund, who also
drew the town's first map. Every spring the herring arrive, and with them forty boats from the islands. The town has one
school, two bakeries and a library of eleven thousand books, most of them about the sea. """
    * 4
)

model = kvik.load("smollm2")
cache = model.cache("int8", memory=64 << 20)
for question in ("Who built the lighthouse?", "What do the herring bring in spring?"):
    text = model.tokenizer.chat([{"role": "user", "content": f"{DOCUMENT}\n\n{question}"}])
    prompt = model.tokenizer.encode(text)
    started = time.perf_counter()
    with cache.open(prompt) as sequence:
        answer = kvik.Generation(model, kvik.Request(prompt, max_tokens=24), sequence).run()
    print(f"{question}  {answer.text.strip()}")
    print(f"  {sequence.cached} of {len(prompt)} prompt tokens known, {time.perf_counter() - started:.2f} s in all")
print(cache.nbytes)
