"""AdapterModel: a model whose files are an adapter; its anchors are named, or with them a whole checkpoint."""

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from restnet_hf.adapter_files import (
    AUTO_MAP,
    CONFIG,
    OWN_FILES,
    SHIM,
    SHIM_TEXT,
    WEIGHTS,
    check_weights,
    finish_saving,
    read_profile,
    read_weights,
    weights_dtype,
    whole_device,
)
from restnet_hf.adapters import add_adapter
from restnet_hf.anchors import Anchor
from restnet_hf.cards import BUCKETS, adapter_tags
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.files import folder_written_whole
from restnet_hf.hub import PLOT, PROFILE, check_parents, hub_errors, is_hub_id, push_folder
from restnet_hf.loading import at_commit
from restnet_hf.parents import embedded, reload, saved_entry
from restnet_hf.plots import plot_tradeoff
from restnet_hf.profiles import Budget, BudgetError, Profile
from restnet_hf.routes import Route
from restnet_hf.switching import RouteMixin


PASSED_BY_AUTO = ("_from_auto", "adapter_kwargs", "_commit_hash", "torch_dtype")  # by Auto classes and pipelines
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")


class AdapterModel(RouteMixin, PreTrainedModel):
    """What a stitched model does with files."""

    config_class = RestNetConfig
    model_tags: list[str] | None

    def __init__(self, config: RestNetConfig, anchors: Sequence[Anchor] | None = None) -> None:
        super().__init__(config)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The tensors that are saved: those of the stitches and new heads."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("anchors.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; a state dict without the anchors, such as a checkpoint's, is whole."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys[:] = [key for key in result.missing_keys if not key.startswith("anchors.")]
        if strict and (result.missing_keys or result.unexpected_keys):
            raise RuntimeError(f"missing keys {result.missing_keys}, unexpected keys {result.unexpected_keys}")
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        standalone: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapter: config, stitches (and heads), profile, image processor; anchors are named, not copied.

        Args:
            save_directory: a folder; its other files stay.
            is_main_process: whether this process is to write.
            state_dict: instead of the model's own.
            push_to_hub: push it too, to ``repo_id`` or a repository of the folder's name.
            standalone: write the anchors' weights too, so that the folder needs no parents; None as it was loaded.
            **kwargs: of `push_to_hub`.

        Raises:
            ValueError: weights of an anchor have changed, which only ``standalone=True`` saves; or a standalone anchor
                was made in code, so that no config could rebuild it, or is not all there.
        """
        if not is_main_process:
            return
        whole = self.config.standalone if standalone is None else standalone
        state = self.state_dict() if state_dict is None else state_dict
        if whole:
            made_in_code = [entry["name"] for entry in self.config.anchors if entry["config"] is None]
            if made_in_code:
                raise ValueError(
                    f"anchors {made_in_code} were made in code, and no config says how; standalone=True needs anchors "
                    "loaded from the Hub or a folder"
                )
            for anchor in self.anchors.values():
                anchor.check_present()
        self.config.active_route = str(self.active_route)
        entries = [
            saved_entry(entry, anchor, whole, None if state_dict is None else _below(f"anchors.{name}.model.", state))
            for entry, (name, anchor) in zip(self.config.anchors, self.anchors.items(), strict=True)
        ]
        self.config.auto_map = AUTO_MAP
        loaded_as = self.config.standalone, self.config.anchors
        try:
            self.config.standalone, self.config.anchors = whole, entries
            self._write(save_directory, {k: v for k, v in state.items() if whole or not k.startswith("anchors.")})
        finally:
            self.config.standalone, self.config.anchors = loaded_as
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repo_id, standalone=standalone, **kwargs)

    def _write(self, save_directory: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
        profile = self.sound_profile(self.config.anchors)
        self._tag(profile)
        with folder_written_whole(save_directory, CONFIG, OWN_FILES) as folder:
            super().save_pretrained(folder, state_dict={})
            save_file(_apart(weights), folder / WEIGHTS, {"format": "pt"})
            (folder / SHIM).write_text(SHIM_TEXT)
            if profile is not None:
                profile.save(folder / PROFILE)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(folder)

    def _tag(self, profile: Profile | None) -> None:
        """Tags for cards that others write: ``Trainer`` puts them on the one that it pushes."""
        known = {entry["repo_id"] for entry in self.config.anchors if is_hub_id(entry["repo_id"])}
        mine = [*adapter_tags(profile), *(f"base_model:{repo_id}" for repo_id in sorted(known))]
        others = [tag for tag in self.model_tags or () if not any(tag.startswith(f"{cost}:le-") for cost in BUCKETS)]
        self.model_tags = list(dict.fromkeys([*mine, *others]))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: list[str] | None = None,
        standalone: bool | None = None,
    ) -> CommitInfo:
        """Push the adapter with a card made from its profile; nothing is committed where nothing changed.

        Args:
            repo_id: where to; the repository is made if there is none.
            commit_message, commit_description, private, token, revision, create_pr: as in transformers.
            max_shard_size: taken as transformers passes it; an adapter is one file.
            tags: for the card, beside those that make the adapter findable by budget.
            standalone: push the anchors' weights too; see `save_pretrained`.

        Raises:
            ValueError: an anchor is not on the Hub, so that others could not fetch it.
        """
        whole = self.config.standalone if standalone is None else standalone
        if not whole:
            check_parents(self.config.anchors)
        profile = self.sound_profile()
        scored = profile is not None and all("accuracy" in row.scores for row in profile.routes)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "adapter"
            self.save_pretrained(folder, standalone=whole)
            if profile is not None and scored:
                plot_tradeoff(profile, folder / PLOT)
            return push_folder(
                folder,
                repo_id,
                self.config.anchors,
                profile,
                standalone=whole,
                tags=[*(tags or ()), *(tag for tag in self.model_tags or () if not tag.startswith("base_model:"))],
                training=self.config.training,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload adapter",
                commit_description=commit_description,
            )

    @hub_errors()
    def load_stitch(
        self,
        repo_id: str | os.PathLike[str],
        name: str,
        *,
        revision: str | None = None,
        subfolder: str = "",
        **hub_kwargs: Any,
    ) -> list[Route]:
        """Add another adapter on the same anchors, from a local folder or the Hub, beside those that are there.

        Its routes have the name in front, ``night: resnet50[:7] + mobilenetv2[11:]``: `set_route` switches to them,
        ``delete_stitch("night")`` removes them. Costs and accuracies come along where they were measured on the same
        device and images.

        Args:
            repo_id: Hub id or local folder of the adapter.
            name: for it; letters, digits, ``_`` and ``-``.
            revision: of it.
            subfolder: of it in its repository.
            **hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in `from_pretrained`.

        Returns:
            The routes that were added.

        Raises:
            OSError: a file is missing or damaged.
            TypeError: an option is not known.
            ValueError: the name is taken, or the adapter is for other anchors, images or classes.
        """
        hub = _hub_options("load_stitch", hub_kwargs)
        where = os.fspath(repo_id)
        finish_saving(where, subfolder)
        at = {**hub, "revision": at_commit(where, revision, hub), "subfolder": subfolder}
        config, profile, weights = _read_config(where, at), read_profile(where, at), read_weights(where, at)
        mine = {key: value for key, value in weights.items() if not key.startswith("anchors.")}
        return add_adapter(self, config, profile, mine if config.standalone else weights, name, where)

    @classmethod
    @hub_errors()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: RestNetConfig | None = None,
        anchors: Mapping[str, nn.Module | str] | None = None,
        route: Route | str | None = None,
        budget: Mapping[str, float] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load an adapter from a local folder or the Hub, and the anchors it names at the commits it names.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the adapter.
            config: instead of the adapter's own.
            anchors: modules or folders by anchor name, for anchors that were made in code or have moved.
            route: to make active. Only the weights that it uses are read, the others when another route needs them.
            budget: limits such as ``{"macs": 1e9}``, to make the best route of the profile within them active.
            revision: of the adapter.
            subfolder: of the adapter in its repository.
            dtype: of the weights; as saved by default.
            device_map: a device for the whole model, as in transformers; ``auto`` takes the accelerator, if any.
            trust_remote_code: run anchors' code from the Hub.
            **kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in transformers.

        Raises:
            OSError: a file is missing or damaged.
            TypeError: an option is not known.
            ValueError: weights do not fit the config, or an anchor is not the one the adapter was made for.
            BudgetError: no route fits, or the adapter has no profile.
        """
        dtype = dtype if dtype is not None else kwargs.pop("torch_dtype", None)
        device = whole_device(device_map)
        hub = _hub_options("from_pretrained", kwargs)
        where = os.fspath(pretrained_model_name_or_path)
        finish_saving(where, subfolder)
        at = {**hub, "revision": at_commit(where, revision, hub), "subfolder": subfolder}
        config = _read_config(where, at) if config is None else copy.deepcopy(config).check()
        profile = read_profile(where, at)
        used = _choose(config, profile, route, budget)
        weights = read_weights(where, at)
        wanted = weights_dtype(config.dtype if dtype in (None, "auto") else dtype)
        options = {"trust_remote_code": trust_remote_code, **hub}
        model = cls(config, _anchors(config, weights, dict(anchors or {}), wanted, options, used, where))
        adapter = {k: v for k, v in weights.items() if not (config.standalone and k.startswith("anchors."))}
        check_weights(adapter, model.adapter_state_dict(), where)
        model.load_state_dict(adapter)
        model.profiled = profile
        model.config.name_or_path = model.name_or_path = where
        lora = dict(kwargs.get("adapter_kwargs") or {})
        if tuned := lora.pop("_adapter_model_path", None):  # Auto classes were given what PEFT wrote on top of this
            model.load_adapter(tuned, adapter_kwargs=lora)
        return model.to(device).eval()


