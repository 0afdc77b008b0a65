"""A small problem whose mask makes the number of tokens differ between examples."""

import torch
from torch import Tensor

F64 = torch.float64


def data(dtype: torch.dtype = F64, examples: int = 9) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and a batch; the rows of the mask have 1 to 5 tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    params = {"w": normal(5), "b": normal()}
    lengths = torch.tensor([1, 5, 2, 1, 4, 1, 1, 3, 5, 2, 1, 1])[:examples]
    mask = torch.arange(5) < lengths[:, None]
    return params, {"x": normal(examples, 5), "y": normal(examples), "mask": mask}
