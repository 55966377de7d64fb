"""`boomerang distill` as one of several processes: python watched_distill.py FOLDER, then the command's arguments.

Notes in FOLDER/RANK.pt what this process saw: the rows of its batches, for how many rows sizes were drawn, the weights
before and after training, what it wrote.
"""

import os
import sys
from pathlib import Path

import torch

import model_store.distill.trainer as trainer_module
import model_store.distill.write as write_module
from server.cli import main

seen = {"rows": [], "drawn": [], "wrote": []}


class Watched(trainer_module.DistillTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        seen["rows"].append(inputs["input_ids"].clone())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, *args, **kwargs):
        seen["start"] = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        result = super().train(*args, **kwargs)
        seen["weights"] = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        seen["thresholds"] = list(self.model.elasticity.thresholds)
        return result


class WatchedSampler(trainer_module.SizeSampler):
    def __call__(self, step, rows):
        seen["drawn"].append(rows)
        return super().__call__(step, rows)


def watched(write):
    def call(folder, *args, **kwargs):
        seen["wrote"].append(write.__name__)
        return write(folder, *args, **kwargs)

    return call


if __name__ == "__main__":
    trainer_module.DistillTrainer, trainer_module.SizeSampler = Watched, WatchedSampler
    for name in ("write_config", "write_manifest", "write_full", "write_low_rank"):
        setattr(write_module, name, watched(getattr(write_module, name)))
    status = main(["distill", *sys.argv[2:]])
    torch.save(seen, Path(sys.argv[1]) / f"{os.environ.get('RANK', 'alone')}.pt")
    sys.exit(status)
