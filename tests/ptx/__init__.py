from .module import LaunchError as LaunchError
from .module import load as load
from .module import tensor_map as tensor_map
from .parser import PtxError as PtxError
