"""AdapterHubMixin: save, push and load a model as an adapter that names its anchors, or as a whole checkpoint."""

import os
import tempfile
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import save_file
from torch import Tensor, nn

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.anchors.config_entry import present, saved_entry
from restnet_hf.anchors.loading import at_commit, load_lora
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.errors import hub_errors, short_errors
from restnet_hf.files import folder_written_whole
from restnet_hf.hashing import weights_sha256
from restnet_hf.hub.adapter_files import (
    AUTO_MAP,
    CONFIG,
    OWN_FILES,
    SHIM,
    SHIM_TEXT,
    WEIGHTS,
    Parts,
    apart,
    below,
    read_adapter,
    unchecked,
    weights_dtype,
    whole_device,
)
from restnet_hf.hub.cards import BUCKETS, adapter_tags, is_hub_id
from restnet_hf.hub.loading_options import (
    FROM_PRETRAINED,
    STATE_DICT,
    choose_route,
    given_weights,
    holds_anchors,
    hub_options,
    load_anchors,
    load_weights,
    loading_info,
    override,
)
from restnet_hf.hub.repository import PLOT, PROFILE, check_parents, push_folder
from restnet_hf.hub.several_adapters import add_adapter
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.routes.profile import Profile
from restnet_hf.routes.route import Route
from restnet_hf.stitches.layers import Stitch
from restnet_hf.stitches.tuning import Tuned, tuned_keys


