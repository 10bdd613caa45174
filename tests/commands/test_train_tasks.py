"""What is trained on and how it is judged: splits, batches, crops, metrics, translation."""

import math
import os

import pytest
import sacrebleu
import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils.data import TensorDataset

from fisherlab import models
from fisherlab.datasets import Dataset, card
from fisherlab.experiments.training import Settings, SettingsError, entries, train
from fisherlab.experiments.training.task import Task, augmented
from fisherlab.experiments.training.translation import bleu, greedy
from fisherlab.models.sequence import carry_on, forget


def task(**options):
    return Task(Settings(**{"data": "digits", **options}))


def needs(*names):
    missing = not os.environ.get("FISHERLAB_DATA")
    return pytest.mark.skipif(missing, reason=f"{', '.join(names)}: set FISHERLAB_DATA")


def test_held_out_examples_are_never_trained_on():
    searching = task(examples=300, validation=200)
    longer = task(examples=1000)
    held = {row.numpy().tobytes() for row in searching.test[0]}
    assert len(held) == 200
    for trained in (searching.x, longer.x):
        assert not held & {row.numpy().tobytes() for row in trained}
    everything = task(validation=200)
    assert len(everything.x) == len(task().x) - 200
    assert not held & {row.numpy().tobytes() for row in everything.x}


def test_an_epoch_is_a_permutation_of_its_own():
    t = task(batch_size=100)
    epochs = [
        torch.cat([i for i, _, _ in t.batches(seed, epoch)]) for seed, epoch in ((0, 0), (0, 1))
    ]
    whole = len(t.x) // 100 * 100
    for order in epochs:
        assert len(order) == whole == len(order.unique())
    assert not torch.equal(*epochs)
    again = torch.cat([i for i, _, _ in t.batches(0, 1)])
    assert torch.equal(again, epochs[1])
    for indices, x, y in t.batches(0, 0):
        assert torch.equal(x, t.x[indices]) and torch.equal(y, t.y[indices])


def test_augmented_images_are_crops_and_mirrors(generator):
    x = torch.randn(64, 2, 6, 5, generator=generator)
    found = augmented(x, generator, border=2)
    flips, shifts = set(), set()
    for image, padded in zip(found, pad(x, (2, 2, 2, 2)), strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(image, _crop(padded, top, left, flip))
        ]
        assert matches
        shifts.add(matches[0][:2])
        flips.add(matches[0][2])
    assert flips == {False, True} and len(shifts) > 15


def _crop(padded, top, left, flip):
    crop = padded[:, top : top + 6, left : left + 5]
    return crop.flip(2) if flip else crop


