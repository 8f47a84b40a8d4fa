"""What lets a patch of a door's module act in all of the package."""

import sys
from types import ModuleType
from typing import Any


class Patchable(ModuleType):
    """A module whose names, set anew, are set anew also in the modules of this package that imported them by name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            old = vars(self)[name]
            for path, module in list(sys.modules.items()):
                if path.startswith(f"{__package__}.") and vars(module).get(name, self) is old:
                    vars(module)[name] = value
        super().__setattr__(name, value)
