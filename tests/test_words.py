"""Words and ids: what a vocabulary reads, cuts and refuses.

pytest tests/test_words.py
"""

import pytest

from shapes import WORDS
from words import BOS, EOS, PAD, SPECIALS, UNK, Vocabulary, split_words

VOCABULARY = Vocabulary(SPECIALS + WORDS)


def test_text_becomes_lower_case_words_and_single_punctuation_marks():
    assert split_words("A cat's  THING, ok!?") == ["a", "cat's", "thing", ",", "ok", "!", "?"]
    assert split_words("snake_case") == ["snake", "case"]


def test_a_caption_is_padded_or_cut_and_unknown_words_are_unk():
    a, star = VOCABULARY.ids["a"], VOCABULARY.ids["star"]
    assert VOCABULARY.encode("a zebra star", 6) == [BOS, a, UNK, star, EOS, PAD]
    assert VOCABULARY.encode("a star star", 4) == [BOS, a, star, star]


def test_the_most_frequent_words_come_first_and_ties_by_name():
    assert Vocabulary.from_captions(["b a c", "c b", "c"]).words == SPECIALS + ["c", "b", "a"]


def test_an_unknown_word_of_a_prompt_gets_a_sentence_with_near_ones():
    with pytest.raises(ValueError, match=r"'yelow'.*yellow"):
        VOCABULARY.encode("a yelow star", 18, strict=True)


def test_a_prompt_that_is_too_long_gets_a_sentence():
    with pytest.raises(ValueError, match=r"18 words.*at most 17"):
        VOCABULARY.encode("a star and " * 6, 18, strict=True)


def test_scripts_without_spaces_are_split_by_character():
    assert split_words("\u4e00\u53ea\u732b, a cat") == [
        "\u4e00",
        "\u53ea",
        "\u732b",
        ",",
        "a",
        "cat",
    ]
    assert split_words("caf\u00e9 \ud55c\uad6d") == ["caf\u00e9", "\ud55c\uad6d"], (
        "these have spaces"
    )


def test_a_closing_full_stop_of_a_prompt_is_dropped_where_captions_have_none():
    plain = VOCABULARY.encode("a yellow star", 18)
    assert VOCABULARY.encode("a yellow star.", 18, strict=True) == plain
    dotted = Vocabulary([*VOCABULARY.words, "."])
    assert dotted.encode("a star.", 6, strict=True)[3] == dotted.ids["."]


def test_decoding_inverts_encoding():
    assert VOCABULARY.decode(VOCABULARY.encode("A yellow star", 18)) == "a yellow star"
    assert VOCABULARY.decode(VOCABULARY.encode("A yellow star", 18)[1:]) == "a yellow star"