def test_rmse_is_in_the_units_of_the_source():
    t = task(data="diabetes")
    model = t.model(0)
    found = t.evaluate(model)
    x, y = t.test
    scale = t.dataset.target_std
    error = (model(x) - y).detach() * scale
    assert scale > 10 and t.metric == "rmse"
    assert found["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)
    assert found["test_loss"] == pytest.approx((found["rmse"] / scale) ** 2)


def test_the_autoencoder_is_trained_on_its_input():
    t = task(model="autoencoder", hidden=(8,))
    assert t.metric == "rmse" and torch.equal(t.y, t.x.flatten(1))
    assert isinstance(t.criterion(), nn.MSELoss)


@needs("ptb")
def test_perplexity_is_of_the_mean_over_tokens():
    t = task(
        data="ptb", model="lstm", layers=1, width=0.02, examples=8, test_examples=10, batch_size=4
    )
    model = t.model(0)
    found = t.evaluate(model)
    x, y = t.test
    log = model(x).log_softmax(1).double().gather(1, y[:, None])
    assert t.metric == "perplexity"
    assert found["perplexity"] == pytest.approx(math.exp(-log.mean().item()), rel=1e-5)
    # knows nothing yet: about the size of the vocabulary
    assert 0.5 < found["perplexity"] / 10_000 < 2


# Translation -------------------------------------------------------------------------------------

WORDS = ("<pad>", "<unk>", "<bos>", "<eos>", "a", "b", "c", "d", "e")


class Copy(nn.Module):
    """Translates every sentence into itself."""

    def encode(self, source):
        return source, source == 0

    def decode(self, target, context, padding):
        following = context[:, : target.shape[1]]
        return nn.functional.one_hot(following, len(WORDS)).float()


def pairs(*sentences):
    rows = [[WORDS.index(word) for word in s.split()] + [3] for s in sentences]
    length = 8
    source = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    x = torch.cat([source, source], 1)
    data = TensorDataset(x, source)
    return Dataset(data, data, card("multi30k"), None, WORDS, tuple(sentences))


def test_bleu_is_that_of_sacrebleu():
    sentences = ("a b c d e", "b a d c e a")
    data = pairs(*sentences)
    x = data.test.tensors[0]
    assert bleu(Copy(), data, x, 1) == pytest.approx(100)
    references = ("a b c d d", "b a d c e a")
    other = Dataset(data.train, data.test, data.card, None, WORDS, references)
    expected = sacrebleu.corpus_bleu(list(sentences), [references], tokenize="none").score
    assert bleu(Copy(), other, x, 2) == pytest.approx(expected) and 20 < expected < 95


def test_unknown_words_never_match():
    data = pairs("a b <unk> c d e")
    truth = Dataset(data.train, data.test, data.card, None, WORDS, ("a b xylophone c d e",))
    assert bleu(Copy(), truth, data.test.tensors[0], 1) < 60


def test_greedy_takes_the_likeliest_word_of_the_whole_model(generator):
    model = models.create(
        "transformer", num_classes=9, width=1 / 32, layers=1, heads=2, generator=generator
    ).eval()
    source = torch.randint(4, 9, (3, 6), generator=generator)
    found = greedy(model, source, begin=2, end=3)
    # the training forward, from the words found so far, position by position
    target = torch.cat([torch.full((3, 1), 2), found], 1)
    given = nn.functional.pad(target[:, :-1], (0, 6 - target.shape[1] + 1))
    with torch.no_grad():
        scores = model(torch.cat([source, given], 1))
    assert torch.equal(scores.argmax(1)[:, : found.shape[1]], found)


@needs("multi30k")
def test_a_transformer_is_judged_by_bleu(tmp_path):
    settings = Settings(
        data="multi30k",
        model="transformer",
        entries=entries("adam"),
        epochs=1,
        width=1 / 32,
        layers=1,
        examples=16,
        test_examples=4,
        batch_size=8,
    )
    results = train(settings, tmp_path)
    assert results.metric == "bleu" and results.succeeded
    assert 0 <= results.rows["bleu"].iloc[-1] <= 100 and results.rows["perplexity"].notna().all()


@needs("ptb")
def test_a_carried_state_makes_one_text_of_the_sequences():
    words = {"data": "ptb", "model": "lstm", "width": 0.05, "layers": 2, "dtype": "float64"}
    task = Task(Settings(**words, examples=14, test_examples=7, batch_size=3, carry=True))
    x, y = task.dataset.train.tensors
    assert torch.equal(task.x, x[:14])  # in the order of the text
    batches = [indices.tolist() for indices, *_ in task.batches(seed=0, epoch=1)]
    assert batches == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    model = task.model(0).eval()
    whole = model(x[:12].reshape(3, -1))  # each stream as one sequence
    assert forget(model) == 2
    for step, (_, part, _) in enumerate(task.batches(0, 0)):
        torch.testing.assert_close(model(part), whole[..., 35 * step : 35 * (step + 1)])
        carry_on(model)
    forget(model)
    torch.testing.assert_close(model(x[:3]), task.model(0)(x[:3]))
    # six sequences are three streams of two; the seventh begins at zeros
    x, y = (tensor[:7] for tensor in task.dataset.test.tensors)
    loss = task.criterion()
    long = loss(task.model(0)(x[:6].view(3, -1)), y[:6].view(3, -1))
    wanted = (6 * long + loss(task.model(0)(x[6:]), y[6:])) / 7
    assert task.evaluate(model)["test_loss"] == pytest.approx(wanted.item(), rel=1e-12)
    with pytest.raises(SettingsError, match="--carry is of lstm; 'mlp' has no state"):
        Task(Settings(data="digits", model="mlp", carry=True))
