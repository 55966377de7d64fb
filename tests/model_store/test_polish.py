"""Training of a quick student: it comes nearer to its teacher, locally and end to end, and goes on where it was."""

import torch

from model_store.assembly import Elasticity
from model_store.distill import polish
from model_store.distill.elastic import ElasticModel
from model_store.distill.order import kl_of_paths
from tests.tiny_pairs import make_model


def make(family="llama"):
    rows = torch.randint(0, 131, (40, 32), generator=torch.Generator().manual_seed(0))
    model = ElasticModel(make_model(family, 6, seed=1), Elasticity.from_order(6, (0, 2, 3, 4), [3, 0]))
    return model, rows


def kl(model, rows):
    divergence = kl_of_paths(model, [rows], stride=1)
    return {size: divergence(model.elasticity.path(size).teacher_stations) for size in model.elasticity.sizes[:-1]}


def test_it_learns_and_goes_on(tmp_path):
    model, rows = make()
    before, phases, file = kl(model, rows[:8]), [], tmp_path / "training.pt"
    polish_seconds, polish._SAVE_SECONDS = polish._SAVE_SECONDS, 0.0
    try:
        steps = polish.train(model, rows, 8, 1.5, file, lambda phase, share: phases.append((phase, share)))
    finally:
        polish._SAVE_SECONDS = polish_seconds
    after = kl(model, rows[:8])
    assert all(after[size] < before[size] for size in before), (before, after)
    assert {phase for phase, _ in phases} == {"layer by layer", "end to end"}
    assert [share for _, share in phases] == sorted(share for _, share in phases)
    saved = torch.load(file, weights_only=True)
    assert saved["step"] == steps and saved["seconds"] == 1.5
    fresh, _ = make()
    assert polish.train(fresh, rows, 8, 1.5, file, lambda *_: None) == steps  # nothing is left of the time
    assert kl(fresh, rows[:8]) == after
    assert polish.train(fresh, rows, 8, 2.0, file, lambda *_: None) > steps


def test_every_row_is_seen_once_before_any_again():
    rows = torch.arange(40)[:, None]
    seen = torch.cat([polish._batch(rows, step, 0) for step in range(5)])
    assert sorted(seen.flatten().tolist()) == list(range(40))
    assert not torch.equal(polish._batch(rows, 0, 0), polish._batch(rows, 5, 0))


def test_local_losses_are_nothing_where_the_student_is_the_teacher():
    model, rows = make()
    with torch.no_grad():
        alike = polish.local_loss(model, rows[:4])
        # Stations of one layer run the teacher's own; blocks whose second layer adds nothing are their first layer.
        for index in (1, 5):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.body.layers[index].get_submodule(name).weight.zero_()
        assert polish.local_loss(model, rows[:4]) < 1e-9 < alike
