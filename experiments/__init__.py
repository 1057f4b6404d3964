"""The launcher and its experiments: `python -m experiments.launch --list`.

They run from a checkout and need the packages of the extra `experiments`. If one is missing, the
import of this package prints a message and ends the process with exit status 2.
"""

import importlib.util
import sys

_EXTRA = ("matplotlib", "rich")
_missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
if _missing:
    print(
        f"error: the experiments need {' and '.join(_missing)}: "
        "install with pip install -e '.[experiments]'",
        file=sys.stderr,
    )
    sys.exit(2)
