"""Tokenizer and chat template: equal to transformers for honest models, one TokenizerError for hostile ones."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from kvik.errors import TokenizerError
from kvik.models.text.template import ChatTemplate
from kvik.models.text.tokenizer import TextStream, Tokenizer

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {% set offset = 1 %}
{% else %}
    {% set offset = 0 %}
{% endif %}
{% for message in messages[offset:] %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}
{{ ' ' ~ message['content'].strip() ~ eos_token }}{% endif %}
{% endfor %}"""
RICH = """{%- set ns = namespace(turns=0, roles=[]) -%}
{%- macro turn(role, text) -%}<{{ role | upper }}>{{ text | replace('<', '&lt;') }}{%- endmacro -%}
{%- for m in messages if m.role != 'skip' -%}
  {%- set ns.turns = ns.turns + 1 -%}
  {%- if loop.first -%}first {% endif -%}{%- if loop.last -%}last {{ loop.length }} {% endif -%}
  {{ turn(m.role, m.content) }}{{ m | tojson(indent=2) }}{{ m.get('name', 'nobody') }}
  {%- if m.content is string and 'b' in m.content.split() -%}{%- continue -%}{%- endif -%}
  {% generation %}{{ '%s-%d' | format(m.role, 5) }}{{ '{:>4}'.format(ns.turns) }}{% endgeneration %}
{%- endfor -%}
{{ messages | map(attribute='role') | join(',') }} {{ 2 ** 3 }} {{ ns.turns * 2 }} {{ 'ab' * 2 }} {{ tools is none }}
{{- (messages | selectattr('role', 'equalto', 'user') | list)[-1].content[::-1] }} {{ nothing }}{{ none }}"""
TALK = [
    {"role": "user", "content": "hello <b> ü"},
    {"role": "assistant", "content": " a b \n"},
    {"role": "user", "content": '<|im_end|> & "quotes" \''},
]


def backend():
    tokens = [*sorted(ByteLevel.alphabet()), "he", "hel"]
    made = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e"), ("he", "l")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", made.token_to_id("<|im_start|>"))]
    )
    return made


def reference(template):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    reference(CHATML).save_pretrained(path)
    return path


@pytest.mark.parametrize("template", [CHATML, LLAMA2, RICH], ids=["chatml", "llama2", "rich"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_renders_what_transformers_renders(tmp_path, template, prompt):
    expected = reference(template)
    expected.save_pretrained(tmp_path)
    got = Tokenizer(tmp_path).chat(TALK, add_generation_prompt=prompt)
    assert got == expected.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
    assert len(got) > 60


@pytest.mark.parametrize("text", ["", "hello hel", "<|im_start|>hello<|im_end|>", "日本語 🎉\n\t\0", " a  b "])
@pytest.mark.parametrize("special", [True, False])
def test_encode_and_decode_equal_transformers(folder, text, special):
    mine, theirs = Tokenizer(folder), reference(CHATML)
    ids = mine.encode(text, add_special_tokens=special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    for skip in (True, False):
        assert mine.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_encode_adds_nothing_unless_asked(folder):
    tokenizer = Tokenizer(folder)
    begin = tokenizer.token_id("<|im_start|>")
    assert tokenizer.encode("h", add_special_tokens=True) == [begin, *tokenizer.encode("h")]
    assert tokenizer.token_id("no such token") is None


def test_truncation_and_padding_left_in_a_file_have_no_effect(tmp_path):
    made = backend()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode("x" * 10)) == 10


def test_a_lone_surrogate_is_a_tokenizer_error(folder):
    with pytest.raises(TokenizerError, match="Unicode"):
        Tokenizer(folder).encode("a\ud800b")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_streamed_pieces_make_the_decoded_text(folder, text):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.step(i) for i in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=24))
def test_a_stream_of_any_ids_never_fails_and_makes_the_decoded_text(folder, ids):
    tokenizer = Tokenizer(folder)
    for skip in (True, False):
        stream = tokenizer.stream(skip_special=skip)
        assert "".join(stream.step(i) for i in ids) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


