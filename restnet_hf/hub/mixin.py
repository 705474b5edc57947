"""AdapterHubMixin: save, push and load a model as an adapter that names its anchors, or as a standalone checkpoint."""

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
from restnet_hf.anchors.config_entry import add_fingerprint, current_entry, saved_entry
from restnet_hf.anchors.loading import resolve_commit
from restnet_hf.configuration_restnet import RestNetConfig
from restnet_hf.errors import hub_errors, short_errors
from restnet_hf.files import atomic_folder
from restnet_hf.hashing import weights_sha256
from restnet_hf.hub.adapter_files import (
    AUTO_MAP,
    CONFIG,
    OWN_FILES,
    SHIM,
    SHIM_TEXT,
    WEIGHTS,
    build_model,
    read_adapter,
    read_checkpoint,
    select_prefix,
    separate_tensors,
    single_device,
)
from restnet_hf.hub.cards import BUCKETS, adapter_tags, is_hub_id
from restnet_hf.hub.loading_options import (
    FROM_PRETRAINED,
    choose_route,
    finish_loading,
    hub_options,
    loading_info,
)
from restnet_hf.hub.paging import WeightFiles
from restnet_hf.hub.repository import PLOT, PROFILE, check_parents, push_folder
from restnet_hf.hub.several_adapters import add_adapter
from restnet_hf.profiling.device_tables import make_device_table
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.progress import library_bars
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.device_table import DeviceTable
from restnet_hf.routes.profile import BudgetLike, Profile
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step
from restnet_hf.stitches.adding import warn_unfitted
from restnet_hf.stitches.layers import Stitch
from restnet_hf.stitches.tuning import Tuned, tuned_keys


