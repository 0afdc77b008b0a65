"""Losses over the batches of all ranks: both forms, uneven and empty ranks, what crosses, and failing together."""

import collections
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gradacc
from gradacc import Mean
from tests.laws.test_ranks import Collectives
from tests.through import cases


def _shares(batch: dict[str, Tensor], sizes: list[int]) -> list[dict[str, Tensor]]:
    parts = {key: leaf.split(sizes) for key, leaf in batch.items()}
    return [{key: part[n] for key, part in parts.items()} for n in range(len(sizes))]


def of_a_rank(group: Any, name: str, batch: Any) -> Any:
    loss = cases.LOSSES.get(name, cases.rows_of_clip)
    grad_fn = gradacc.accumulate_and_value(
        loss, through=cases.encode, microbatch_size=3, sync=gradacc.all_reduce(group)
    )
    params = cases.params()
    grads, value = grad_fn(params, batch)
    with Collectives() as counter:
        again, same = grad_fn(params, batch)
    torch.testing.assert_close((again, cases.value(same)), (grads, cases.value(value)), rtol=0, atol=0)
    return grads, value, [str(each).split(".")[1] for each in counter.seen]


SIZES = [[11], [6, 5], [3, 7, 1], [1, 0, 9, 1], [0, 11]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", [*cases.LOSSES, "rows_of_clip"])
def test_ranks_are_one_process_with_the_union(pool, name: str, sizes: list[int]) -> None:
    params, batch = cases.params(), cases.batch(11)
    loss = cases.LOSSES.get(name, cases.clip)
    expected = torch.func.grad_and_value(lambda p: cases.value(loss(p, cases.encode(p, batch), batch)))(params)
    answers = pool.run_each(len(sizes), of_a_rank, [(name, share) for share in _shares(batch, sizes)])
    gathers = ["_allgather_base_", "_allgather_base_"] + ["alltoall_base_"] * (name == "rows_of_clip")
    for grads, value, seen in answers:
        torch.testing.assert_close((grads, cases.value(value)), expected, rtol=1e-10, atol=1e-12)
        if isinstance(value, Mean):
            assert value.weight == 11
        # A rank without rows is told what an output is.
        told = ["broadcast_", "broadcast_"] * (0 in sizes)
        assert seen == ([] if len(sizes) == 1 else [gathers[0], *told, *gathers[1:], "allreduce_"])


def with_aux(group: Any, batch: Any, rows: bool) -> Any:
    def aux(outputs: Any, value: Tensor) -> Any:
        right = (outputs["image"] @ outputs["text"].T).argmax(1) == torch.arange(len(outputs["image"]))
        return {
            "right": Mean(right.sum(), len(right)),
            "norm": outputs["image"].norm(),
            "each": outputs["image"].sum(1),
        }

    def loss(params: Any, outputs: Any, batch: Any) -> Any:
        value = cases.clip(params, outputs, batch)
        return value, aux(outputs, value)

    def of_rows(params: Any, outputs: Any, batch: Any, rows: slice) -> Any:
        own = {key: leaf[rows] for key, leaf in outputs.items()}
        return cases.rows_of_clip(params, outputs, batch, rows), aux(own, outputs["text"])

    grad_fn = gradacc.accumulate_and_value(
        of_rows if rows else loss,
        through=cases.encode,
        microbatch_size=3,
        has_aux=True,
        sync=gradacc.all_reduce(group),
    )
    return grad_fn(cases.params(), batch)[1]


def test_aux_of_ranks(pool) -> None:
    params, batch = cases.params(), cases.batch(11)
    shares = _shares(batch, [6, 5])
    outputs = cases.encode(params, batch)
    right = (outputs["image"] @ outputs["text"].T).argmax(1) == torch.arange(11)
    each = outputs["image"].sum(1).split([6, 5])
    for n, (value, aux) in enumerate(pool.run_each(2, with_aux, [(share, False) for share in shares])):
        torch.testing.assert_close(value, cases.clip(params, outputs, batch))
        assert (aux["right"].total, aux["right"].weight) == (right.sum(), 11)
        torch.testing.assert_close(aux["norm"], outputs["image"].norm())
        torch.testing.assert_close(aux["each"], each[n])
    for n, (value, aux) in enumerate(pool.run_each(2, with_aux, [(share, True) for share in shares])):
        torch.testing.assert_close(value.value, cases.clip(params, outputs, batch))
        assert aux["right"].weight == 11
        torch.testing.assert_close(aux["each"], each[n])


def nothing_counts_here(group: Any, rank: int, batch: Any) -> Any:
    """A rank whose rows weigh nothing gets cotangents for them all the same."""

    def loss(params: Any, outputs: Any, batch: Any, rows: slice) -> Mean:
        own = cases.rows_of_clip(params, outputs, batch, rows)
        return Mean(own.total * 0, 0) if rank == 0 else own

    grad_fn = gradacc.accumulate(loss, through=cases.encode, microbatch_size=2, sync=gradacc.all_reduce(group))
    return grad_fn(cases.params(), batch)


def test_rows_of_weight_0_are_columns_of_the_others(pool) -> None:
    params, batch = cases.params(), cases.batch(11)

    def loss(params: Any) -> Tensor:
        return cases.rows_of_clip(params, cases.encode(params, batch), batch, slice(6, 11)).value

    expected = torch.func.grad(loss)(params)
    shares = _shares(batch, [6, 5])
    for grads in pool.run_each(2, nothing_counts_here, list(enumerate(shares))):
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


class Wrong(Exception):
    """On one rank."""


def failing(group: Any, rank: int, batch: Any, where: str, rows: bool) -> str:
    fails = [False]

    def encode(params: Any, batch: Any) -> Any:
        if fails[0] and where == "encode":
            raise Wrong
        found = cases.encode(params, batch)
        return {**found, "image": found["image"][:, :3]} if fails[0] and where == "shape" else found

    def loss(params: Any, outputs: Any, batch: Any) -> Any:
        if fails[0] and where == "loss":
            raise Wrong
        return cases.siglip(params, outputs, batch)

    def of_rows(params: Any, outputs: Any, batch: Any, rows: slice) -> Any:
        if fails[0] and where == "loss":
            raise Wrong
        return cases.rows_of_clip(params, outputs, batch, rows)

    grad_fn = gradacc.accumulate(
        of_rows if rows else loss, through=encode, microbatch_size=4, sync=gradacc.all_reduce(group)
    )
    first = grad_fn(cases.params(), batch)
    fails[0] = rank == 1
    given = "no batch" if fails[0] and where == "batch" else batch
    try:
        grad_fn(cases.params(), given)
    except (Wrong, ValueError, TypeError, RuntimeError) as error:
        fails[0] = False
        torch.testing.assert_close(grad_fn(cases.params(), batch), first, rtol=0, atol=0)
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("rows", [False, True], ids=["replicated", "rows"])
@pytest.mark.parametrize("where", ["batch", "encode", "shape", "loss"])
def test_ranks_fail_together_and_go_on(pool, where: str, rows: bool) -> None:
    shares = _shares(cases.batch(11), [3, 4, 4])
    said = pool.run_each(3, failing, [(rank, share, where, rows) for rank, share in enumerate(shares)])
    if where == "shape":
        assert all(
            "what is gathered differs: outputs['image'] is torch.float64 of shape (rows, 4)" in each for each in said
        )
        return
    assert said[1].startswith("TypeError" if where == "batch" else "Wrong")
    for rank in (0, 2):
        assert said[rank].startswith(
            f"RuntimeError: accumulate: no gradient on rank {rank}, because the call raised on rank 1"
        )


def interrupted(group: Any, rank: int, batch: Any, where: str) -> Any:
    interrupts = [rank == 1]

    def encode(params: Any, batch: Any) -> Any:
        if interrupts[0] and where == "encode":
            interrupts[0] = False
            raise KeyboardInterrupt
        return cases.encode(params, batch)

    def loss(params: Any, outputs: Any, batch: Any, rows: slice) -> Any:
        if interrupts[0] and where == "loss":
            interrupts[0] = False
            raise KeyboardInterrupt
        return cases.rows_of_clip(params, outputs, batch, rows)

    grad_fn = gradacc.accumulate(loss, through=encode, microbatch_size=4, sync=gradacc.all_reduce(group))
    said = "no error"
    try:
        grad_fn(cases.params(), batch)
    except (KeyboardInterrupt, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    return said, grad_fn(cases.params(), batch)


@pytest.mark.parametrize("where", ["encode", "loss"])
def test_a_rank_that_is_interrupted_tells_it_in_its_next_call(pool, where: str) -> None:
    params, batch = cases.params(), cases.batch(11)
    expected = torch.func.grad(lambda p: cases.clip(p, cases.encode(p, batch), batch))(params)
    shares = _shares(batch, [6, 5])
    answers = pool.run_each(2, interrupted, [(rank, share, where) for rank, share in enumerate(shares)])
    assert answers[1][0].startswith("KeyboardInterrupt")
    assert "no gradient on rank 0, because the call raised on rank 1" in answers[0][0]
    for _, grads in answers:
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


def drawing(group: Any, batch: Any) -> str:
    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        return cases.clip(params, outputs, batch) * torch.rand(())

    grad_fn = gradacc.accumulate(loss, through=cases.encode, steps=2, sync=gradacc.all_reduce(group))
    with pytest.raises(ValueError, match="loss_fn draws random numbers, which are others on each rank"):
        grad_fn(cases.params(), batch)
    return "raised"


def test_a_replicated_loss_draws_no_random_numbers(pool) -> None:
    assert pool.run_each(2, drawing, [(share,) for share in _shares(cases.batch(11), [6, 5])]) == ["raised"] * 2


def of_no_mean(group: Any, batch: Any) -> str:
    def loss(params: Any, outputs: Any, batch: Any, rows: slice) -> Tensor:
        return cases.rows_of_clip(params, outputs, batch, rows).value

    grad_fn = gradacc.accumulate(loss, through=cases.encode, steps=2, sync=gradacc.all_reduce(group))
    with pytest.raises(TypeError, match=r"loss_fn takes rows.*must return gradacc.Mean"):
        grad_fn(cases.params(), batch)
    return "raised"


def test_a_loss_of_rows_is_a_mean(pool) -> None:
    assert pool.run_each(2, of_no_mean, [(share,) for share in _shares(cases.batch(11), [6, 5])]) == ["raised"] * 2


@dataclass
class Pair:
    """What an encoder may return."""

    image: Tensor
    text: Tensor


def returning(group: Any, kind: str, batch: Any) -> Any:
    """An encoder whose outputs are of another class than a dict's."""

    class Local(NamedTuple):
        image: Tensor
        text: Tensor

    cls = {"dataclass": Pair, "local": Local, "UserDict": collections.UserDict}[kind]

    def encode(params: Any, batch: Any) -> Any:
        return cls(**cases.encode(params, batch))

    def loss(params: Any, outputs: Any, batch: Any) -> Tensor:
        pair = outputs if kind == "UserDict" else {"image": outputs.image, "text": outputs.text}
        return cases.clip(params, pair, batch)

    grad_fn = gradacc.accumulate(loss, through=encode, microbatch_size=4, sync=gradacc.all_reduce(group))
    try:
        return grad_fn(cases.params(), batch)
    except (TypeError, RuntimeError) as error:
        again = gradacc.accumulate(cases.clip, through=cases.encode, steps=2, sync=gradacc.all_reduce(group))
        return f"{type(error).__name__}: {error}", again(cases.params(), batch)


@pytest.mark.parametrize("kind", ["dataclass", "UserDict", "local"])
def test_a_rank_without_examples_is_told_what_outputs_are(pool, kind: str) -> None:
    params, batch = cases.params(), cases.batch(9)
    expected = torch.func.grad(lambda p: cases.clip(p, cases.encode(p, batch), batch))(params)
    for rank, answer in enumerate(pool.run_each(2, returning, [(kind, share) for share in _shares(batch, [0, 9])])):
        if kind == "local":
            said, answer = answer
            assert said.startswith("TypeError: accumulate, through: ") or "cannot be pickled" in said, (rank, said)
        torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-12)


def differing(group: Any, rank: int, batch: Any, what: str) -> str:
    def encode(params: Any, batch: Any) -> Any:
        return cases.encode(params, batch["data"])

    def loss(params: Any, outputs: Any, batch: Any, factor: float = 1.0) -> Tensor:
        return cases.clip(params, outputs, batch) * batch["number"] * factor

    grad_fn = gradacc.accumulate(loss, through=encode, steps=2, sync=gradacc.all_reduce(group))
    given = {"data": batch, "number": 1.0 + rank * (what == "a number in the batch")}
    try:
        grad_fn(cases.params(), given, 1.0 + rank * (what == "an argument"))
    except ValueError as error:
        grad_fn(cases.params(), {"data": batch, "number": 1.0})
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["a number in the batch", "an argument"])
def test_a_loss_that_differs_from_rank_to_rank_is_an_error(pool, what: str) -> None:
    shares = _shares(cases.batch(11), [6, 5])
    for said in pool.run_each(2, differing, [(rank, share, what) for rank, share in enumerate(shares)]):
        assert re.search(r"evaluates the loss of the whole batch, and it is [\d.]+ on rank 0, [\d.]+ on rank 1", said)


