"""What a micro-batch counts for where nobody says it."""

import pytest
import torch

import gradacc


def test_ragged_structures_in_an_iterable_need_a_mean():
    graphs = [{"nodes": torch.ones(n, 2), "edges": torch.ones(2 * n, 3)} for n in (1, 4)]

    def mean(w, graph):
        return (graph["nodes"] @ w).mean()

    def right(w, graph):
        return gradacc.Mean((graph["nodes"] @ w).sum(), len(graph["nodes"])), graph["edges"].sum(1)

    with pytest.raises(TypeError, match=r"sizes \[1, 2\].*gradacc.Mean"):
        gradacc.accumulate(mean)(torch.ones(2), graphs)
    grads, edges = gradacc.accumulate(right, has_aux=True)(torch.ones(2), graphs)
    torch.testing.assert_close(grads, torch.ones(2))
    assert edges.shape == (10,)
    # With in_dims, what counts can be said instead.
    counted = gradacc.accumulate(mean, in_dims=(None, {"nodes": 0, "edges": None}))(torch.ones(2), graphs)
    torch.testing.assert_close(counted, torch.ones(2))


def test_opaque_micro_batches_need_a_mean_or_a_sum():
    class Opaque:
        def __init__(self, x):
            self.x = x

    parts = [Opaque(torch.ones(2)), Opaque(torch.ones(1))]
    w = torch.ones(())
    with pytest.raises(TypeError, match="holds no tensor to count"):
        gradacc.accumulate(lambda w, part: (w * part.x).mean())(w, parts)
    assert gradacc.accumulate(lambda w, part: (w * part.x).sum(), reduction="sum")(w, parts) == 3
    assert gradacc.accumulate(lambda w, part: gradacc.Mean((w * part.x).sum(), len(part.x)))(w, parts) == 1


def test_a_micro_batch_without_tensor_rows_may_still_have_a_weight():
    parts = [{"edges": torch.ones(2, 4), "n": 4}, {"edges": torch.zeros(0, 4), "n": 5}]
    loss = lambda w, part: gradacc.Mean(w * part["n"] + (w * part["edges"]).sum(), part["n"])  # noqa: E731
    grads, value = gradacc.accumulate_and_value(loss)(torch.ones(()), parts)
    assert value.weight == 9
    torch.testing.assert_close(grads, torch.tensor((4 + 8 + 5) / 9))
