"""Known prefixes, and caches in files."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

import kvik.hf
from hf_models import made
from kvik.errors import ModelError, SequenceError, StorageError
from test_hf_models import OPTIONS, padded, sources

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module")
def llama():
    return made("llama")


def prompt(columns, seed=2, rows=1):
    torch.manual_seed(seed)
    return torch.randint(3, 150, (rows, columns))


@pytest.fixture
def prefixes(llama):
    with kvik.hf.PrefixCache(llama) as prefixes:
        yield prefixes
        prefixes.pages.check()


def test_what_was_computed_is_found_again(llama, prefixes):
    document = prompt(100)
    for seed, known in ((0, 0), (1, 96), (2, 96)):
        inputs = dict(input_ids=torch.cat((document, prompt(12, seed)), 1))
        expected = llama.generate(**inputs, **OPTIONS)
        with prefixes.open(**inputs) as cache:
            assert cache.get_seq_length() == known
            assert torch.equal(llama.generate(**inputs, past_key_values=cache, **OPTIONS), expected)
    assert prefixes.known == 192 and "192 known" in prefixes.describe()


def test_a_padded_batch_knows_what_its_rows_have_in_common(llama, prefixes):
    system = prompt(70)
    texts = [torch.cat((system[0], prompt(count, count)[0])) for count in (9, 30, 3)]
    ids, mask = torch.zeros((3, 100), dtype=torch.long), torch.zeros((3, 100), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1
    inputs = dict(input_ids=ids, attention_mask=mask)
    expected = llama.generate(**inputs, **OPTIONS)
    with prefixes.open(system) as first:
        llama(system, past_key_values=first)
    for known in (64, 85):
        with prefixes.open(**inputs) as cache:
            assert cache.get_seq_length() >= known, "columns that every row knows"
            assert torch.equal(llama.generate(**inputs, past_key_values=cache, **OPTIONS), expected)


def test_a_chats_next_turn_finds_the_last_one(llama, prefixes):
    ids = prompt(40)
    for turn in range(3):
        with prefixes.open(ids) as cache:
            assert cache.get_seq_length() >= 32 * turn
            options = {**OPTIONS, "max_new_tokens": 30, "attention_mask": torch.ones_like(ids)}
            out = llama.generate(ids, past_key_values=cache, **options)
        assert torch.equal(out, llama.generate(ids, **options))
        ids = torch.cat((out, prompt(5, turn)), 1)


def test_salt_and_tokens_keep_rows_apart(llama, prefixes):
    ids = prompt(80)
    with prefixes.open(ids, salt="a") as cache:
        llama(ids, past_key_values=cache)
    with prefixes.open(ids, salt="b") as cache:
        assert cache.get_seq_length() == 0
    with prefixes.open(ids, salt="a") as cache:
        assert cache.get_seq_length() == 79 // 32 * 32
    both = torch.cat((ids, prompt(80, seed=3)))
    with prefixes.open(both, salt="a") as cache:
        assert cache.get_seq_length() == 0, "of the second row nothing is known"
        with pytest.raises(SequenceError, match="not those that the cache was opened for"):
            llama(both.flip(0), past_key_values=cache)


def test_beams_begin_at_a_known_prefix(llama, prefixes):
    ids = prompt(70)
    expected = llama.generate(ids, num_beams=3, **OPTIONS)
    for known in (0, 64):
        with prefixes.open(ids) as cache:
            assert cache.get_seq_length() == known
            assert torch.equal(llama.generate(ids, num_beams=3, past_key_values=cache, **OPTIONS), expected)


def test_a_full_memory_drops_what_was_used_least(llama):
    with kvik.hf.PrefixCache(llama, memory="1MiB") as prefixes:
        for seed in range(12):
            ids = prompt(250, seed)
            with prefixes.open(ids) as cache:
                llama(ids, past_key_values=cache)
        assert prefixes.evicted > 0 and "dropped for room" in prefixes.describe()
        with prefixes.open(prompt(250, 11)) as cache:
            assert cache.get_seq_length() == 224


def test_models_whose_rows_are_not_all_are_refused():
    for name in ("jamba", "t5"):
        with pytest.raises(ModelError, match=r"use kvik\.hf\.Cache"):
            kvik.hf.PrefixCache(made(name))


SPECS = ["f32", "k8v4", "f32+window:40,sinks:4", "f32+snapkv:25%,every:8", "int8+h2o:48rows,recent:8,every:16",
    "f32+quest:4pages"]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_saved_cache_goes_on_as_if_nothing_had_been(llama, tmp_path, spec):
    ids, more = prompt(130), prompt(9, 4)
    with kvik.hf.Cache(llama, spec) as cache, torch.inference_mode():
        llama(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        bytes_before = cache.nbytes.payload
        expected = [llama(x, past_key_values=cache).logits for x in more.split(1, 1)]
    with kvik.hf.Cache.load(llama, tmp_path / "cache.safetensors") as cache, torch.inference_mode():
        assert str(cache.spec) == spec and cache.nbytes.payload == bytes_before
        cache.pages.check()
        for x, logits in zip(more.split(1, 1), expected, strict=True):
            assert torch.equal(llama(x, past_key_values=cache).logits, logits)
        cache.pages.check()
    cache.pages.check()


@pytest.mark.parametrize("name", ["gemma3", "bloom", "gemma3n"])
def test_a_batch_with_padding_and_windows_is_saved(name, tmp_path):
    model, inputs = made(name), padded()
    with kvik.hf.Cache(model) as cache:
        ids = model.generate(**inputs, past_key_values=cache, **OPTIONS)
        cache.save(tmp_path / "cache.safetensors")
        mask = torch.cat((inputs["attention_mask"], torch.ones((3, ids.shape[1] - 14), dtype=torch.long)), 1)
        expected = model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
    with kvik.hf.Cache.load(model, tmp_path / "cache.safetensors") as cache:
        assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS), expected)


def test_beams_in_a_file_still_share_their_pages(llama, tmp_path):
    ids = prompt(128)
    with kvik.hf.Cache(llama) as cache, torch.inference_mode():
        llama(ids.repeat(4, 1), past_key_values=cache)
        cache.save(tmp_path / "four")
        before = cache.nbytes.payload
    assert (tmp_path / "four").stat().st_size < 2 * before
    with kvik.hf.Cache.load(llama, tmp_path / "four") as cache:
        assert cache.nbytes.payload == before
        cache.pages.check()


PROGRAM = """
import sys
sys.path.insert(0, 'tests')
import torch, kvik.hf
from hf_models import made
model = made('llama')
with kvik.hf.Cache.load(model, sys.argv[1]) as cache:
    ids = torch.tensor([eval(sys.argv[2])])
    print(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())