def _hub_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of huggingface_hub that are set; raises TypeError for others that are not known."""
    unknown = sorted(options.keys() - {*HUB_KEYS, *PASSED_BY_AUTO})
    if unknown:
        raise TypeError(f"{method} takes no {unknown}; see its documentation for what it takes")
    return {key: options[key] for key in HUB_KEYS if options.get(key) is not None}


def _read_config(where: str, at: Mapping[str, Any]) -> RestNetConfig:
    try:
        return RestNetConfig.from_pretrained(where, **at).check()
    except (AttributeError, KeyError, RecursionError) as error:  # from transformers, which trusts its files
        raise ValueError(f"config.json of {where} is not sound: {error!r}") from error


def _choose(
    config: RestNetConfig, profile: Profile | None, route: Route | str | None, budget: Mapping[str, float] | None
) -> tuple[Route, ...]:
    """Make the route that was asked for the active one; returns the routes whose weights are to be checked at once."""
    if route is not None and budget is not None:
        raise ValueError("give either route or budget")
    if budget is not None:
        if profile is None:
            raise BudgetError("the adapter has no profile, so the costs of its routes are not known; give a route")
        route = profile.best(Budget(**budget)).route
    if route is not None:
        config.active_route = str(route)
        config.check()
        return (Route.parse(config.active_route),)
    return (*config.parsed_routes(), *([Route.parse(config.active_route)] if config.active_route else []))


def _anchors(
    config: RestNetConfig,
    weights: Mapping[str, Tensor],
    given: Mapping[str, nn.Module | str],
    dtype: torch.dtype,
    options: Mapping[str, Any],
    used: Sequence[Route],
    where: str,
) -> list[Anchor]:
    """The anchors that a config describes: those given, those in the checkpoint itself, or from where it names."""
    entries = config.anchors or []
    strangers = sorted(given.keys() - {entry["name"] for entry in entries})
    if strangers:
        raise ValueError(f"anchors= names {strangers}, which the adapter does not have")
    if not os.path.isdir(where) and not config.standalone:
        local = [e["name"] for e in entries if e["name"] not in given and not is_hub_id(e["repo_id"])]
        if local:
            raise ValueError(
                f"anchors {local} of {where} are not on the Hub but on the machine it was made on; pass them: "
                "from_pretrained(..., anchors={name: a module or a folder})"
            )
    return [
        embedded(entry, weights, dtype, used, where)
        if config.standalone and entry["name"] not in given
        else reload(entry, given.get(entry["name"]), dtype, options, used)
        for entry in entries
    ]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and none in the memory of another, as a safetensors file holds them."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        found[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found
