"""PeftNamesMixin: PEFT's methods work for adapters of PEFT, and name ours where stitches are meant."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from restnet_hf.errors import quote
from restnet_hf.routes.route import Route


PEFT_CONFIG = "adapter_config.json"


class PeftNamesMixin:
    """Methods of PEFT that a model of transformers inherits.

    They do what they do for any model where PEFT's own adapters are on it. Else the error says which method of a
    stitched model is meant: its adapters are stitches, and its routes are what is switched.
    """

    # Attributes of the model
    peft_config: Mapping[str, Any]  # by name of PEFT's adapters; not there before the first
    routes: Any  # a property of the model
    set_route: Callable[[Route | str], Route]

    def _of_peft(self, method: str, ours: str) -> Any:
        """PEFT's own method; raises ValueError, which names ours, where the model has no adapter of PEFT."""
        if not self._has_peft_adapters:
            raise ValueError(f"{method} is for adapters of PEFT, and this model has none. {ours}")
        return getattr(super(), method)

    @property
    def _has_peft_adapters(self) -> bool:
        return bool(getattr(self, "peft_config", None))

    def _names(self) -> list[str]:
        """The names of the adapters that `load_stitch` added."""
        return sorted({route.adapter for route in self.routes if route.adapter})

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Add a new adapter of PEFT; for stitches see `add_stitch`.

        Args:
            adapter_config: config of PEFT, such as ``LoraConfig``.
            adapter_name: name of the adapter.

        Raises:
            TypeError: the config is not one of PEFT.
        """
        if not hasattr(adapter_config, "peft_type"):
            raise TypeError(
                f"add_adapter takes a config of PEFT, not {quote(adapter_config)}. To join the anchors by a stitch, "
                "call add_stitch('front[:i] + end[j:]', StitchConfig(...)), or select_stitches(images)"
            )
        super().add_adapter(adapter_config, adapter_name)  # type: ignore[misc]

    def load_adapter(self, peft_model_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter that PEFT saved; for stitches see `load_stitch`.

        Args:
            peft_model_id: local folder or Hub id of the adapter.
            *args: further arguments of transformers.
            **kwargs: further arguments of transformers.

        Raises:
            OSError, ValueError: there is no adapter of PEFT, or it cannot be loaded.
        """
        ours = f"load_adapter loads what PEFT saved; load_stitch({peft_model_id!r}, name) adds an adapter of stitches"
        if peft_model_id is not None and os.path.isdir(peft_model_id):
            folder = os.path.join(peft_model_id, (kwargs.get("adapter_kwargs") or {}).get("subfolder") or "")
            if not os.path.isfile(os.path.join(folder, PEFT_CONFIG)):
                raise ValueError(f"{folder} has no {PEFT_CONFIG}. {ours}")
        try:
            return super().load_adapter(peft_model_id, *args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            if "adapter model file not found" in str(error):  # what transformers reports of a repository without one
                raise ValueError(f"{error} {ours}") from error
            raise

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Make adapters of PEFT active; for routes see `set_route`.

        Args:
            adapter_name: name of the adapter, or several.

        Raises:
            ValueError: there is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        routes = quote([str(route) for route in self.routes if route.adapter in names or not self._names()])
        ours = f"To switch, call set_route(route); the routes are {routes}"
        if self._has_peft_adapters and not {*names} <= {*self.peft_config}:
            raise ValueError(f"adapters of PEFT are {[*self.peft_config]}, not {quote(adapter_name)}. {ours}")
        self._of_peft("set_adapter", ours)(adapter_name)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Delete adapters of PEFT; for routes and adapters of stitches see `delete_stitch`.

        Args:
            adapter_names: name of the adapter, or several.

        Raises:
            ValueError: there is no such adapter.
        """
        ours = f"To delete a route, or an adapter that load_stitch added ({self._names()}), call delete_stitch"
        self._of_peft("delete_adapter", ours)(adapter_names)

    def enable_adapters(self) -> None:
        """Enable the adapters of PEFT; for routes see `set_route`.

        Raises:
            ValueError: there are none.
        """
        self._of_peft("enable_adapters", "A stitch runs where the route has one: set_route(route)")()

    def disable_adapters(self) -> None:
        """Disable the adapters of PEFT; for routes see `set_route`.

        Raises:
            ValueError: there are none.
        """
        self._of_peft("disable_adapters", "To run an anchor without stitches, call set_route('anchor[:]')")()

    def active_adapters(self) -> list[str]:
        """The names of the active adapters of PEFT; for the active route see ``active_route``.

        Raises:
            ValueError: there are none.
        """
        return self._of_peft("active_adapters", "The active route is model.active_route")()

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: dict[str, Any] | None = None) -> Any:
        """The tensors of an adapter of PEFT; for those of stitches see `adapter_state_dict`.

        Args:
            adapter_name: name of the adapter; the active one by default.
            state_dict: tensors of the model; its own by default.

        Raises:
            ValueError: there are none.
        """
        ours = "The tensors of stitches are adapter_state_dict()"
        return self._of_peft("get_adapter_state_dict", ours)(adapter_name, state_dict)
