"""Examples become exactly these tokens and of them exactly these are learnt: the prompt never, the answer and its eos always, one bos, and
eos last; also where something had to be cut. What a model is asked at prediction is what its training rows began with.

Rows are written as words: the tokenizers here have one token a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example as with_case
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from lorica.config import ConfigError
from lorica.data.asking import ask_text
from lorica.data.encoding import IGNORE, Candidates, CausalEncoder, ClassifierEncoder, Encoded, Truncation
from lorica.data.examples import Example, Message

CHEAP = settings(max_examples=25, deadline=None, database=None)

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = [*"abcdefghijklmnop", "yes", "no", "maybe", "so", "good", "enough", "very", "bad", "not", "at", "all"]
WORDS += ["System:", "User:", "Assistant:", "[INST]", "[/INST]", "<<SYS>>", "Label:", "Q:"]
INST = (
    "{{bos_token}}{% for m in messages %}{% if m.role=='user' %}[INST] {{m.content}} [/INST]"
    "{% elif m.role=='system' %}<<SYS>> {{m.content}} {% else %} {{m.content}}{{eos_token}}{% endif %}{% endfor %}"
)
CHATML = "{% for m in messages %}<s>{{m.role}}\n{{m.content}}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"


def wrapped(tokenizer: Tokenizer, template: str | None, **special: Any) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in names.items() if v is not None})
    fast.chat_template = template
    return fast


def word_tokenizer(template: str | None = None, single: str = "<s> $A", **special: Any) -> PreTrainedTokenizerFast:
    """One token a word, white space dropped; `single` is what it makes of a text on its own."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 3)])
    return wrapped(tokenizer, template, **special)


def spaced_tokenizer(words: Sequence[str], template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word with the space before it, as most BPE tokenizers have them, and one for a line break."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, "\n", " ", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?\S+"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return wrapped(tokenizer, template)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return wrapped(tokenizer, template)


PLAIN, CHAT = word_tokenizer(), word_tokenizer(INST)
BOTH = pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "template"])


def words(ids: Sequence[int], tokenizer: Any = PLAIN) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


def learnt(row: Encoded, tokenizer: Any = PLAIN) -> str:
    """The row with a dash at each place that is not learnt."""
    assert all(label in (IGNORE, token) for token, label in zip(row.ids, row.labels, strict=True))
    return " ".join("-" if label == IGNORE else tokenizer.convert_ids_to_tokens(label) for label in row.labels)


def one(encoder: CausalEncoder, example: Example, truncation: Truncation | None = None) -> Encoded:
    return encoder.encode([example], truncation or Truncation())[0]


def asked(prompt: str, completion: str) -> Example:
    return Example("", prompt=prompt, completion=completion)


