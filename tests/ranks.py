"""What every rank of `test_distributed.py` does, and what a single process does instead."""

import datetime
import time
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fisherlab as fl
from fisherlab.approximations.damping import levenberg_marquardt
from fisherlab.optim import FNGD, NGD, NaturalGradient, TENGraD

WORLD = 2
# where the batch is cut, by the number of ranks: into equal shards, and unequal ones
CUTS = {"equal": {2: (12,), 4: (6, 12, 18)}, "unequal": {2: (17,), 4: (3, 12, 13)}}
APPROXIMATIONS = ["kfac", "tekfac", "eva", "sngd", "mini_block"]
OPTIONS = {"lr": 0.1, "decay": 0.9, "statistics_every": 1, "basis_every": 2}
OPTIMIZERS = {
    **{
        name: lambda model, name=name: NaturalGradient(
            model, fl.approximations.get(name)(), damping=0.1, **OPTIONS
        )
        for name in ("kfac", "ekfac", "tkfac", "tekfac", "diagonal", "eva", "shampoo", "exact")
    },
    "kfac_mc": lambda model: NaturalGradient(
        model, fl.KFAC(), damping=0.1, fisher_type="mc", **OPTIONS
    ),
    "tengrad": lambda model: TENGraD(model, lr=0.1, damping=0.1),
    "tengrad_clipped": lambda model: TENGraD(model, lr=0.1, damping=0.1, kl_clip=1e-2),
    "fngd": lambda model: FNGD(model, lr=0.1, coefficient_steps=2),
    "fngd_clipped": lambda model: FNGD(model, lr=0.1, coefficient_steps=2, kl_clip=1e-4),
    "fngd_example": lambda model: FNGD(model, lr=0.1, coefficient_steps=2, share="example"),
    "adapted": lambda model: NaturalGradient(
        model, fl.KFAC(), damping=levenberg_marquardt(0.1, every=2), **OPTIONS
    ),
    "ngd": lambda model: NGD(model, lr=0.1, damping=0.1),
}
STEPS = 4


def net(seed=0):
    """A convolution and a layer called twice, whose factors all have full rank.

    A null space has no one basis, so that its corrected eigenvalues would depend on rounding.
    """
    torch.manual_seed(seed)
    pooled = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    twice = nn.Linear(5, 5)
    middle = [nn.Linear(12, 5), nn.Tanh(), twice, nn.Tanh(), twice, nn.Tanh()]
    return nn.Sequential(*pooled, *middle, nn.Linear(5, 4)).double()


def data(seed=1, n=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator).double()
    return x, torch.randint(4, (n,), generator=generator)


def shard(rank, cut, *tensors):
    """The rows of a rank: `cut` is where the next one's begin, or all of these places."""
    cut = (cut,) if isinstance(cut, int) else cut
    return tuple(tensor.tensor_split(cut)[rank] for tensor in tensors)


def ignoring(y):
    """The labels with more of them ignored in front than behind."""
    y = y.clone()
    y[[0, 2, 3, 8]] = -100
    return y


def comparisons(rank=None, world=WORLD):
    """Name -> frame of the joint batch; `rank` None is a single process."""
    x, y = data()
    unseen = data(2)
    found = {}
    for name, places in CUTS.items():
        cut = places[world]
        back = tuple(24 - place for place in reversed(cut))
        for kind in ("exact", "mc", "empirical"):
            labels = ignoring(y) if kind != "mc" else y
            sample = (x, labels) if rank is None else shard(rank, cut, x, labels)
            reference = unseen if rank is None else shard(rank, back, *unseen)
            options = {"fisher_type": kind, "reference": reference}
            # a smaller damping multiplies the rounding that two orders of summation differ by
            options |= {"approximations": APPROXIMATIONS, "dampings": (0.1,)}
            table = fl.compare(net(), nn.CrossEntropyLoss(), *sample, **options)
            found[f"{kind}-{name}"] = table.frame
    return found


def trained(name, rank=None, world=WORLD):
    """The parameters after a few steps of one optimizer."""
    cut = CUTS["equal"][world]
    model = net()
    wrapped = model if rank is None else DistributedDataParallel(model)
    opt = OPTIMIZERS[name](wrapped)
    for step in range(STEPS):
        batch = data(10 + step)
        x, y = batch if rank is None else shard(rank, cut, *batch)
        if name == "fngd_example":
            generator = torch.Generator().manual_seed(step)
            indices = torch.randperm(40, generator=generator)[:24]
            opt.set_batch(indices if rank is None else shard(rank, cut, indices)[0])

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(wrapped(x), y)
            loss.backward()
            return loss

        opt.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _unequal(rank, make):
    wrapped = DistributedDataParallel(net())
    opt = make(wrapped)
    x, y = shard(rank, 5, *data(n=8))
    nn.functional.cross_entropy(wrapped(x), y).backward()
    opt.step()


