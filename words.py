"""Words and their ids. Text is words, not bytes: a visual word is a mixture of word embeddings."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain, takewhile

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
IGNORE_INDEX = -100  # a target that no loss counts, as in torch's cross entropy


# Chinese, Japanese and Thai have no spaces between words: each of their characters is a word.
NO_SPACES = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = rf"[{NO_SPACES}]|[^\W_{NO_SPACES}]+(?:'[^\W_{NO_SPACES}]+)*|[^\w\s]"


def split_words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return re.findall(WORD, text.lower())


class Vocabulary:
    """Words <-> ids. `words` begins with SPECIALS; a word's id is its position."""

    def __init__(self, words: list[str]):
        assert words[:4] == SPECIALS, f"the first words must be {SPECIALS}, got {words[:4]}"
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(words)}

    @classmethod
    def from_captions(cls, captions: Iterable[str]) -> "Vocabulary":
        """All words of the captions, the most frequent first; ties in alphabetical order."""
        counts = Counter(chain.from_iterable(map(split_words, captions)))
        return cls(SPECIALS + sorted(counts, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int, strict: bool = False) -> list[int]:
        """`<bos> words <eos> <pad> ...`, `length` ids: unknown words as <unk>, a long text cut.

        strict, for a prompt: raises ValueError instead, and names known words near an unknown one.
        """
        words = split_words(text)
        if strict and words and words[-1] in {*".!?\u3002"} - self.ids.keys():
            words.pop()  # captions have no full stop
        unknown = [word for word in words if word not in self.ids]
        if strict and unknown:
            near = difflib.get_close_matches(unknown[0], self.words[4:], 3, 0.5)
            known = f"known words near it: {', '.join(near or self.words[4:10])}"
            raise ValueError(f"the prompt {text!r} holds the unknown word {unknown[0]!r}; {known}")
        if strict and len(words) > length - 1:
            limit = f"and this model reads at most {length - 1}: shorten it"
            raise ValueError(f"the prompt {text!r} has {len(words)} words, {limit}")
        ids = [self.ids.get(word, UNK) for word in words]
        padded = [BOS, *ids, EOS] + [PAD] * length
        return padded[:length]

    def decode(self, ids: Iterable[int]) -> str:
        """The words before <eos>, without <bos> and <pad>."""
        ids = takewhile(lambda i: i != EOS, ids)
        return " ".join(self.words[i] for i in ids if i not in (PAD, BOS))