def of_other_keys(group: Any, rank: int, batch: Any) -> str:
    own = {**batch, "bonus": batch["label"]} if rank == 0 else {**batch, "weight": batch["label"]}
    grad_fn = gradacc.accumulate(cases.clip, through=cases.encode, steps=2, sync=gradacc.all_reduce(group))
    try:
        grad_fn(cases.params(), own)
    except (ValueError, RuntimeError) as error:
        grad_fn(cases.params(), batch)
        return str(error)
    return "no error"


@pytest.mark.parametrize("sizes", [[0, 9], [4, 5]], ids=str)
def test_batches_have_one_structure(pool, sizes: list[int]) -> None:
    shares = _shares(cases.batch(9), sizes)
    said = pool.run_each(2, of_other_keys, list(enumerate(shares)))
    if 0 in sizes:
        assert "the batch of this rank has" in said[0]
        assert "because the call raised on rank 0" in said[1]
    else:
        assert all("what is gathered differs: args[1]['bonus']" in each for each in said)


def of_conjugates(group: Any, batch: Any) -> Any:
    """Tensors that are conjugated when they are read, in the batch, in outputs and in cotangents."""

    def encode(params: Any, batch: Any) -> Any:
        pair = cases.encode(params, {**batch, "image": batch["image"].imag})
        return {**pair, "both": torch.complex(pair["image"], pair["text"]).conj()}

    def loss(params: Any, outputs: Any, batch: Any, rows: slice) -> Mean:
        other = torch.complex(torch.ones_like(outputs["text"]), outputs["text"].detach())
        total = (outputs["both"].conj() * other)[rows].real.sum()
        return Mean(total, rows.stop - rows.start)

    def whole(params: Any, outputs: Any, batch: Any) -> Mean:
        return loss(params, outputs, batch, slice(0, len(outputs["text"])))

    given = {**batch, "image": torch.complex(batch["image"], batch["image"]).conj()}
    sync = gradacc.all_reduce(group)
    grads = [
        gradacc.accumulate(each, through=encode, microbatch_size=size, sync=sync)(cases.params(), given)
        for each in (loss, whole)
        for size in (3, 100)
    ]
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])
    return grads[0]


