"""One rank of ``torchrun.sh``: ``dctc/train.py``, whose exit code is left in a file, as torchrun makes 1 of every code.

The file ``$DCTC_EXIT_CODES/RANK`` appears empty when the rank starts and holds the code once it ends by itself. A rank
that is killed leaves it empty.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
EXIT_PREEMPTED = 75


def main() -> int:
    """Run the training script as it would run by itself; returns its exit code."""
    file = Path(os.environ["DCTC_EXIT_CODES"], os.environ["RANK"])

    def leave(*_: object) -> NoReturn:
        # Asked to stop while torch is still being imported: nothing has begun, so nothing is lost.
        file.write_text(str(EXIT_PREEMPTED))
        os._exit(EXIT_PREEMPTED)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, leave)  # until dctc installs its own
    file.touch()
    sys.path[0] = str(ROOT)  # instead of this folder
    sys.argv[0] = str(ROOT / "dctc" / "train.py")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    file.write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(main())
