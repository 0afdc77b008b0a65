"""Stop anywhere, resume: a pytree in a folder, and back, bit for bit.

`save` and `load` are all there is. The folder is

.. code-block:: text

    checkpoint.json     which data is the checkpoint, every leaf's type, place and SHA-256, and the Python values
    data-<32 digits>/   an ordinary checkpoint of torch.distributed.checkpoint: the tensors

whatever the number of ranks. See NOTE [atomic] in ``_folder.py`` for why a crash cannot spoil it.
"""

from gradacc.checkpoint._load import load
from gradacc.checkpoint._save import save

__all__ = ["load", "save"]
