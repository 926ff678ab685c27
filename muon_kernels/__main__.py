"""Entry point of `python -m muon_kernels`; see `muon_kernels.cli`."""

import signal

from .cli import main

if __name__ == "__main__":
    # End quietly when a reader such as `head` has seen enough.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    raise SystemExit(main())
