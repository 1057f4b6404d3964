"""The launcher and the experiments that it runs: `python -m experiments.launch --list`.

They run from a checkout, with the packages of the extra `experiments`. Without one of those, the
import of this package ends the process with one sentence and exit status 2.
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
