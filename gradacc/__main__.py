"""``python -m gradacc`` is the ``gradacc`` command."""

from gradacc.demo.cli import leave, main

if __name__ == "__main__":
    leave(main())
