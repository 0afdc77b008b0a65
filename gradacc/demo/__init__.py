"""The main job on real input: ``gradacc demo`` trains a byte-level GPT with exact gradient accumulation.

Importing this package needs nothing but the library itself; running the demo needs the ``demo`` extra.
"""

from gradacc.demo.cli import main as main
