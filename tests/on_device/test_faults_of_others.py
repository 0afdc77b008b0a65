"""A generator of the device that is not replayed: the fault of `tests.through.test_faults_of_others` that needs a device."""

import torch

import gradacc
from tests.device import to_cpu, to_device
from tests.helpers import assert_trees_close
from tests.through import test_faults_of_others as faults

CASE = faults.Case(encode=faults.dropping)
DEVICE = [*faults.CPU, (torch.acc.get_rng_state, torch.acc.set_rng_state)]


def contrastive(params, outputs, batch):
    logits = params["scale"] * outputs["x"] @ outputs["y"].T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def by_hand(generators):
    torch.manual_seed(0)
    leaves = {key: leaf.requires_grad_() for key, leaf in to_device(faults.params()).items()}
    case = CASE._replace(loss=contrastive)
    faults.ByHand(case, generators=generators).forward(leaves, to_device(faults.batch()))()
    return to_cpu({key: leaf.grad for key, leaf in leaves.items()})


def test_generator_of_the_device_that_is_not_replayed():
    torch.manual_seed(0)
    before = torch.acc.get_rng_state()
    grad_fn = gradacc.accumulate(contrastive, through=faults.dropping, microbatch_size=faults.SIZE)
    params, batch = to_device(faults.params()), to_device(faults.batch())
    actual = to_cpu(grad_fn(params, batch))
    after = torch.acc.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.acc.get_rng_state(), before)
    for each in CASE.split(batch):
        faults.dropping(params, each)
    assert torch.equal(after, torch.acc.get_rng_state())
    right = by_hand(DEVICE)
    assert_trees_close(actual, right, rtol=1e-10)
    assert faults.distance(by_hand(faults.CPU), right) > 0.05