def chat(*contents: str, system: str | None = None) -> Example:
    turns = [Message("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    return Example("", messages=tuple(([Message("system", system)] if system else []) + turns))


# --------------------------------------------------------------------------------------------------------------- plain


def test_an_instruction_masks_the_prompt_and_learns_the_answer_and_eos() -> None:
    row = one(CausalEncoder(PLAIN, 32), asked("Q: a b", "yes so"))
    assert list(row.ids) == PLAIN.convert_tokens_to_ids(["<s>", "Q:", "a", "b", "yes", "so", "</s>"])
    assert learnt(row) == "- - - - yes so </s>"
    assert row.supervised == 3 and row.label == -1


def test_a_labelled_text_learns_its_labels_name_and_eos() -> None:
    encoder = CausalEncoder(PLAIN, 32, label_names=["bad", "very good"])
    row = one(encoder, Example("", text="a b", label=1, prompt="a b\nLabel:"))
    assert words(row.ids) == "<s> a b Label: very good </s>"
    assert learnt(row) == "- - - - very good </s>"


def test_rows_keep_the_order_of_their_examples_beyond_one_chunk() -> None:
    truncation = Truncation()
    rows = CausalEncoder(PLAIN, 32).encode([asked(f"Q: {WORDS[i % 16]}", WORDS[i % 15]) for i in range(2005)], truncation)
    assert [words(row.ids) for row in rows] == [f"<s> Q: {WORDS[i % 16]} {WORDS[i % 15]} </s>" for i in range(2005)]
    assert truncation == Truncation()


def test_conversations_are_written_with_the_speakers_names() -> None:
    row = one(CausalEncoder(PLAIN, 32), chat("a b", "yes", "c", "no so"))
    assert words(row.ids) == "<s> User: a b Assistant: yes </s> User: c Assistant: no so </s>"
    assert learnt(row) == "- - - - - yes </s> - - - no so </s>"


def test_a_system_message_comes_first_and_is_not_learnt() -> None:
    row = one(CausalEncoder(PLAIN, 32), chat("a", "yes", system="b c"))
    assert words(row.ids) == "<s> System: b c User: a Assistant: yes </s>"
    assert learnt(row) == "- - - - - - - yes </s>"


def test_use_chat_template_false_leaves_the_template_out() -> None:
    assert words(one(CausalEncoder(CHAT, 32, use_chat_template=False), asked("a", "b")).ids) == "<s> a b </s>"


@pytest.mark.parametrize(("single", "expected"), [("<s> $A </s>", "<s> a b yes </s>"), ("$A </s>", "a b yes </s>"), ("$A", "a b yes </s>")])
def test_eos_stands_once_at_the_end_and_bos_where_the_tokenizer_has_it(single: str, expected: str) -> None:
    encoder = CausalEncoder(word_tokenizer(single=single), 32)
    assert words(one(encoder, asked("a b", "yes")).ids) == expected
    assert words(encoder.prompt_ids(asked("a b", "yes"))) == expected.removesuffix(" yes </s>")


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        CausalEncoder(word_tokenizer(eos_token=None), 32)


# ------------------------------------------------------------------------------------------------------------ template


def test_a_template_writes_an_instruction_as_a_turn() -> None:
    row = one(CausalEncoder(CHAT, 32), asked("Q: a b", "yes so"))
    assert words(row.ids) == "<s> [INST] Q: a b [/INST] yes so </s>"
    assert learnt(row) == "- - - - - - yes so </s>"


def test_a_template_writes_every_turn_and_every_answer_is_learnt() -> None:
    row = one(CausalEncoder(CHAT, 32), chat("a b", "yes", "c", "no so"))
    assert words(row.ids) == "<s> [INST] a b [/INST] yes </s> [INST] c [/INST] no so </s>"
    assert learnt(row) == "- - - - - yes </s> - - - no so </s>"


def test_a_template_writes_the_system_message() -> None:
    row = one(CausalEncoder(CHAT, 32), chat("a", "yes", system="b"))
    assert words(row.ids) == "<s> <<SYS>> b [INST] a [/INST] yes </s>"
    assert learnt(row) == "- - - - - - yes </s>"


def test_eos_is_added_where_the_template_writes_none() -> None:
    template = "{{bos_token}}{% for m in messages %}{{ 'User: ' if m.role=='user' else ' Assistant: ' }}{{m.content}}{% endfor %}"
    row = one(CausalEncoder(word_tokenizer(template), 32), asked("a", "yes"))
    assert words(row.ids) == "<s> User: a Assistant: yes </s>"
    assert learnt(row).endswith("yes </s>")


def test_the_generation_prompt_is_part_of_the_prompt() -> None:
    template = (
        "{{bos_token}}{% for m in messages %}{{ 'User: ' if m.role=='user' else 'Assistant: ' }}{{m.content}}"
        "{{ eos_token if m.role=='assistant' }} {% endfor %}{{ 'Assistant: ' if add_generation_prompt }}"
    )
    encoder = CausalEncoder(word_tokenizer(template), 32)
    row = one(encoder, chat("a", "yes", "b", "no"))
    assert learnt(row) == "- - - - yes </s> - - - no </s>"
    assert words(encoder.prompt_ids(chat("a", "yes", "b", "no"))) == "<s> User: a Assistant: yes </s> User: b Assistant:"


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{{ raise_exception('only users here') }}", "refuses this conversation: only users here"),
        ("{{bos_token}}{% for m in messages %}{{ m.content if loop.last else 'so' }}{% endfor %}", "rewrites earlier turns"),
    ],
)
def test_a_template_that_cannot_be_learnt_from_is_refused(template: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as refused:
        one(CausalEncoder(word_tokenizer(template), 32), chat("a", "yes", "b", "no"))
    assert refused.value.fix == "model.use_chat_template=false"


CHATML_TOKENIZER = spaced_tokenizer(["user", "assistant", "hi", " there", "yes", "no"], CHATML)


def test_what_a_template_writes_after_eos_is_not_learnt() -> None:
    row = one(CausalEncoder(CHATML_TOKENIZER, 64), chat("hi there", "yes"))
    assert learnt(row, CHATML_TOKENIZER) == "- - - - - - - - - - yes </s>"


def test_eos_is_last_also_where_turns_of_such_a_template_are_dropped() -> None:
    row = one(CausalEncoder(CHATML_TOKENIZER, 16), chat("hi", "yes", "hi" + " there" * 9, "no"))
    assert words(row.ids, CHATML_TOKENIZER).endswith("yes </s>")


# ------------------------------------------------------------------------------------------------- tokens against text


@pytest.mark.parametrize("prompt", ["Label:", "Label: ", "Label:\n"])
def test_a_token_that_swallowed_the_space_before_it_is_the_answers(prompt: str) -> None:
    tokenizer = spaced_tokenizer(["Label:", "yes", " yes"])
    row = one(CausalEncoder(tokenizer, 32), asked(prompt, "yes"))
    assert learnt(row, tokenizer).split()[-2:] == ["yes", "</s>"]
    assert row.supervised == 2


def test_every_token_of_a_character_of_several_is_learnt() -> None:
    row = one(CausalEncoder(byte_tokenizer(), 32), asked("é", "é"))
    assert row.supervised == len(" é".encode()) + 1 and row.ids[1:3] == row.ids[4:6]


PLAIN_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<>"), min_size=1, max_size=12)


@CHEAP
@given(PLAIN_TEXT, PLAIN_TEXT.filter(str.strip))
def test_what_is_learnt_is_the_answers_text_and_eos(prompt: str, completion: str) -> None:
    for tokenizer in (byte_tokenizer(), byte_tokenizer(INST)):
        encoder = CausalEncoder(tokenizer, 256)
        row = one(encoder, asked(prompt, completion))
        read = row.ids[: len(row.ids) - row.supervised]
        assert list(row.labels) == [IGNORE] * len(read) + list(row.ids[len(read) :])
        assert row.ids[-1] == tokenizer.eos_token_id and row.ids.count(tokenizer.bos_token_id) == 1
        stripped = prompt.rstrip(" ")
        gap = " " if encoder.chat or (stripped and not stripped[-1].isspace()) else ""
        assert tokenizer.decode(row.ids[len(read) : -1], clean_up_tokenization_spaces=False) == gap + completion
        assert list(read) == encoder.prompt_ids(asked(prompt, completion))


# ------------------------------------------------------------------------------------------- training meets prediction


WORD = st.sampled_from(WORDS[:16])
SENTENCE = st.lists(WORD, min_size=1, max_size=5).map(" ".join)
CONVERSATION = st.builds(
    lambda pairs, system: chat(*(turn for pair in pairs for turn in pair), system=system),
    st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=3),
    st.none() | SENTENCE,
)
EXAMPLES = st.one_of(
    CONVERSATION,
    st.builds(asked, SENTENCE, SENTENCE),
    st.builds(lambda prompt, label: Example("", text="t", prompt=prompt, label=label), SENTENCE, st.integers(0, 1)),
)


