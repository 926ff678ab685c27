"""The options of stages that no written signature has; `help` and `inspect.signature` show them all the same.

So a stage is added without touching an optimizer. Those of long standing are written out, for editors.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from typing import Any, TypeVar

from ..options import OPTIONS, meant
from ..stages import STAGES, Stage

_Optimizer = TypeVar("_Optimizer", bound=type)


def given_options(optimizer: type, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of all stages, at their defaults but for `others`, which `optimizer` was given.

    Raises:
        TypeError: `others` has a name that is no option of a stage.
    """
    defaults = {stage.option: stage.choices[0] for stage in STAGES}
    for name in others.keys() - defaults.keys():
        near = meant(name, [*OPTIONS, "process_group"], 0.8)
        hint = f". Did you mean {near!r}?" if near else ""
        raise TypeError(f"{optimizer.__name__} got an unexpected keyword argument {name!r}{hint}")
    return {**defaults, **others}


def _annotation(stage: type[Stage]) -> str:
    return "bool" if stage.choices == (False, True) else "str | None"


def with_stage_options(optimizer: _Optimizer) -> _Optimizer:
    """Put the options of stages into the signature and the docstring of an optimizer that takes them by `**`."""
    init: Any = vars(optimizer)["__init__"]
    signature, keyword = inspect.signature(init), inspect.Parameter.KEYWORD_ONLY
    written = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    missing = [stage for stage in STAGES if stage.option not in signature.parameters]
    place = 1 + max(i for i, p in enumerate(written) if p.name in {stage.option for stage in STAGES})
    added = [
        inspect.Parameter(stage.option, keyword, default=stage.choices[0], annotation=_annotation(stage))
        for stage in missing
    ]
    init.__signature__ = signature.replace(parameters=[*written[:place], *added, *written[place:]])
    if optimizer.__doc__ is not None:  # which python -OO takes away
        lines = [f"{stage.option}: {stage.help}" for stage in missing]
        texts = [textwrap.fill(line, 120, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in lines]
        head, raises, tail = optimizer.__doc__.partition("\n\n    Raises:")
        optimizer.__doc__ = "\n".join([head, *texts]) + raises + tail
    return optimizer
