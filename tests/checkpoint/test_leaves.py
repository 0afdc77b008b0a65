"""Leaf by leaf: every kind comes back, bit for bit, and what cannot be saved is refused."""

import math

import pytest
import torch
from torch import nn

from gradacc.checkpoint import load, save
from tests.checkpoint.cases import bits, blank, same

NAN_WITH_PAYLOAD = torch.tensor([0x7FC12345, 0x7F800001], dtype=torch.int32).view(torch.float32)
LEAVES = {
    **{str(dtype)[6:]: torch.tensor([0.0, -0.0, 1.5, -3, math.inf]).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.complex64, torch.complex128,
    )},
    **{str(dtype)[6:]: torch.tensor([0, 1, 120]).to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool, torch.uint16)},
    "nan": NAN_WITH_PAYLOAD, "0-dim": torch.tensor(3.0), "empty": torch.empty(0, 3), "conj": torch.tensor([1 + 2j]).conj(),
    "neg": torch.tensor([1 + 2j, 3j]).conj().imag, "overlapping": torch.arange(4.0).as_strided((3, 2), (1, 1)),
    "transposed": torch.arange(6.0).view(2, 3).t(), "slice": torch.arange(1000.0)[3:7], "expanded": torch.ones(1).expand(4),
    "channels last": torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "parameter": nn.Parameter(torch.ones(2)), "graph": torch.ones(2, requires_grad=True) * 2, "rng": torch.get_rng_state(),
    "int": 3, "large int": 3**200, "negative": -1, "float": 0.1, "-0.0": -0.0, "inf": math.inf, "float nan": math.nan,
    "smallest": 5e-324, "true": True, "false": False, "str": "naïve\n\"'\0\ud800", "no str": "",
}  # fmt: skip


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_every_leaf_comes_back(leaf, tmp_path):
    save(tmp_path / "c", leaf)
    like = blank(leaf)
    before = bits(like)
    found = load(tmp_path / "c", like)
    assert same(found, leaf.detach() if isinstance(leaf, torch.Tensor) else leaf)
    assert bits(like) == before
    if isinstance(found, torch.Tensor):
        assert type(found) is torch.Tensor
        assert not found.requires_grad
        assert found.stride() == torch.empty_like(leaf).stride()


class Whole(int):
    """Another type than int."""


BAD_LEAVES = {
    "bytes": (b"x", "is a bytes"),
    "an optimizer": (torch.optim.SGD([torch.ones(1)]), r"is a .*SGD; .*pass its state_dict"),
    "a module": (nn.Linear(1, 1), r"is a .*Linear; .*pass its state_dict"),
    "a subclass of int": (Whole(3), r"is 3 \(Whole\); .*not subclasses"),
    "complex": (1j, "is a complex"),
    "a set": ({1}, "is a set"),
    "a function": (len, "is a builtin"),
    "sparse": (torch.eye(2).to_sparse(), "is a sparse, nested or quantized tensor"),
    "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "is a "),
    "meta": (torch.ones(2, device="meta"), "is a meta tensor"),
}


@pytest.mark.parametrize(("leaf", "message"), BAD_LEAVES.values(), ids=BAD_LEAVES)
def test_a_leaf_that_cannot_be_saved(leaf, message, tmp_path):
    save(tmp_path / "c", {"x": torch.ones(1)})
    names = sorted((tmp_path / "c").iterdir())
    with pytest.raises(TypeError, match=rf"save: tree\['x'\]\[1\] {message}"):
        save(tmp_path / "c", {"x": [torch.ones(1), leaf]})
    with pytest.raises(TypeError, match=rf"load: like\['x'\]\[1\] {message}"):
        load(tmp_path / "c", {"x": [torch.ones(1), leaf]})
    assert sorted((tmp_path / "c").iterdir()) == names
    with pytest.raises(TypeError, match="save"):
        save(tmp_path / "new", leaf)
    assert not (tmp_path / "new").exists()


def test_an_int_that_is_too_long_to_be_written(tmp_path):
    save(tmp_path / "c", {"n": 10**4000})
    assert load(tmp_path / "c", {"n": 0})["n"] == 10**4000
    with pytest.raises(ValueError, match=r"save: tree\['n'\] is an int of 16610 bits, .*; pass hex\(\) of it"):
        save(tmp_path / "new", {"n": 10**5000})
    assert not (tmp_path / "new").exists()
