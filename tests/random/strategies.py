"""Keys and shapes that Hypothesis draws, the corners of 64 bits among them."""

import torch
from hypothesis import strategies as st

CORNERS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]

integers = st.one_of(st.sampled_from(CORNERS), st.integers(0, 2**64 - 1))
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def keys(draw, batch=None):
    """Of a batch of up to two dimensions."""
    batch = draw(st.lists(st.integers(0, 3), max_size=2)) if batch is None else batch
    count = int(torch.Size(batch).numel())
    pairs = draw(st.lists(st.tuples(integers, integers), min_size=count, max_size=count))
    return torch.tensor(pairs, dtype=torch.uint64).view(*batch, 2)
