"""PTX executor: runs on the CPU the PTX that nvcc and Triton emit, to prove GPU kernels without a GPU.

README.md beside this file shows how to use it, and says what a passing kernel has shown and what it has not.
"""

from .module import LaunchError as LaunchError
from .module import load as load
from .module import tensor_map as tensor_map
from .parser import PtxError as PtxError
from .profile import Profile as Profile
from .standin import build as build
from .standin import compile_ptx as compile_ptx