def _scaled(rank):
    """Unequal batches whose losses are scaled as the refusal says: the joint batch's step."""
    model = net()
    wrapped = DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss()
    opt = NaturalGradient(wrapped, fl.KFAC(), lr=0.1, damping=0.1, criterion=criterion)
    x, y = shard(rank, 5, *data(n=8))
    (criterion(wrapped(x), y) * WORLD * len(x) / 8).backward()
    opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    NaturalGradient(model, fl.KFAC(), lr=0.1, damping=0.1)


def _bad_batch(rank):
    x, y = shard(rank, 5, *data())
    if rank == 1:
        x = x.clone()
        x[2] = torch.nan
    fl.compare(net(), nn.CrossEntropyLoss(), x, y)


def _other_weights(rank):
    fl.compare(net(seed=rank), nn.CrossEntropyLoss(), *data())


def _other_shapes(rank):
    model = net() if rank == 0 else nn.Sequential(*net()[:4], nn.Linear(12, 4).double())
    fl.compare(model, nn.CrossEntropyLoss(), *data())


def _loaders(rank):
    x, y = data()
    fl.compare(net(), nn.CrossEntropyLoss(), [(x, y)] * (1 + rank), approximations=["kfac"])


def _not_parallel(rank):
    fl.optim.create("kbfgs", DistributedDataParallel(net()))


def _compared(rank, **options):
    """A comparison of shards, for which the ranks pass options of their own."""
    x, y = shard(rank, 12, *data())
    given = {"model": net(), "criterion": nn.CrossEntropyLoss(), "x": x, "y": y}
    fl.compare(**{**given, "approximations": ["kfac"], "dampings": 0.1, **options})


def _other_module(rank):
    model = net()
    model[1] = (nn.Tanh, nn.ReLU)[rank]()
    _compared(rank, model=model)


def _other_order(rank):
    names = ["ab", "ba"][rank]
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4).double()) for name in names))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    x, y = data()
    _compared(rank, model=model, x=x.flatten(1)[:, :4], y=y)


def _other_criterion(rank):
    _compared(rank, criterion=nn.CrossEntropyLoss(label_smoothing=0.1 * rank))


class _Breaks(nn.Module):
    """A network whose outputs are NaN on rank 1, once no batch is checked any more."""

    def __init__(self, rank):
        super().__init__()
        self.inner, self.factor = net(), torch.tensor([1.0, torch.nan][rank])

    def forward(self, x):
        return self.inner(x) * self.factor


def _steps(rank, make, cut=12, steps=1):
    """Steps of an optimizer on shards."""
    wrapped = DistributedDataParallel(net())
    opt = make(wrapped)
    for step in range(steps):
        x, y = shard(rank, cut if step == steps - 1 else 12, *data(10 + step))
        opt.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        opt.step()


def _with(**options):
    return lambda model: NaturalGradient(model, fl.KFAC(), **{"lr": 0.1, "damping": 0.1, **options})


def _of_checkpoint(rank, model):
    """An optimizer that took over a checkpoint on rank 1 alone."""
    opt = OPTIMIZERS["kfac"](model)
    if rank == 1:
        other = net()
        first = OPTIMIZERS["kfac"](other)
        nn.functional.cross_entropy(other(data()[0]), data()[1]).backward()
        first.step()
        opt.load_state_dict(first.state_dict())
    return opt


class _OtherWay(nn.Module):
    """Two layers, which the ranks call in different orders."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.rank = nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), rank

    def forward(self, x):
        first, second = (self.a, self.b) if self.rank == 0 else (self.b, self.a)
        return second(torch.tanh(first(x)))


def _other_way(rank):
    wrapped = DistributedDataParallel(_OtherWay(rank))
    opt = TENGraD(wrapped, lr=0.1, damping=0.1)
    x, y = data()
    nn.functional.cross_entropy(wrapped(x.flatten(1)[:, :4]), y).backward()
    opt.step()


class _Expert(nn.Module):
    """A first layer to which only the examples of rank 0 are sent."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.last, self.rank = nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), rank

    def forward(self, x):
        sent = len(x) * (1 - self.rank)
        return self.last(torch.cat([self.expert(x[:sent]), x[sent:]]))


def _expert(rank):
    # a group of its own: rank 1 has sent gradients by it when it is refused
    own = dist.new_group(timeout=datetime.timedelta(seconds=60))
    wrapped = DistributedDataParallel(_Expert(rank), process_group=own, find_unused_parameters=True)
    opt = TENGraD(wrapped, lr=0.1, damping=0.1)
    x, y = shard(rank, 12, *data())
    nn.functional.cross_entropy(wrapped(x.flatten(1)[:, :4]), y).backward()
    opt.step()


