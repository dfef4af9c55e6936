"""One process of a run that several train together; `test_train_ranks.py` starts it as a module."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.laws.training import KINDS, Kind, make_objective, tiny_model, train_in

from phikit.base.device import Rank
from phikit.train.optim import OptimConfig

STEPS = 3
# With so large an eps the update is smooth in the gradient: rounding stays rounding.
OPTIM = OptimConfig(adam_lr=1e-2, eps=1e-2, muon_lr=None)


def run(kind: Kind, folder: Path, rank: Rank) -> None:
    """Train in the run folder `folder`, which all share, and leave this process's weights there."""
    model = tiny_model()
    objective = make_objective(kind, model, micro=3, steps=STEPS, rank=rank)
    train_in(folder, model, objective, optim=OPTIM, steps=STEPS)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, folder / f"weights-{rank.index}.safetensors")


if __name__ == "__main__":
    name, folder, index, size = sys.argv[1:]
    kinds: dict[str, Kind] = {kind: kind for kind in KINDS}
    torch.set_num_threads(1)
    rank = Rank(int(index), int(size))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank.index, world_size=rank.size)
    run(kinds[name], Path(folder), rank)
    dist.destroy_process_group()