def test_conjugate_views_cross(pool) -> None:
    one, other = pool.run_each(2, of_conjugates, [(share,) for share in _shares(cases.batch(9), [4, 5])])
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert one["w"].any()


def of_changing_weights(group: Any, rank: int, batches: Any, rows: bool) -> Any:
    def pairs(params: Any, outputs: Any, batch: Any) -> Mean:
        return Mean((outputs["image"] @ outputs["text"].T).tanh().sum(), len(outputs["image"]) ** 2)

    def of_rows(params: Any, outputs: Any, batch: Any, rows: slice) -> Mean:
        own = (outputs["image"][rows] @ outputs["text"].T).tanh().sum()
        # The first rank's rows count for nothing.
        return Mean(own * 0, 0) if rank == 0 else Mean(own, len(outputs["image"]) ** 2)

    grad_fn = gradacc.accumulate(
        of_rows if rows else pairs, through=cases.encode, microbatch_size=64, sync=gradacc.all_reduce(group)
    )
    return [grad_fn(cases.params(torch.float32), batch) for batch in batches]


@pytest.mark.parametrize("rows", [False, True], ids=["replicated", "rows"])
def test_weights_may_change_from_call_to_call(pool, rows: bool) -> None:
    """By more than float32's scale: gradients of a rank that weighs nothing cross as the others'."""
    params = cases.params(torch.float32)
    batches = [cases.batch(size, torch.float32) for size in (2, 256, 4)]

    def expected(batch: Any) -> Any:
        def loss(params: Any) -> Tensor:
            outputs, size = cases.encode(params, batch), len(batch["label"])
            own = outputs["image"][size // 2 :] if rows else outputs["image"]
            return (own @ outputs["text"].T).tanh().sum() / size**2

        return torch.func.grad(loss)(params)

    shares = list(zip(*(_shares(batch, [len(batch["label"]) // 2] * 2) for batch in batches), strict=True))
    for answers in pool.run_each(2, of_changing_weights, [(rank, share, rows) for rank, share in enumerate(shares)]):
        for grads, batch in zip(answers, batches, strict=True):
            torch.testing.assert_close(grads, expected(batch), rtol=1e-4, atol=1e-6)


def with_a_number(group: Any, batch: Any) -> Any:
    """An empty batch with a number in it is not empty to a split, which yields one micro-batch without examples."""
    grad_fn = gradacc.accumulate(
        cases.clip,
        through=cases.encode,
        split=lambda batch: [batch],
        sync=gradacc.all_reduce(group),
    )
    return grad_fn(cases.params(), {**batch, "task": 3})


def test_a_rank_whose_encoder_saw_no_examples(pool) -> None:
    params, batch = cases.params(), cases.batch(9)
    expected = torch.func.grad(lambda p: cases.clip(p, cases.encode(p, batch), batch))(params)
    for grads in pool.run_each(2, with_a_number, [(share,) for share in _shares(batch, [0, 9])]):
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


class Breaks(list[Any]):
    """A loader with a length that raises at its third batch."""

    def __init__(self, batch: Any, breaks: bool) -> None:
        super().__init__([batch] * 4)
        self.breaks = breaks

    def __iter__(self) -> Iterator[Any]:
        for n in range(4):
            if self.breaks and n == 2:
                raise Wrong("of the loader")
            yield self[n]


def of_a_loader(group: Any, rank: int, batch: Any) -> str:
    grad_fn = gradacc.accumulate(cases.clip, through=cases.encode, steps=2, sync=gradacc.all_reduce(group))
    count = 0
    try:
        for (own,) in gradacc.data.windows(Breaks(batch, rank == 1), 1, group=group):
            grad_fn(cases.params(), own)
            count += 1
    except (Wrong, RuntimeError) as error:
        grad_fn(cases.params(), batch)
        return f"{count} {type(error).__name__}: {error}"
    return "no error"


def test_a_loader_that_raises_is_told_to_the_others(pool) -> None:
    shares = _shares(cases.batch(9), [4, 5])
    said = pool.run_each(2, of_a_loader, list(enumerate(shares)))
    assert said[1] == "2 Wrong: of the loader"
    assert said[0].startswith("2 RuntimeError")
