"""Five training steps against the releases: groups, rates, weights, losses, initial state."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recipe import GOLDEN, METHODS, images, numbered, released_state_dict

from benchmarks.plain import term_weights
from engine.train import make_optimizer, set_learning_rate, training_step
from loss import Criterion
from model import TwoStreamNet
from networks.released import convert_released_state_dict, released_config


@pytest.mark.parametrize("name", METHODS)
def test_trajectory_agrees_with_the_release(name):
    method, gem_p, variant = METHODS[name]
    golden = np.load(GOLDEN / "trajectory.npz")
    state = {k: v.float().double() for k, v in released_state_dict(method).items()}
    net = TwoStreamNet(gem_p=gem_p, memory_variant=variant, **released_config(state)).double()
    net.load_state_dict(convert_released_state_dict(state))
    net.train()
    smoothing = 0.0 if name == "AGW" else 0.1
    criterion = Criterion(term_weights(net), label_smoothing=smoothing, head=net.head)
    optimizer = make_optimizer(net)
    set_learning_rate(optimizer, float(golden["lr"]))
    count = int(golden["P_K"].prod())
    orders = golden.get(f"{name}/strip_permutations", np.tile(np.arange(6), (5, 1)))
    for step in range(5):
        batch = SimpleNamespace(
            visible=images("traj.visible", count),
            infrared=images("traj.infrared", count),
            labels=torch.tensor(golden["labels"]),
        )
        terms, _ = training_step(
            net,
            criterion,
            optimizer,
            batch,
            order=orders[step].tolist(),
            weights=criterion.weights,
        )
        values = {k: v.item() for k, v in terms.items()}
        # The releases log one triplet number: the concatenation's and the stripes' together.
        values["triplet"] += 2 * values.pop("center_triplet", 0)
        expected = golden[f"{name}/loss_terms"][step]
        tolerance = 1e-6 if step < 4 else 1e-3
        for term, number in zip(golden[f"{name}/loss_names"], expected, strict=True):
            assert values[term] == pytest.approx(number, rel=tolerance), f"{term}, step {step + 1}"
    norms = final_norms(method, net, state)
    assert len(norms) == len(golden[f"{name}/final_param_norms"])
    for (key, norm), expected in zip(
        norms.items(), golden[f"{name}/final_param_norms"], strict=True
    ):
        assert norm == pytest.approx(expected, rel=1e-3), key


def final_norms(method, net, state):
    """Norms of parameters and running statistics under their released names, sorted by name.

    Entries that our network does not hold are never trained: theirs are the initial norms.
    """
    names = sorted(k for k in state if not k.endswith("num_batches_tracked"))
    norms = {k: state[k].norm().item() for k in names}
    # Convert numbers in place of values: each entry of ours then tells whence it came.
    released = list(state)
    trained = net.state_dict()
    for ours, origin in convert_released_state_dict(numbered(method)).items():
        for number in origin.flatten().unique_consecutive().tolist():
            if released[number] in norms:
                norms[released[number]] = trained[ours][origin == number].norm().item()
    return norms