class AdapterHubMixin:
    """Methods of a stitched model that save, load and push it."""

    # Attributes of the model
    config: Any
    anchors: Mapping[str, Anchor]
    stitches: MutableMapping[str, Stitch]
    heads: MutableMapping[str, nn.Linear]
    tuned: MutableMapping[str, Tuned]
    active_route: Route
    active_cascade: Cascade | None
    unfitted: set[str]
    profiled: Profile | None
    saved_profile: tuple[Profile | None, Profile] | None = None  # of `from_pretrained(device=)`: the device's, the own
    weight_files: WeightFiles | None
    steps: Callable[[Route], Sequence[Step]]
    image_processor: Any
    model_tags: list[str] | None
    state_dict: Callable[[], dict[str, Tensor]]
    all_routes: Any  # of routes, a property
    name_or_path: str

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The tensors of an adapter: those of stitches, new heads and tuned parts, without the anchors."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("anchors.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors as in torch, except that those of the anchors may be missing."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)  # type: ignore[misc]
        result.missing_keys[:] = [key for key in result.missing_keys if not key.startswith("anchors.")]
        if strict and (result.missing_keys or result.unexpected_keys):
            raise RuntimeError(f"missing keys {result.missing_keys}, unexpected keys {result.unexpected_keys}")
        self.unfitted.clear()
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
            save_directory: folder to write to; its other files stay.
            is_main_process: whether this process writes the files.
            state_dict: tensors to save in place of the model's own.
            push_to_hub: whether to push the adapter too, to ``repo_id`` or a repository of the folder's name.
            standalone: whether to write the anchors' weights too, so that loading needs no other repository; None for
                the way the model was loaded.
            **kwargs: further arguments of `push_to_hub`.

        Raises:
            ValueError: weights of an anchor have changed, which only ``standalone=True`` saves; or a standalone anchor
                was made in code, so that no config can rebuild it, or not all of its weights are in memory.
        """
        if not is_main_process:
            return
        warn_unfitted(self, self.config.parsed_routes())
        whole = self.config.standalone if standalone is None else standalone
        state = self.state_dict() if state_dict is None else state_dict
        if whole:
            made_in_code = [entry["name"] for entry in self.config.anchors if entry["config"] is None]
            if made_in_code:
                raise ValueError(
                    f"anchors {made_in_code} were made in code, and no config describes them; standalone=True needs "
                    "anchors loaded from the Hub or a folder"
                )
            for anchor in self.anchors.values():
                anchor.check_in_memory()
        self.config.active_route = str(self.active_route)
        self.config.active_cascade = None if self.active_cascade is None else str(self.active_cascade)
        entries = [
            saved_entry(
                entry, anchor, whole, None if state_dict is None else select_prefix(f"anchors.{name}.model.", state)
            )
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
        with atomic_folder(save_directory, CONFIG, OWN_FILES) as folder:
            with library_bars():
                super().save_pretrained(folder, state_dict={})  # type: ignore[misc]
            save_file(separate_tensors(weights), folder / WEIGHTS, {"format": "pt"})
            (folder / SHIM).write_text(SHIM_TEXT)
            if profile is not None:
                profile.save(folder / PROFILE)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(folder)

    def _tag(self, profile: Profile | None) -> None:
        """Set tags for cards that others write, such as the one that ``Trainer`` pushes."""
        parents = {entry["repo_id"] for entry in self.config.anchors if is_hub_id(entry["repo_id"])}
        own = [*adapter_tags(profile), *(f"base_model:{repo_id}" for repo_id in sorted(parents))]
        others = [tag for tag in self.model_tags or () if not any(tag.startswith(f"{cost}:le-") for cost in BUCKETS)]
        self.model_tags = list(dict.fromkeys([*own, *others]))

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
            repo_id: repository to push to; it is created if there is none.
            commit_message: summary line of the commit.
            commit_description: description of the commit below its summary line.
            private: whether a new repository is private.
            token: access token of the Hub, or whether to use the stored one.
            revision: branch to commit to.
            create_pr: whether to open a pull request in place of a commit.
            max_shard_size: ignored, as an adapter is one file; transformers passes it.
            tags: tags of the card, in addition to those for searches by budget.
            standalone: whether to push the anchors' weights too; see `save_pretrained`.

        Raises:
            ValueError: an anchor is not on the Hub, so that others cannot fetch it.
        """
        whole = self.config.standalone if standalone is None else standalone
        if not whole:
            check_parents(self.config.anchors)
        profile = self.valid_profile()
        scored = profile is not None and all("accuracy" in row.scores for row in profile.rows)
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
        """Add another adapter on the same anchors, from a local folder or the Hub.

        Its routes have the name in front, ``night: resnet50[:7] + mobilenetv2[11:]``: `set_route` switches to them,
        ``delete_stitch("night")`` removes them. Costs and accuracies are added to the profile if they were measured on
        the same device and images.

        Args:
            repo_id: Hub id or local folder of the adapter.
            name: name for the adapter, of letters, digits, ``_`` and ``-``.
            revision: branch, tag or commit of the adapter.
            subfolder: folder of the adapter in its repository.
            **hub_kwargs: options of huggingface_hub: ``token``, ``cache_dir``, ``local_files_only``, ...

        Returns:
            The routes that were added.

        Raises:
            OSError: a file is missing or damaged.
            TypeError: an option is unknown.
            ValueError: the name is taken, or the adapter is for other anchors, images or classes.
        """
        hub = hub_options("load_stitch", hub_kwargs)
        where = os.fspath(repo_id)
        at = {**hub, "subfolder": subfolder}
        at["revision"] = resolve_commit(where, revision, at) or revision
        config, profile, weights = read_adapter(where, at)
        if config.standalone:
            weights = {key: value for key, value in weights.items() if not key.startswith("anchors.")}
        return add_adapter(self, config, profile, weights, name, where)

    @classmethod
    @short_errors()
    @hub_errors()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: RestNetConfig | str | os.PathLike[str] | None = None,
        anchors: Mapping[str, nn.Module | str] | None = None,
        route: Route | Cascade | str | None = None,
        budget: BudgetLike | None = None,
        device: str | None = None,
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
            config: config in place of the adapter's own, or a folder or Hub id of one.
            anchors: modules or folders by anchor name, for anchors made in code or moved.
            route: route or cascade to make active. Only its weights are read now, the others when they are needed.
            budget: limits, a `Budget` or such as ``{"macs": 1e9}``, within which the best is made active.
            device: name of a device whose published latencies replace those of the profile; see `DeviceTable`.
            revision: branch, tag or commit of the adapter.
            subfolder: folder of the adapter in its repository.
            dtype: dtype of the weights; as saved by default.
            device_map: device for the whole model; ``auto`` takes the accelerator, if any.
            trust_remote_code: whether to run anchors' code from the Hub.
            state_dict: tensors in place of those in the file, the anchors' included if it has them.
            attn_implementation: ``eager``, ``sdpa``, ... for the anchors; see `set_attn_implementation`.
            ignore_mismatched_sizes: whether to keep new stitches and heads where those in the file differ in shape.
            output_loading_info: whether to return the loading info too.
            **kwargs: options of transformers: ``token``, ``cache_dir``, ``local_files_only``, ...; ``num_labels``,
                ``id2label``, ``label2id``, ``problem_type``, ``output_hidden_states`` and ``return_dict`` override
                the config, where another number of classes needs new heads and ``ignore_mismatched_sizes``.

        Returns:
            The model in evaluation mode. With ``output_loading_info``, the model and the dict of transformers.

        Raises:
            OSError: a file is missing or damaged.
            TypeError: an option is unknown, or cannot apply to a stitched model.
            ValueError: weights do not fit the config, an anchor is not the adapter's, or there is no such device.
            BudgetError: no route fits, or the adapter has no profile.
        """
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        place, hub = single_device(device_map), hub_options("from_pretrained", kwargs, FROM_PRETRAINED)
        where, options = pretrained_model_name_or_path, {"trust_remote_code": trust_remote_code, **hub}
        checkpoint = read_checkpoint(where, revision, subfolder, config, state_dict, kwargs, hub, device)
        used = choose_route(checkpoint.config, checkpoint.profile, route, budget)
        model, mismatched = build_model(cls, checkpoint, anchors or {}, used, dtype, options, ignore_mismatched_sizes)
        finish_loading(model, kwargs.get("adapter_kwargs"), attn_implementation)
        model.to(place).eval()
        return cast("Self", (model, loading_info(mismatched)) if output_loading_info else model)

    def adapter_identity(self) -> dict[str, Any]:
        """Where the adapter was loaded from and what identifies its weights, for exports and published latencies.

        Returns:
            ``repo_id``, None where that is not a repository on the Hub; and ``weights``, by part the SHA-256 of
            stitches, new heads and tuned parts, and the fingerprints of anchors.
        """
        entries = [current_entry(*pair) for pair in zip(self.config.anchors, self.anchors.values(), strict=True)]
        anchors = {f"anchors.{entry['name']}": entry["fingerprint"] for entry in entries}
        repo_id = self.name_or_path if is_hub_id(self.name_or_path) and not os.path.isdir(self.name_or_path) else None
        return {"repo_id": repo_id, "weights": {**self.weights_sha256(entries), **anchors}}

    def device_table(self, latency: LatencyTable) -> DeviceTable:
        """The latencies of all routes and profiled cascades on a device, for `push_latency`.

        Args:
            latency: table that `measure_latency` returned.

        Raises:
            ValueError: a piece of a route was not measured.
        """
        cascades = () if self.profiled is None else [row.route for row in self.profiled.cascades]
        return make_device_table(latency, self.all_routes, cascades, self.steps, self.adapter_identity())

    def page_to(self, folder: str | os.PathLike[str]) -> None:
        """Move the anchors' weights to files, and keep in memory only those that the active route uses.

        From then on `set_route` and `set_budget` map the weights that the new route needs into memory, and free the
        others. Only the active route can run: call `profile` before.

        Args:
            folder: folder for a file of each anchor.

        Raises:
            OSError: a file cannot be written.
            ValueError: weights are not in memory, after `prune_to` say.
        """
        for entry, anchor in zip(self.config.anchors, self.anchors.values(), strict=True):
            add_fingerprint(entry, anchor)
        self.weight_files = WeightFiles(folder, self.anchors)
        routes = [self.active_route] if self.active_cascade is None else self.active_cascade.routes
        self.weight_files.load(self.anchors, [step for route in routes for step in self.steps(route)])

    def weights_sha256(self, entries: Sequence[Mapping[str, Any]] | None = None) -> dict[str, str]:
        """SHA-256 of the weights of each stitch, new head and tuned part, and of anchors that changed.

        Args:
            entries: the anchors' entries of config.json, if they were computed before.
        """
        parts: dict[str, nn.Module] = {f"stitches.{name}": stitch for name, stitch in self.stitches.items()}
        parts |= {f"heads.{name}": head for name, head in self.heads.items()}
        parts |= {f"tuned.{name}": tuned for name, tuned in self.tuned.items()}
        hashes = {key: weights_sha256(part.state_dict()) for key, part in parts.items()}
        if entries is None:
            pairs = zip(self.config.anchors, self.anchors.values(), strict=True)
            entries = [
                current_entry(*pair)
                for pair in pairs
                if pair[0]["fingerprint"] is not None or pair[1].changed_weights()
            ]
        hashes |= {f"anchors.{entry['name']}": entry["fingerprint"] for entry in entries if entry.get("changed")}
        return hashes

    def valid_profile(self, entries: Sequence[Mapping[str, Any]] | None = None) -> Profile | None:
        """The profile without scores of routes whose stitches, heads, tuned parts or anchors have changed since.

        Args:
            entries: the anchors' entries of config.json, if they were computed before.
        """
        profile = self.profiled
        if self.saved_profile is not None and profile is self.saved_profile[0]:
            profile = self.saved_profile[1]  # latencies of a device stay with this model
        if profile is None:
            return None
        then, now = profile.metadata.get("weights"), self.weights_sha256(entries)
        if not isinstance(then, Mapping):
            return profile
        changed = {key for key in {*now, *then} if then.get(key) != now.get(key)}

        def uses(route: Route) -> set[str]:
            tuned = {f"tuned.{key}" for keys in tuned_keys(route) for key in keys}
            anchors = {f"anchors.{segment.anchor}" for segment in route.segments}
            stitches = {f"stitches.{point.name}" for point in route.stitch_points}
            return {f"heads.{route.head}"} | anchors | stitches | tuned

        rows = [replace(row, scores={}) if uses(row.route) & changed else row for row in profile.routes]
        cascades = tuple(
            row for row in profile.cascades if not any(uses(route) & changed for route in row.route.routes)
        )
        metadata = {**profile.metadata, "weights": now}
        if changed and "runtimes" in metadata:  # the exported routes have other weights
            del metadata["runtimes"]
        return Profile(tuple(rows), metadata, cascades)
