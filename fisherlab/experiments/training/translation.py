"""Greedy translation, and its BLEU by sacrebleu."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.datasets import Dataset
from fisherlab.datasets.text import BEGIN, END, MARKS, PADDING
from fisherlab.extras import named
from fisherlab.models.sequence import Transformer


@torch.no_grad()
def greedy(model: Transformer, source: Tensor, begin: int, end: int) -> Tensor:
    """The likeliest next token, again and again: `[n, s] -> [n, t]`, from `begin` to `end`."""
    context, padding = model.encode(source)
    target = torch.full_like(source[:, :1], begin)
    ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    while target.shape[1] < source.shape[1] and not ended.all():
        following = model.decode(target, context, padding)[:, -1].argmax(1)
        ended |= following == end
        target = torch.cat([target, following[:, None]], 1)
    return target[:, 1:]


def bleu(model: Transformer, data: Dataset, x: Tensor, batch: int) -> float:
    """BLEU of the test set, 0 to 100, on lower-case words and marks.

    The references hold the words that the vocabulary lacks, so that `<unk>` never matches. Useful
    between optimizers; published numbers are cased and tokenised otherwise.
    """
    with named():
        import sacrebleu

    words = data.vocabulary
    begin, end, padding = (words.index(mark) for mark in (BEGIN, END, PADDING))
    sentences = []
    for source in x.chunk(2, 1)[0].split(batch):
        longest = int((source != padding).sum(1).max())
        # half as long again as the source, at most what the model was trained on
        room = source[:, : min(source.shape[1], longest * 3 // 2)]
        for row in greedy(model, room, begin, end).tolist():
            row = row[: row.index(end)] if end in row else row
            sentences.append(" ".join(words[token] for token in row if words[token] != MARKS[0]))
    references = data.references[: len(sentences)]
    # `force`: yes, the text is in words already
    score = sacrebleu.corpus_bleu(sentences, [references], tokenize="none", force=True)
    return score.score