def _reconstructed(rank):
    wrapped = DistributedDataParallel(fl.optim.reconstruct(net()))
    wrapped(data()[0])


def _late(rank):
    """A rank that comes after the others' timeout, of a group of their own."""
    brief = dist.new_group(timeout=datetime.timedelta(seconds=1))
    if rank == 1:
        time.sleep(1.5)
    fl.distributed.Ranks(brief).meet()


def _other_version(rank):
    before = fl.__version__
    fl.__version__ = f"{before}.{rank}"
    try:
        fl.compare(net(), nn.CrossEntropyLoss(), *shard(rank, 12, *data()))
    finally:
        fl.__version__ = before


def _changed_since(rank):
    """Weights that one rank loaded after DistributedDataParallel had spread those of rank 0."""
    wrapped = DistributedDataParallel(net())
    with torch.no_grad():
        wrapped.module[0].bias += rank
    OPTIMIZERS["kfac"](wrapped)


REFUSALS = {
    "other version": _other_version,
    "changed since": _changed_since,
    "other weights": _other_weights,
    "other shapes": _other_shapes,
    "bad batch": _bad_batch,
    "loaders": _loaders,
    "not parallel": _not_parallel,
    "reconstructed": _reconstructed,
    "other dampings": lambda rank: _compared(rank, dampings=[0.1, 0.2][rank]),
    "other seed": lambda rank: _compared(rank, generator=torch.Generator().manual_seed(rank)),
    "other criterion": _other_criterion,
    "other module": _other_module,
    "other order": _other_order,
    "no example": lambda rank: _compared(rank, x=data()[0][rank * 24 :], y=data()[1][rank * 24 :]),
    "nan outputs": lambda rank: _compared(rank, model=_Breaks(rank)),
    "other class": lambda rank: _steps(rank, OPTIMIZERS[["kfac", "tengrad"][rank]]),
    "other method": lambda rank: _steps(rank, OPTIMIZERS[["kfac", "ekfac"][rank]]),
    "other layers": lambda rank: _steps(rank, _with(skip=[None, ["4"]][rank])),
    "other checkpoint": lambda rank: _steps(rank, lambda model: _of_checkpoint(rank, model)),
    "other way": _other_way,
    "no example in a step": lambda rank: _steps(rank, OPTIMIZERS["kfac"], 24),
    "no example in a backward": lambda rank: _steps(rank, OPTIMIZERS["tengrad"], 24),
    "no example in the second phase": lambda rank: _steps(rank, OPTIMIZERS["fngd"], 24, 4),
    "no example of an expert": _expert,
    "unequal in the second phase": lambda rank: _steps(rank, OPTIMIZERS["fngd"], 14, 4),
    "fsdp": _sharded,
    "unequal kfac": lambda rank: _unequal(rank, OPTIMIZERS["kfac"]),
    "unequal tengrad": lambda rank: _unequal(rank, OPTIMIZERS["tengrad"]),
}


def _refused(rank, act):
    try:
        act(rank)
    except Exception as error:
        return str(error)
    return "nothing was refused"


def pieces(rank):
    """Sums, gathers, broadcasts and shares of the ranks themselves."""
    ranks = fl.distributed.Ranks.current()
    tree = {"a": [torch.full((2, 3), float(rank)), "text"], "b": torch.tensor(rank)}
    return {
        "sum": ranks.sum({"x": torch.full((2,), rank + 1.0), "n": torch.tensor(3).double()}),
        "gather": ranks.gather(torch.full((2, rank + 1), rank), dim=1),
        "to": ranks.gather(torch.tensor([rank]), to=1),
        "broadcast": ranks.broadcast(tree if rank == 1 else None, 1),
        "owners": ranks.owners({"a": 5.0, "b": 3.0, "c": 1.0, "d": 1.0}),
        "rows": ranks.own_examples(3 + rank),
    }


def work(rank, folder, world=WORLD):
    """Everything, on one rank; the results go to its own file. Of four ranks: the equalities."""
    torch.set_num_threads(1)
    fl.distributed.ANSWER = 1.0
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )
    found = {
        "comparisons": comparisons(rank, world),
        "trained": {name: trained(name, rank, world) for name in OPTIMIZERS},
    }
    if world == WORLD:
        found["pieces"], found["scaled"] = pieces(rank), _scaled(rank)
        found["refused"] = {name: _refused(rank, act) for name, act in REFUSALS.items()}
        found["late"] = _refused(rank, _late)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