def byte_fallback():
    """A tokenizer like Llama 2's: ids 0 to 255 are bytes, 256 to 258 text."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"▁a": 256, "b": 257, "▁": 258, "<unk>": 259}
    made = Backend(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 258) | st.integers(256, 258), max_size=24))
def test_a_stream_goes_on_behind_bytes_that_are_no_text(ids):
    """DecodeStream itself gives up on such runs, for every id that follows."""
    stream = TextStream(byte_fallback(), True)
    text = "".join(stream.step(i) for i in [*ids, 258])
    assert [stream.step(i) for i in (256, 257, 256)] == [" a", "b", " a"]
    assert text.count("b") >= ids.count(257)
    assert stream.finish() == ""


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12))
def test_a_stream_of_fallback_bytes_makes_the_decoded_text(text):
    made = byte_fallback()
    ids = [257, *text.encode(), 256]
    stream = TextStream(made, True)
    assert "".join(stream.step(i) for i in ids) + stream.finish() == made.decode(ids) == f"b{text} a"


def test_a_stream_gives_a_character_as_soon_as_it_is_complete(folder):
    tokenizer = Tokenizer(folder)
    stream = tokenizer.stream()
    assert [stream.step(i) for i in tokenizer.encode("aé")] == ["a", "", "é"]


def test_the_template_file_wins_and_lists_give_their_default(tmp_path):
    backend().save(str(tmp_path / "tokenizer.json"))
    settings_file = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    settings_file.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "E"}}))
    assert Tokenizer(tmp_path).chat([]) == "DE"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer(tmp_path).chat([]) == "F"


def test_no_template_names_raw_as_the_way_out(tmp_path):
    backend().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="--raw"):
        tokenizer.chat(TALK)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{" * 100_000),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"chat_template": 3}'),
    ],
)
def test_a_damaged_tokenizer_is_named_in_one_line(tmp_path, name, content):
    backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


GROWING = "{% set ns = namespace(s=START) %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"
HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ (messages|attr('__class__')).x }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "mutates": "{{ messages.append(1) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "times": "{{ 'x' * 10**12 }}",
    "list-times": "{{ ([1] * 10**12)|length }}",
    "power": "{{ 10**(10**9) }}",
    "digits": "{{ (2**64)**64**64 }}",
    "center": "{{ 'x'|center(10**12) }}",
    "ljust": "{{ 'x'.ljust(10**12) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent-star": "{{ '%*d' % (10**12, 1) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "format-nested": "{{ '{:{w}}'.format(1, w=10**12) }}",
    "format-filter": "{{ '%999999999d'|format(1) }}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "indent": "{{ messages|tojson(indent=10**9) }}",
    "replace": "{{ ('x'*10000).replace('x', 'y'*10000).replace('y', 'z'*10000) }}",
    "join": "{{ (['x' * 10**6] * 10**3)|map('upper')|join }}",
    "doubling-concat": GROWING.replace("START", "'abcdefgh'").replace("STEP", "ns.s ~ ns.s"),
    "doubling-plus": GROWING.replace("START", "'abcdefgh'").replace("STEP", "ns.s + ns.s"),
    "doubling-lists": GROWING.replace("START", "['a']").replace("STEP", "[ns.s, ns.s]"),
    "doubling-block": "{% set ns = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set q %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% set ns.s = q %}{% endfor %}",
    "syntax": "{% if %}",
    "unclosed": "{% generation %}a",
    "deep": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "long": "x" * 2**21,
    "divide": "{{ 1 / 0 }}",
    "undefined": "{{ nothing.at.all }}",
    "include": "{% include '/etc/passwd' %}",
    "raises": "{{ raise_exception('roles must\nalternate') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_template_is_one_line_and_soon(name):
    started = time.process_time()
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(HOSTILE[name]).render({"messages": [{"role": "user", "content": "x"}]})
    assert "\n" not in str(caught.value)
    assert "--raw" in str(caught.value)
    assert time.process_time() - started < 30


def test_raise_exception_says_what_the_template_says():
    with pytest.raises(TokenizerError, match="roles must alternate"):
        ChatTemplate(HOSTILE["raises"]).render({})


def test_the_budget_is_for_one_rendering_and_ordinary_use_stays_far_below_it():
    template = ChatTemplate(CHATML)
    long = [{"role": "user", "content": "100% of {12345678} words " * 4000} for _ in range(40)]
    first = template.render({"messages": long})
    assert len(first) > 4_000_000
    for _ in range(9):
        assert template.render({"messages": long}) == first


def test_a_message_that_is_no_json_is_refused():
    with pytest.raises(TokenizerError, match="Path"):
        ChatTemplate(CHATML).render({"messages": [{"role": "user", "content": Path("x")}]})


def test_deeply_nested_messages_are_refused():
    nested = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(TokenizerError):
        ChatTemplate(CHATML).render({"messages": nested})
