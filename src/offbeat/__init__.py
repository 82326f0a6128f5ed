"""offbeat trains PyTorch models without lockstep: asynchronous, gossiping and rarely talking workers.

import offbeat as ob

run = ob.simulate(ob.methods.DanaZero(lr=0.05), ob.tasks.Digits(), ob.Cluster(workers=32), gradients=4000)
print(run.summary())
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import *  # noqa: F403
    from .api import __all__ as __all__
    from .methods import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Names come with the first use of one, as they bring torch, which takes seconds and which ``--version`` does not need.

        Every class of the methods folder is at hand as ``ob.DanaZero`` too.
        """
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'offbeat' has no attribute {name!r}")
        if find_spec(f".{name}", __name__) is not None:  # a module, for `from . import` asks here first
            return import_module(f".{name}", __name__)
        api = import_module(".api", __name__)
        globals().update({public: getattr(api, public) for public in api.__all__}, __all__=api.__all__)
        if name in globals():
            return globals()[name]
        if name in api.methods.__all__:
            return getattr(api.methods, name)
        raise AttributeError(f"module 'offbeat' has no attribute {name!r}")

    def __dir__() -> list[str]:
        api = import_module(".api", __name__)
        return sorted({*globals(), *api.__all__, *api.methods.__all__})
