"""Text read from the data folder as tokens: Penn Treebank, Multi30K."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fisherlab.datasets.card import Card, File
from fisherlab.datasets.registry import Dataset, register

STEPS = 35  # tokens of one Penn Treebank sequence
LENGTH = 32  # tokens of one Multi30K sentence with its marks
MIN_FREQUENCY = 4  # in the training sentences of both languages
PADDING, UNKNOWN, BEGIN, END = MARKS = ("<pad>", "<unk>", "<bos>", "<eos>")
IGNORE = -100  # the index that nn.CrossEntropyLoss ignores by default


@register(
    Card(
        name="ptb",
        title="Penn Treebank: predict the next word, 10,000 words, sequences of 35",
        task="classification",
        num_classes=10_000,
        input_shape=(STEPS,),
        train_examples=26_559,
        source="M. Marcus, B. Santorini, M. A. Marcinkiewicz, Building a large annotated corpus of "
        "English: the Penn Treebank, 1993; preprocessing by T. Mikolov",
        licence="LDC material (LDC99T42), not freely licensed: do not republish",
        split="the official one: 26,559 / 2,107 / 2,355 sequences (train / valid / test)",
        files=(
            File(
                "ptb/ptb.train.txt.gz",
                "c4c6455d85f60640431f7bc738d51265ba2d55dcce10e8906322d6f9e3dcca81",
            ),
            File(
                "ptb/ptb.valid.txt.gz",
                "f2148d96d82f827399b7e5040868a4541bd2d2612ebaf5a2ff213bc07fd74eb8",
            ),
            File(
                "ptb/ptb.test.txt.gz",
                "5015d206077ff3e96161868c5c280ec8a28e9ad5617ef99ee0e734aaef6130c5",
            ),
        ),
        preparation="one stream of words with <eos> at line ends, cut into sequences of 35; "
        "y is x one word later",
        notes="sequences follow each other in the text, without overlap; the last, incomplete one "
        "is left out. The usual protocol carries an LSTM's state from one to the next: `fisherlab "
        "train` does so, `--no-carry` and the reproductions begin each at zeros",
        obtain="It may not be passed on freely; bring your own copy of Mikolov's files, compressed "
        "to these bytes",
    )
)
def ptb(card: Card, files: dict[str, Path]) -> Dataset:
    """Tokens `x [n, 35]` and `y [n, 35]`, one word later."""

    def words(part: str) -> list[str]:
        with gzip.open(files[f"ptb/ptb.{part}.txt.gz"], "rt", encoding="utf-8") as stream:
            return stream.read().replace("\n", " <eos> ").split()

    vocabulary = tuple(sorted(set(words("train"))))
    index = {word: token for token, word in enumerate(vocabulary)}

    def part(name: str) -> TensorDataset:
        stream = torch.tensor([index[word] for word in words(name)])
        end = (len(stream) - 1) // STEPS * STEPS
        return TensorDataset(stream[:end].view(-1, STEPS), stream[1 : end + 1].view(-1, STEPS))

    return Dataset(part("train"), part("test"), card, part("valid"), vocabulary)


def _multi30k(name: str, sha256: str) -> File:
    folder = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
    return File(f"multi30k/{name}", sha256, f"{folder}/{name}")


@register(
    Card(
        name="multi30k",
        title="Multi30K: translate captions of pictures from English to German",
        task="classification",
        num_classes=7_953,  # the words below, with the four marks
        input_shape=(2 * LENGTH,),
        train_examples=29_000,
        source="D. Elliott, S. Frank, K. Sima'an, L. Specia, Multi30K: Multilingual English-German "
        "image descriptions, 2016 (task 1)",
        licence="CC BY-NC-SA 4.0 for the text; built on Flickr30k",
        split="the official one: 29,000 / 1,014 / 1,000 pairs (train / val / test_2016_flickr)",
        files=(
            _multi30k(
                "train.en.gz", "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"
            ),
            _multi30k(
                "train.de.gz", "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"
            ),
            _multi30k(
                "val.en.gz", "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"
            ),
            _multi30k(
                "val.de.gz", "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"
            ),
            _multi30k(
                "test_2016_flickr.en.gz",
                "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
            ),
            _multi30k(
                "test_2016_flickr.de.gz",
                "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
            ),
        ),
        preparation="lower case, split into words and marks; one vocabulary for both languages of "
        f"what occurs at least {MIN_FREQUENCY} times in train; sentences cut and padded to {LENGTH}"
        f" tokens; x holds {LENGTH} tokens of English and then {LENGTH} of German that begin with "
        "<bos>, y the German one token later",
        notes="token 0 pads x; where y has no token it is the ignored label",
        ignore_index=IGNORE,
    )
)
def multi30k(card: Card, files: dict[str, Path]) -> Dataset:
    """Tokens `x [n, 64]`, English and then German from `<bos>` on; `y [n, 32]`, German."""

    def sentences(part: str, language: str) -> list[list[str]]:
        path = files[f"multi30k/{part}.{language}.gz"]
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            lines = stream.read().rstrip("\n").split("\n")
        return [re.findall(r"\w+|[^\w\s]", line.lower()) for line in lines]

    pairs = {
        part: (sentences(part, "en"), sentences(part, "de"))
        for part in ("train", "val", "test_2016_flickr")
    }
    counts = Counter(word for side in pairs["train"] for sentence in side for word in sentence)
    frequent = (word for word, count in counts.items() if count >= MIN_FREQUENCY)
    vocabulary = (*MARKS, *sorted(frequent))
    index = {word: token for token, word in enumerate(vocabulary)}

    def tokens(sentences: list[list[str]]) -> list[list[int]]:
        return [[index.get(word, index[UNKNOWN]) for word in sentence] for sentence in sentences]

    def part(name: str) -> TensorDataset:
        english, german = (tokens(side) for side in pairs[name])
        begin, end, pad = index[BEGIN], index[END], index[PADDING]
        source = _padded([[*s[: LENGTH - 1], end] for s in english], pad)
        given = _padded([[begin, *s[: LENGTH - 1]] for s in german], pad)
        following = _padded([[*s[: LENGTH - 1], end] for s in german], IGNORE)
        return TensorDataset(torch.cat([source, given], 1), following)

    train, valid, test = (part(name) for name in pairs)
    references = tuple(" ".join(sentence) for sentence in pairs["test_2016_flickr"][1])
    return Dataset(train, test, card, valid, vocabulary, references)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.tensor([row + [value] * (LENGTH - len(row)) for row in rows])
