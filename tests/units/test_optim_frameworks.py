"""Loops of other libraries take the very steps of a plain loop; a model may return its own loss.

Lightning, Accelerate and transformers (`pip install -e '.[hub]' lightning`) are skipped where they
are absent.
"""

import gc

import pytest
import torch
import torch.nn.functional as F
from architectures.packages import package
from torch import Tensor, nn

import fisherlab as fl

VOCABULARY = 7


class LanguageModel(nn.Module):
    """Returns logits `[n, t, V]` and the loss of the next tokens, as transformers do."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.embed, self.inner = nn.Embedding(VOCABULARY, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.inner(self.embed(ids))))
        if labels is None:
            return {"logits": logits}
        shifted, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {
            "loss": F.cross_entropy(shifted, labels, reduction=self.reduction),
            "logits": logits,
        }


def language_model(reduction: str = "mean") -> tuple[LanguageModel, Tensor, Tensor]:
    torch.manual_seed(0)
    model, ids = LanguageModel(reduction).double(), torch.randint(VOCABULARY, (4, 6))
    labels = torch.where(torch.arange(6) < 4, ids, -100)
    return model, ids, labels


def entries(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["kfac", "fngd"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 0.25, 64.0])
def test_a_model_s_own_loss_says_its_scale(name: str, reduction: str, factor: float) -> None:
    """Accumulation and loss scaling are told from the loss's own mean."""
    found = []
    for own in (True, False):
        model, ids, labels = language_model(reduction)
        criterion = None if own else nn.CrossEntropyLoss(reduction=reduction)
        opt = fl.optim.create(name, model, criterion=criterion)
        for _ in range(2):
            opt.zero_grad()
            if criterion is None:
                loss = model(ids, labels)["loss"]
            else:
                shifted = model(ids)["logits"][:, :-1].flatten(0, 1)
                loss = criterion(shifted, labels[:, 1:].flatten())
            (factor * loss).backward()
            for p in model.parameters():
                p.grad /= factor
            opt.step()
        found.append(entries(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_a_loss_over_the_last_axis_without_a_criterion_asks_for_one() -> None:
    model, ids, _ = language_model()
    opt = fl.optim.create("kfac", model)
    F.cross_entropy(model(ids)["logits"].mT, ids).backward()
    with pytest.raises(RuntimeError, match="mean and sum cannot be told apart"):
        opt.step()


def test_drawn_labels_need_classes_in_axis_1() -> None:
    model, ids, _ = language_model()
    opt = fl.optim.create("kfac", model, fisher_type="mc")
    model(ids, ids)["loss"].backward()
    with pytest.raises(RuntimeError, match="take fisher_type='empirical'"):
        opt.step()


# other libraries --------------------------------------------------------------------------------

X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def plain_loop(name: str, every: int = 1) -> Tensor:
    model = network()
    opt = fl.optim.create(name, model)
    for k, (x, y) in enumerate(loader()):
        (F.cross_entropy(model(x), y) / every).backward()
        if k % every == every - 1:
            opt.step()
            opt.zero_grad()
    return entries(model)


def lightning_fit(lightning, model: nn.Module, name: str, **options) -> None:
    """One epoch of a network under Lightning's Trainer, by the optimizer of a name."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return fl.optim.create(name, self.net)

    silent = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **silent, **options)
    trainer.fit(Module(), loader())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers
@pytest.mark.parametrize("name", ["kfac", "fngd"])
def test_lightning_takes_the_steps_of_a_plain_loop(name: str) -> None:
    lightning = package("lightning")
    model = network()
    lightning_fit(lightning, model, name)
    gc.collect()  # Lightning's wrappers imitate the optimizer's class
    assert torch.equal(entries(model), plain_loop(name))


def monitored(every: int = 1) -> tuple[fl.Monitor, Tensor]:
    """A plain loop with a monitor, and where it ended."""
    model = network()
    opt = fl.optim.create("soap", model)
    monitor = fl.Monitor(opt, model, nn.CrossEntropyLoss(), every=2)
    for k, (x, y) in enumerate(loader()):
        (F.cross_entropy(model(x), y) / every).backward()
        if k % every == every - 1:
            opt.step()
            opt.zero_grad()
            monitor(x, y)
    return monitor, entries(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers
@pytest.mark.parametrize("every", [1, 2])
def test_a_callback_of_lightning_sees_what_a_plain_loop_sees(every: int) -> None:
    lightning = package("lightning")
    model, logged = network(), {}
    callback = fl.callbacks.lightning(
        nn.CrossEntropyLoss(),
        model=model,
        every=2,
        log=lambda values, step: logged.update({step: values}),
    )
    lightning_fit(lightning, model, "soap", callbacks=[callback], accumulate_grad_batches=every)
    plain, ended = monitored(every)
    assert torch.equal(entries(model), ended) and len(logged) == len(plain.rows) > 0
    assert callback.watch.monitor.rows == plain.rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "fngd"])
def test_accelerate_takes_the_steps_of_a_plain_loop(name: str) -> None:
    accelerator = package("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    prepared, opt, data = accelerator.prepare(model, fl.optim.create(name, model), loader())
    for x, y in data:
        with accelerator.accumulate(prepared):
            accelerator.backward(F.cross_entropy(prepared(x), y))
            opt.step()
            opt.zero_grad()
    assert torch.equal(entries(model), plain_loop(name, every=2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
@pytest.mark.parametrize("every", [1, 2])
def test_the_trainer_of_transformers_trains_a_language_model(every: int, tmp_path) -> None:
    transformers = package("transformers")
    package("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    ids = torch.randint(VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(0))

    def made():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).train()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(ids)

    model, twin = made(), made()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=every,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {"lr": 0.1, "damping": 0.1}
    opt = fl.optim.NaturalGradient(model, fl.KFAC(), **options)
    InOrder(model=model, args=arguments, train_dataset=data, optimizers=(opt, None)).train()

    criterion = nn.CrossEntropyLoss()
    opt = fl.optim.NaturalGradient(twin, fl.KFAC(), criterion=criterion, **options)
    for k, batch in enumerate(ids.split(2)):
        shifted = twin(input_ids=batch).logits[:, :-1].flatten(0, 1)
        (criterion(shifted, batch[:, 1:].flatten()) / every).backward()
        if k % every == every - 1:
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(entries(model), entries(twin))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_a_callback_of_the_trainer_sees_each_step_and_moves_nothing(tmp_path) -> None:
    transformers = package("transformers")
    package("accelerate")
    data = [{"ids": row, "labels": row} for row in language_model()[1].repeat(3, 1)]
    ended, callback = [], fl.callbacks.trainer(every=2)
    for callbacks in ([], [callback]):
        model, *_ = language_model()
        model = model.float()
        opt = fl.optim.create("soap", model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            lr_scheduler_type="constant",
            dataloader_pin_memory=False,
        )
        transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            optimizers=(opt, None),
            callbacks=callbacks,
        ).train()
        ended.append(entries(model))
    assert torch.equal(*ended) and not model._forward_pre_hooks
    monitor = callback.watch.monitor
    assert monitor.frame.step.tolist() == [2, 4, 6]
    assert {"inner/trace", "head/SOAP square/direction_cosine"} <= set(monitor.frame)
    assert (monitor.frame["head/trace"] > 0).all() and callback.batch == {}
