"""`python -m muon_kernels`; see `muon_kernels.cli`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