"""


def test_another_process_goes_on_with_the_same_tokens(llama, tmp_path):
    ids, options = prompt(50), dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with kvik.hf.Cache(llama) as cache:
        llama(ids[:, :40], past_key_values=cache)
        cache.save(tmp_path / "cache")
    expected = llama.generate(ids, **options)[0].tolist()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), str(ids[0].tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == str(expected)


@pytest.fixture
def saved(llama, tmp_path):
    with kvik.hf.Cache(llama) as cache:
        llama(prompt(40), past_key_values=cache)
        cache.save(tmp_path / "cache")
    return tmp_path / "cache"


def tampered(path, change, digest=True):
    """A file whose tensors were changed by somebody who knows how the checksum is made."""
    from kvik.hf import files

    about = files.heading(path)
    tensors = load_file(path)
    change(tensors, about)
    told = {name: value for name, value in about.items() if name not in ("version", "sha256")}
    if digest:
        files.write(path, tensors, told)
    else:
        with safe_open(path, framework="pt") as file:
            save_file(tensors, path, metadata=file.metadata())


def check_refused(model, path, words):
    with pytest.raises(StorageError, match=words) as caught:
        kvik.hf.Cache.load(model, path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_such_cache_is_refused(llama, saved, tmp_path):
    check_refused(llama, tmp_path / "none", "is not there")
    (tmp_path / "text").write_text("hello")
    check_refused(llama, tmp_path / "text", "is no saved cache")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    check_refused(llama, tmp_path / "other", "something else")
    check_refused(made("llama", seed=3), saved, "another model")
    check_refused(made("qwen2"), saved, "another model")


def test_a_damaged_file_is_refused(llama, saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-100])
    check_refused(llama, saved, "cut off")
    broken = bytearray(whole)
    broken[-40] ^= 1
    saved.write_bytes(bytes(broken))
    check_refused(llama, saved, "checksum")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", torch.tensor([[-1, 0, 0, 0]])),
        ("rows", torch.tensor([[1 << 40, 40, 40, 0]])),
        ("tokens.0", torch.full((40,), -1)),
        ("table.0.0.pages", torch.full((6, 2), 99, dtype=torch.int32)),
        ("table.0.0.logical", torch.tensor([1, 0], dtype=torch.int32)),
        ("pages.0", torch.zeros((12, 7), dtype=torch.uint8)),
        ("real", torch.ones((2, 40), dtype=torch.bool)),
        ("real", torch.zeros((1, 40), dtype=torch.bool)),
        ("real", None),
        ("tokens.0", None),
    ],
)
def test_numbers_that_make_no_sense_are_refused_though_their_checksum_is_right(llama, saved, name, value):
    def change(tensors, about):
        tensors.pop(name)
        if value is not None:
            tensors[name] = value

    tampered(saved, change)
    check_refused(llama, saved, "is not what a saved cache|does not say where")


def test_a_file_of_another_layout_is_refused(llama, saved):
    def change(tensors, about):
        about["fingerprint"] = "0" * 64

    tampered(saved, change)
    check_refused(llama, saved, "in another way")


def test_a_cache_that_can_not_be_saved_says_why(llama, tmp_path):
    with kvik.hf.Cache(llama) as cache, pytest.raises(SequenceError, match="empty"):
        cache.save(tmp_path / "x")
    jamba = made("jamba")
    with kvik.hf.Cache(jamba) as cache:
        jamba(prompt(5), past_key_values=cache)
        with pytest.raises(SequenceError, match="recurrent states"):
            cache.save(tmp_path / "x")
    with kvik.hf.Cache(llama) as cache:
        llama(prompt(5), past_key_values=cache)
        with pytest.raises(StorageError, match="can't be written"):
            cache.save(tmp_path / "no" / "x")


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_source_is_saved_with_its_text(name, tmp_path):
    model, inputs = made(name), sources(name)
    from transformers import GenerationMixin

    with kvik.hf.Cache(model, "f32; cross: int8") as cache:
        ids = GenerationMixin.generate(model, **inputs, past_key_values=cache, **OPTIONS)
        cache.save(tmp_path / "cache")
        more = dict(decoder_input_ids=ids[:, -1:], encoder_outputs=encoded(model, inputs), past_key_values=cache)
        mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
        expected = model(**more, **mask).logits
    with kvik.hf.Cache.load(model, tmp_path / "cache") as cache:
        assert torch.equal(model(**{**more, "past_key_values": cache}, **mask).logits, expected)
        cache.pages.check()


@torch.no_grad()
def encoded(model, inputs):
    return model.get_encoder()(**inputs)
