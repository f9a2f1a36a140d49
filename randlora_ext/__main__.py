"""``python -m randlora_ext``: see `randlora_cli`."""

import sys

from randlora_cli import main

if __name__ == "__main__":
    sys.exit(main())
