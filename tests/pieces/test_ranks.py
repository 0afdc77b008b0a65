"""`microbatch(sync=)`: reduced over ranks in one all-reduce; and what does not cross."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradacc
from gradacc import Mean, microbatch
from tests.laws.test_ranks import Collectives


def _metrics(x: Tensor, y: Tensor) -> dict[str, Any]:
    right = (x.argmax(1) == y).sum()
    return {
        "rows": x * 2,
        "sum": x.sum(0),
        "half": x.to(torch.bfloat16).sum(),
        "mean": x.mean(),
        "right": Mean(right, len(y)),
        "count": right,
        "number": len(y),
        "nothing": None,
    }


_OUT = {
    "rows": "concat",
    "sum": "sum",
    "half": "sum",
    "mean": "mean",
    "right": "sum",
    "count": "sum",
    "number": "sum",
    "nothing": "concat",
}


def of_a_rank(group: Any, x: Tensor, y: Tensor) -> Any:
    metrics = microbatch(_metrics, microbatch_size=3, out=_OUT, sync=gradacc.all_reduce(group))
    metrics(x, y)
    with Collectives() as counter:
        return metrics(x, y), len(counter.seen)


@pytest.mark.parametrize("sizes", [[10], [7, 3], [0, 4, 6], [1, 0, 0, 9]])
def test_what_is_reduced_is_of_all_ranks(pool, sizes: list[int]) -> None:
    x = torch.randint(-9, 9, (10, 4), generator=torch.Generator().manual_seed(0)).float()  # sums are exact
    y = torch.arange(10) % 4
    answers = pool.run_each(len(sizes), of_a_rank, list(zip(x.split(sizes), y.split(sizes), strict=True)))
    for (result, count), own in zip(answers, x.split(sizes), strict=True):
        assert count == (len(sizes) > 1)
        assert torch.equal(result["rows"], own * 2)
        assert torch.equal(result["sum"], x.sum(0))
        assert result["half"] == x.sum().to(torch.bfloat16)
        assert result["half"].dtype == torch.bfloat16
        torch.testing.assert_close(result["mean"], x.mean())
        assert result["right"].total == result["count"] == (x.argmax(1) == y).sum()
        assert result["count"].dtype == torch.int64
        assert result["right"].weight == result["number"] == 10
        assert result["nothing"] is None


def failing(group: Any, rank: int) -> str:
    def func(x: Tensor) -> Tensor:
        if rank == 1 and x.sum() > 5:
            raise ArithmeticError("not here")
        return x.sum()

    by_pieces = microbatch(func, microbatch_size=1, out="sum", sync=gradacc.all_reduce(group))
    first = by_pieces(torch.ones(3))
    try:
        by_pieces(torch.full((2,), 6.0))
    except (ArithmeticError, RuntimeError) as error:
        last = by_pieces(torch.ones(1))
        return f"{first} {type(error).__name__} {last}"
    return "no error"


def test_ranks_fail_together_and_go_on(pool) -> None:
    answers = pool.run_each(2, failing, [(0,), (1,)])
    assert answers == ["6.0 RuntimeError 2.0", "6.0 ArithmeticError 2.0"]


def test_what_does_not_cross() -> None:
    sync = gradacc.all_reduce()
    x = torch.ones(4, requires_grad=True)
    for out in ("max", "min", "stack"):
        with pytest.raises(ValueError, match=f"output is put together by '{out}', which is not summed"):
            microbatch(lambda x: x.sum(), steps=2, out=out, sync=sync)(x.detach())
    with pytest.raises(ValueError, match=r"output requires grad, and what crosses .* torch.no_grad"):
        microbatch(lambda x: x.sum(), steps=2, out="sum", sync=sync)(x)
    with torch.no_grad():
        assert microbatch(lambda x: x.sum(), steps=2, out="sum", sync=sync)(x) == 4
    with pytest.raises(NotImplementedError, match="sync= under a transform"):
        torch.vmap(microbatch(lambda x: x.sum(), steps=2, out="sum", sync=sync))(x[None].detach())
    with pytest.raises(TypeError, match=r"sync must be gradacc.all_reduce"):
        microbatch(lambda x: x, steps=2, sync=True)


def with_ddp(group: Any, x: Tensor, backward: str) -> list[Tensor | None]:
    """Gradients of a module in DDP, in whose forward pass and loss there are pieces."""
    torch.manual_seed(0)
    inside, head = torch.nn.Linear(4, 300), torch.nn.Linear(300, 2)

    class Tiled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.head = inside, head

        def forward(self, x: Tensor) -> Tensor:
            hidden = microbatch(lambda x: self.inside(x).relu(), microbatch_size=2)(x)
            return microbatch(lambda h: self.head(h).square().sum(), steps=3, out="sum", backward=backward)(hidden)

    model: Any = Tiled()
    if group is not None:
        model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    for _ in range(2):
        model.zero_grad()
        model(x).backward()
    return [param.grad for param in model.parameters()]


@pytest.mark.parametrize("backward", ["recompute", "forward"])
def test_ddp_sees_every_gradient_once(pool, backward: str) -> None:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    expected = [grad / 2 for grad in with_ddp(None, x, backward) if grad is not None]
    for grads in pool.run_each(2, with_ddp, [(x[:7], backward), (x[7:], backward)]):
        torch.testing.assert_close(grads, expected)