@BOTH
@CHEAP
@given(example=EXAMPLES)
def test_the_training_row_is_the_prompt_of_prediction_and_then_the_last_answer(tokenizer: Any, example: Example) -> None:
    encoder = CausalEncoder(tokenizer, 128, label_names=["yes", "very bad"])
    row, prompt = one(encoder, example), encoder.prompt_ids(example)
    assert list(row.ids[: len(prompt)]) == prompt and row.labels[len(prompt) - 1] == IGNORE
    answer = encoder.turns(example)[-1].content
    assert words(row.ids[len(prompt) :]) == f"{answer} </s>" and row.labels[len(prompt) :] == row.ids[len(prompt) :]


@BOTH
@CHEAP
@given(example=EXAMPLES)
def test_there_is_one_bos_first_and_eos_after_every_answer(tokenizer: Any, example: Example) -> None:
    row = one(CausalEncoder(tokenizer, 128, label_names=["yes", "very bad"]), example)
    answers = max(1, sum(m.role == "assistant" for m in example.messages))
    assert row.ids[0] == tokenizer.bos_token_id and row.ids.count(tokenizer.bos_token_id) == 1
    assert row.labels.count(tokenizer.eos_token_id) == row.ids.count(tokenizer.eos_token_id) == answers
    assert row.ids[-1] == tokenizer.eos_token_id


