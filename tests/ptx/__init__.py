from .module import LaunchError as LaunchError
from .module import load as load
from .parser import PtxError as PtxError