class AdapterHubMixin:
    """What a stitched model does with files, on disk and on the Hub."""

    # What the model has
    config: Any
    anchors: Mapping[str, Anchor]
    stitches: MutableMapping[str, Stitch]
    heads: MutableMapping[str, nn.Linear]
    tuned: MutableMapping[str, Tuned]
    active_route: Route
    profiled: Profile | None
    image_processor: Any
    model_tags: list[str] | None
    state_dict: Callable[[], dict[str, Tensor]]

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The tensors that are saved: those of the stitches and new heads."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("anchors.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; a state dict without the anchors, such as a checkpoint's, is whole."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)  # type: ignore[misc]
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
            saved_entry(entry, anchor, whole, None if state_dict is None else below(f"anchors.{name}.model.", state))
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
        profile = self.valid_profile(self.config.anchors)
        self._tag(profile)
        with folder_written_whole(save_directory, CONFIG, OWN_FILES) as folder:
            super().save_pretrained(folder, state_dict={})  # type: ignore[misc]
            save_file(apart(weights), folder / WEIGHTS, {"format": "pt"})
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
        profile = self.valid_profile()
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

    @short_errors()
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
        hub = hub_options("load_stitch", hub_kwargs)
        where = os.fspath(repo_id)
        at = {**hub, "revision": at_commit(where, revision, hub), "subfolder": subfolder}
        config, profile, weights = read_adapter(where, at)
        mine = {key: value for key, value in weights.items() if not key.startswith("anchors.")}
        return add_adapter(self, config, profile, mine if config.standalone else weights, name, where)

    @classmethod
    @short_errors()
    @hub_errors()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: RestNetConfig | str | os.PathLike[str] | None = None,
        anchors: Mapping[str, nn.Module | str] | None = None,
        route: Route | str | None = None,
        budget: Mapping[str, float] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        attn_implementation: str | Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load an adapter from a local folder or the Hub, and the anchors it names at the commits it names.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the adapter; None with ``config`` and ``state_dict``.
            config: instead of the adapter's own, or a folder or Hub id of one.
            anchors: modules or folders by anchor name, for anchors that were made in code or have moved.
            route: to make active. Only the weights that it uses are read, the others when another route needs them.
            budget: limits such as ``{"macs": 1e9}``, to make the best route of the profile within them active.
            revision: of the adapter.
            subfolder: of the adapter in its repository.
            dtype: of the weights; as saved by default.
            device_map: a device for the whole model, as in transformers; ``auto`` takes the accelerator, if any.
            trust_remote_code: run anchors' code from the Hub.
            state_dict: tensors instead of those in the file. Anchors come from it too where it has their weights.
            attn_implementation: ``eager``, ``sdpa``, ...: see `set_attn_implementation`.
            ignore_mismatched_sizes: keep freshly made stitches and heads, with a warning, where those in the file have
                another shape: the heads for another number of classes.
            output_loading_info: return the loading info too.
            **kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in transformers. ``num_labels``,
                ``id2label``, ``label2id``, ``problem_type``, ``output_hidden_states`` and ``return_dict`` in place of
                what the config says; another number of classes needs new heads, and ``ignore_mismatched_sizes``.
                ``use_safetensors`` and ``weights_only`` can be True only, and ``low_cpu_mem_usage`` changes nothing,
                as in transformers 5. Of its other options an error says why they do not apply.

        Returns:
            The model in evaluation mode. With ``output_loading_info``, the model and a dict with ``missing_keys`` and
            ``unexpected_keys`` (empty: others than the model's are an error), ``mismatched_keys`` and ``error_msgs``.

        Raises:
            OSError: a file is missing or damaged.
            TypeError: an option is not known, or cannot apply to a stitched model.
            ValueError: weights do not fit the config, or an anchor is not the one the adapter was made for.
            BudgetError: no route fits, or the adapter has no profile.
        """
        dtype = dtype if dtype is not None else kwargs.pop("torch_dtype", None)
        device = whole_device(device_map)
        hub = hub_options("from_pretrained", kwargs, FROM_PRETRAINED)
        where, at = STATE_DICT, {**hub, "subfolder": subfolder}
        if pretrained_model_name_or_path is not None:
            where = os.fspath(pretrained_model_name_or_path)
            at["revision"] = at_commit(where, revision, hub)
        config, profile, weights = read_adapter(where, at, config, state_dict)
        config = override(config, kwargs)
        if state_dict is not None:
            weights = given_weights(state_dict, config, where)
        config.check()
        used = choose_route(config, profile, route, budget)
        whole = config.standalone if state_dict is None else holds_anchors(weights)
        wanted = weights_dtype(config.dtype if dtype in (None, "auto") else dtype)
        options = {"trust_remote_code": trust_remote_code, **hub}
        adapter = {k: v for k, v in weights.items() if not (whole and k.startswith("anchors."))}
        parts = Parts(adapter, config.part_names(), where)  # before any network is made
        made = load_anchors(config, weights, dict(anchors or {}), wanted, options, used, where, whole)
        model: Any = cls(config, made, unchecked if ignore_mismatched_sizes else parts.check)  # type: ignore[call-arg]
        model.profiled = profile
        mismatched = load_weights(model, adapter, where, ignore_mismatched_sizes)
        if pretrained_model_name_or_path is not None:
            model.config.name_or_path = model.name_or_path = where
        lora = dict(kwargs.get("adapter_kwargs") or {})
        if tuned := lora.pop("_adapter_model_path", None):  # Auto classes were given what PEFT wrote on top of this
            load_lora(model, tuned, lora)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        model = model.to(device).eval()
        # transformers too says that this is a model, for all who do not ask for more
        return cast("Self", (model, loading_info(mismatched)) if output_loading_info else model)

    def weights_sha256(self, entries: Sequence[Mapping[str, Any]] | None = None) -> dict[str, str]:
        """SHA-256 of the weights of each stitch and new head, of all that is tuned, and of anchors that changed.

        Args:
            entries: what config.json is to say of the anchors, where that is known.
        """
        parts: dict[str, nn.Module] = {f"stitches.{name}": stitch for name, stitch in self.stitches.items()}
        parts |= {f"heads.{name}": head for name, head in self.heads.items()}
        parts |= {f"tuned.{name}": tuned for name, tuned in self.tuned.items()}
        hashes = {key: weights_sha256(part.state_dict()) for key, part in parts.items()}
        if entries is None:
            pairs = zip(self.config.anchors, self.anchors.values(), strict=True)
            entries = [present(*pair) for pair in pairs if pair[0]["fingerprint"] is not None or pair[1].changed()]
        hashes |= {f"anchors.{entry['name']}": entry["fingerprint"] for entry in entries if entry.get("changed")}
        return hashes

    def valid_profile(self, entries: Sequence[Mapping[str, Any]] | None = None) -> Profile | None:
        """The profile without the scores of routes whose stitches, heads or anchors have changed since.

        Args:
            entries: as of `weights_sha256`.
        """
        if self.profiled is None:
            return None
        then, now = self.profiled.metadata.get("weights"), self.weights_sha256(entries)
        if not isinstance(then, Mapping):
            return self.profiled
        changed = {key for key in {*now, *then} if then.get(key) != now.get(key)}

        def uses(route: Route) -> set[str]:
            tuned = {f"tuned.{key}" for keys in tuned_keys(route) for key in keys}
            anchors = {f"anchors.{segment.anchor}" for segment in route.segments}
            stitches = {f"stitches.{point.name}" for point in route.stitch_points}
            return {f"heads.{route.head}"} | anchors | stitches | tuned

        rows = [replace(row, scores={}) if uses(row.route) & changed else row for row in self.profiled.routes]
        about = {**self.profiled.metadata, "weights": now}
        if changed and "runtimes" in about:  # what was exported was of other weights
            del about["runtimes"]
        return Profile(tuple(rows), about)