def test_a_prompt_that_ends_in_a_space_is_asked_as_it_was_learnt() -> None:
    tokenizer = spaced_tokenizer(["Label:", "yes", " yes"])
    encoder = CausalEncoder(tokenizer, 32)
    prompt = encoder.prompt_ids(asked("Label: ", "yes"))
    assert one(encoder, asked("Label: ", "yes")).ids[: len(prompt)].tolist() == prompt


# ---------------------------------------------------------------------------------------------------------- truncation


def test_the_middle_of_too_long_a_prompt_is_cut_out() -> None:
    truncation = Truncation()
    row = one(CausalEncoder(PLAIN, 8), asked("a b c d e f g h i j", "yes"), truncation)
    assert words(row.ids) == "<s> a b h i j yes </s>"
    assert learnt(row) == "- - - - - - yes </s>"
    assert truncation == Truncation(prompts=1, tokens_cut=5, rows=1)


def test_the_end_of_too_long_an_answer_is_cut_off_but_for_eos() -> None:
    truncation = Truncation()
    row = one(CausalEncoder(PLAIN, 8), asked("a", "b c d e f g h i j"), truncation)
    assert words(row.ids) == "<s> a b c d e f </s>"
    assert learnt(row) == "- - b c d e f </s>"
    assert truncation == Truncation(completions=1, tokens_cut=4, rows=1)


def test_where_both_are_too_long_each_keeps_half() -> None:
    truncation = Truncation()
    row = one(CausalEncoder(PLAIN, 9), asked("a b c d e f g h", "i j k l m n o p"), truncation)
    assert words(row.ids) == "<s> a b g h i j k </s>"
    assert learnt(row) == "- - - - - i j k </s>"
    assert truncation == Truncation(prompts=1, completions=1, tokens_cut=9, rows=1)


def test_what_fits_exactly_is_left_whole() -> None:
    truncation = Truncation()
    assert words(one(CausalEncoder(PLAIN, 8), asked("a b c d e", "yes"), truncation).ids) == "<s> a b c d e yes </s>"
    assert truncation == Truncation() and str(truncation) == "nothing shortened"


@BOTH
def test_whole_turns_are_dropped_from_too_long_a_conversation(tokenizer: Any) -> None:
    truncation = Truncation()
    row = one(CausalEncoder(tokenizer, 16), chat("a", "yes", "b", "no", "c d e f", "maybe so"), truncation)
    whole = one(CausalEncoder(tokenizer, 64), chat("a", "yes", "b", "no"))
    assert (
        (row.ids, row.labels) == (whole.ids, whole.labels)
        and truncation.turns == 1
        and not truncation.prompts
        and not truncation.completions
    )


def test_tokens_cut_counts_those_of_dropped_turns() -> None:
    truncation = Truncation()
    example = chat("a", "yes", "b c d e f g h", "no")
    whole, row = one(CausalEncoder(CHAT, 64), example), one(CausalEncoder(CHAT, 12), example, truncation)
    assert truncation.tokens_cut == len(whole.ids) - len(row.ids)


