"""``python -m gradacc`` is the ``gradacc`` command."""

import sys

from gradacc.demo import main

if __name__ == "__main__":
    sys.exit(main())