def test_a_conversation_whose_first_answer_is_too_long_keeps_that_one_shortened() -> None:
    truncation = Truncation()
    row = one(CausalEncoder(CHAT, 10), chat("a", "b c d e f g h i", "j", "yes"), truncation)
    assert words(row.ids) == "<s> [INST] a [/INST] b c d e f </s>"
    assert learnt(row) == "- - - - b c d e f </s>"
    assert truncation.completions == 1


def test_a_prompt_of_prediction_is_cut_in_its_middle() -> None:
    assert words(CausalEncoder(PLAIN, 8).prompt_ids(asked("a b c d e f g h i j", ""))) == "<s> a b c g h i j"


@BOTH
@CHEAP
@given(prompt=st.integers(1, 40), answer=st.integers(1, 40), limit=st.integers(8, 32))
@with_case(prompt=40, answer=1, limit=8)
def test_however_long_the_answer_keeps_half_and_its_eos(tokenizer: Any, prompt: int, answer: int, limit: int) -> None:
    truncation = Truncation()
    example = asked(" ".join(["a"] * prompt), " ".join(["yes"] * answer))
    whole, row = one(CausalEncoder(tokenizer, 10_000), example), one(CausalEncoder(tokenizer, limit), example, truncation)
    assert len(row.ids) == min(limit, len(whole.ids)) and truncation.tokens_cut == len(whole.ids) - len(row.ids)
    assert row.ids[0] == tokenizer.bos_token_id and row.ids[-1] == row.labels[-1] == tokenizer.eos_token_id
    assert list(row.labels) == [IGNORE] * (len(row.ids) - row.supervised) + list(row.ids[len(row.ids) - row.supervised :])
    assert row.supervised >= min(answer + 1, limit // 2)
    assert (truncation.completions, truncation.prompts) == (
        row.supervised < whole.supervised,
        len(row.ids) - row.supervised < len(whole.ids) - whole.supervised,
    )


@BOTH
@CHEAP
@given(example=CONVERSATION, limit=st.integers(12, 48))
def test_however_long_a_conversation_its_last_token_is_a_learnt_eos(tokenizer: Any, example: Example, limit: int) -> None:
    row = one(CausalEncoder(tokenizer, limit), example)
    assert len(row.ids) <= limit
    assert row.ids[-1] == row.labels[-1] == tokenizer.eos_token_id and row.ids.count(tokenizer.bos_token_id) == 1


def test_what_was_shortened_is_told_in_rows_and_tokens() -> None:
    told = str(Truncation(prompts=1200, completions=3, tokens_cut=45678))
    assert told == "1,200 prompts, 3 answers shortened (45,678 tokens)"


# ---------------------------------------------------------------------------------------------------------- candidates


def scored(tokenizer: Any, names: list[str], prompt: str = "a b", label: int | None = 0, limit: int = 64) -> Candidates:
    example = Example("", text="t", prompt=prompt, label=label)
    return CausalEncoder(tokenizer, limit, label_names=names).candidates([example])[0]


def read_out(row: Candidates, label: int) -> list[str]:
    """Each pick as `what the model has read -> the token that is scored`."""
    return [f"{words(row.sequences[s][: t + 1])} -> {words([token])}" for s, t, token in row.picks[label]]


def test_labels_of_one_token_need_one_sequence_the_prompt() -> None:
    row = scored(PLAIN, ["yes", "no"], label=1)
    assert [words(s) for s in row.sequences] == ["<s> a b"]
    assert read_out(row, 0) == ["<s> a b -> yes"] and read_out(row, 1) == ["<s> a b -> no"]
    assert row.label == 1


def test_labels_of_several_tokens_share_what_they_begin_with() -> None:
    row = scored(CHAT, ["very good", "very bad", "so"])
    assert [words(s) for s in row.sequences] == ["<s> [INST] a b [/INST] very"]
    assert read_out(row, 1) == ["<s> [INST] a b [/INST] -> very", "<s> [INST] a b [/INST] very -> bad"]
    assert read_out(row, 2) == ["<s> [INST] a b [/INST] -> so"]


def test_labels_that_differ_early_need_a_sequence_each() -> None:
    row = scored(PLAIN, ["very good", "not bad"])
    assert sorted(words(s) for s in row.sequences) == ["<s> a b not", "<s> a b very"]
    assert read_out(row, 0) == ["<s> a b -> very", "<s> a b very -> good"]
    assert read_out(row, 1) == ["<s> a b -> not", "<s> a b not -> bad"]


@BOTH
def test_where_one_label_begins_another_their_ends_are_scored(tokenizer: Any) -> None:
    row = scored(tokenizer, ["good", "good enough", "bad"])
    prompt = "<s> a b" if tokenizer is PLAIN else "<s> [INST] a b [/INST]"
    assert [words(s) for s in row.sequences if "good" in words(s)] == [f"{prompt} good enough"]
    assert read_out(row, 0) == [f"{prompt} -> good", f"{prompt} good -> </s>"]
    assert read_out(row, 1) == [f"{prompt} -> good", f"{prompt} good -> enough", f"{prompt} good enough -> </s>"]
    assert read_out(row, 2) == [f"{prompt} -> bad", f"{prompt} bad -> </s>"]


def test_a_label_that_stands_in_the_prompt_is_scored_after_it() -> None:
    assert read_out(scored(PLAIN, ["yes", "no"], "yes or no Label:"), 0) == ["<s> yes <unk> no Label: -> yes"]


def test_an_unlabelled_text_is_scored_all_the_same() -> None:
    row = scored(PLAIN, ["yes", "no"], label=None)
    assert row.label == -1 and len(row.picks) == 2


def test_candidates_of_too_long_a_prompt_keep_its_ends_and_the_label() -> None:
    row = scored(PLAIN, ["yes", "no"], "a b c d e f g h i j", limit=8)
    assert read_out(row, 1) == ["<s> a b c h i j -> no"]


@pytest.mark.parametrize(("limit", "cut"), [(8, 4), (12, 0), (11, 1)])
def test_prompts_that_are_cut_are_counted(limit: int, cut: int) -> None:
    encoder, counted = CausalEncoder(PLAIN, limit, label_names=["yes", "no"]), Truncation()
    row = Example("", text="t", prompt="a b c d e f g h i j", label=0)
    encoder.candidates([row, Example("", text="t", prompt="a", label=0)], truncation=counted)
    assert counted == Truncation(prompts=int(cut > 0), tokens_cut=cut, rows=int(cut > 0))
    counted = Truncation()
    assert len(encoder.prompt_ids(row, counted)) == min(11, limit) and counted.tokens_cut == max(0, cut - 1)


def test_all_labels_of_too_long_a_prompt_are_scored_after_the_same_text() -> None:
    row = scored(PLAIN, ["yes", "not at all"], "a b c d e f g h i j", limit=8)
    assert len({read_out(row, label)[0].partition(" -> ")[0] for label in range(2)}) == 1


def test_candidates_of_many_examples_keep_their_order() -> None:
    encoder = CausalEncoder(PLAIN, 64, label_names=["yes", "no"])
    rows = encoder.candidates([Example("", text="t", prompt=WORDS[i % 16], label=i % 2) for i in range(1003)])
    assert [(words(r.sequences[0]), r.label) for r in rows] == [(f"<s> {WORDS[i % 16]}", i % 2) for i in range(1003)]


LABEL = st.lists(st.sampled_from(["good", "bad", "not", "very"]), min_size=1, max_size=3).map(tuple)
LABELS = st.lists(LABEL, min_size=2, max_size=5, unique=True)


@BOTH
@CHEAP
@given(names=LABELS, prompt=SENTENCE)
def test_picks_are_the_labels_tokens_each_after_the_prompt_and_the_tokens_before(
    tokenizer: Any, names: list[tuple[str, ...]], prompt: str
) -> None:
    row = scored(tokenizer, [" ".join(name) for name in names], prompt)
    start = CausalEncoder(tokenizer, 64).prompt_ids(asked(prompt, ""))
    begins = any(a != b and b[: len(a)] == a for a in names for b in names)
    for label, name in enumerate(names):
        tokens = tokenizer.convert_tokens_to_ids([*name, *(["</s>"] if begins else [])])
        assert [token for _, _, token in row.picks[label]] == tokens
        assert [row.sequences[s][: t + 1] for s, t, _ in row.picks[label]] == [start + tokens[:i] for i in range(len(tokens))]


@BOTH
@CHEAP
@given(names=LABELS, prompt=SENTENCE)
def test_there_are_no_more_sequences_than_needed(tokenizer: Any, names: list[tuple[str, ...]], prompt: str) -> None:
    row = scored(tokenizer, [" ".join(name) for name in names], prompt)
    begins = any(a != b and b[: len(a)] == a for a in names for b in names)
    read = {name if begins else name[:-1] for name in names}
    assert len(row.sequences) == sum(not any(len(b) > len(a) and b[: len(a)] == a for b in read) for a in read)


@BOTH
@CHEAP
@given(names=LABELS, prompt=SENTENCE, data=st.data())
def test_the_true_labels_picks_are_what_training_learns(
    tokenizer: Any, names: list[tuple[str, ...]], prompt: str, data: st.DataObject
) -> None:
    label = data.draw(st.integers(0, len(names) - 1))
    encoder = CausalEncoder(tokenizer, 64, label_names=[" ".join(name) for name in names])
    example = Example("", text="t", prompt=prompt, label=label)
    trained, row = one(encoder, example), encoder.candidates([example])[0]
    tokens = [t for t in trained.labels if t != IGNORE]
    picked = [token for _, _, token in row.picks[label]]
    assert picked == tokens[: len(picked)] and tokens[len(picked) :] in ([], [tokenizer.eos_token_id])


# ---------------------------------------------------------------------------------------------------------- classifier


def test_a_classifier_reads_the_text_with_the_tokenizers_own_marks() -> None:
    encoder = ClassifierEncoder(word_tokenizer(single="<s> $A </s>"), 32)
    rows = encoder.encode([Example("", text="a b", label=1, prompt="c"), Example("", text="d", label=None)], Truncation())
    assert [(words(r.ids), r.label, list(r.labels), r.supervised) for r in rows] == [("<s> a b </s>", 1, [], 1), ("<s> d </s>", -1, [], 1)]


def test_too_long_a_text_loses_its_end_and_keeps_its_marks() -> None:
    truncation = Truncation()
    encoder = ClassifierEncoder(word_tokenizer(single="<s> $A </s>"), 5)
    rows = encoder.encode([Example("", text="a b c d e f g", label=0), Example("", text="a b c", label=0)], truncation)
    assert [words(r.ids) for r in rows] == ["<s> a b c </s>", "<s> a b c </s>"]
    assert truncation == Truncation(texts=1, tokens_cut=4, rows=1)
    assert str(truncation) == "1 texts shortened (4 tokens)"


@pytest.mark.parametrize("side", ["right", "left"])
@CHEAP
@given(texts=st.lists(st.text("ab cé☃", max_size=40), min_size=1, max_size=5), limit=st.integers(4, 30))
def test_a_classifier_reads_what_transformers_makes_of_a_text(side: str, texts: list[str], limit: int) -> None:
    """Whatever its file, or who used it before, left set."""
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    tokenizer.truncation_side = other.truncation_side = side
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(4, stride=2, direction="left")
    rows = ClassifierEncoder(tokenizer, limit).encode([Example("", text=text) for text in texts], Truncation())
    assert [list(row.ids) for row in rows] == other(texts, truncation=True, max_length=limit)["input_ids"]


def test_one_exchange_without_a_template_is_asked_as_it_was_learnt() -> None:
    encoder = CausalEncoder(PLAIN, 32, use_chat_template=False)
    learnt = one(encoder, chat("a", "yes"))
    assert words(learnt.ids) == "<s> User: a Assistant: yes </s>"
    question = ask_text({"kind": "chat"}, "a")
    assert encoder.prompt_ids(question) == list(learnt.ids[: len(learnt.ids) - learnt.supervised])
