"""The Hub: push adapters whose anchors others can fetch, and find adapters by costs and accuracy."""

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, ModelInfo, eval_result_entries_to_yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from restnet_hf.errors import BudgetError, http_error, hub_errors
from restnet_hf.files import COMMIT
from restnet_hf.hub.cards import MARK, TAG, eval_results, filter_tags, is_hub_id, make_card
from restnet_hf.hub.latency_tables import is_own_device, may_be_of, published_weights, read_tables, table_files
from restnet_hf.limits import MAX_BYTES
from restnet_hf.routes.device_table import TIMES, DeviceTable
from restnet_hf.routes.profile import AnyProfiled, Budget, BudgetLike, Profile


CARD, PLOT, PROFILE, RESULTS = "README.md", "tradeoff.png", "profile.json", ".eval_results"
DELETED_IF_MISSING = (PLOT, PROFILE, f"{RESULTS}/*")  # files of ours that are deleted on the Hub if a push has none
TRAINER_TAG = "generated_from_trainer"  # tag of a card that transformers' Trainer wrote
MAX_NAMED = 3  # repositories that a warning names
# Errors of the client on malformed cards: it passes their keys on as arguments, and trusts JSON and YAML.
CARD_ERRORS = (AttributeError, KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError)
logger = logging.getLogger(__name__)


def check_parents(entries: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if others cannot fetch an anchor at its commit.

    Args:
        entries: the anchors' entries of config.json.
    """
    for entry in entries:
        name, repo_id = entry["name"], entry["repo_id"]
        if not is_hub_id(repo_id):
            where = "was made in code" if repo_id is None else f"comes from the folder {repo_id}"
            raise ValueError(
                f"anchor '{name}' {where}, and others cannot fetch it. Push it to the Hub and load it from there, or "
                "push with standalone=True"
            )
        if not COMMIT.fullmatch(entry["revision"] or ""):
            raise ValueError(f"anchor '{name}' is not pinned to a commit of {repo_id}: load it by its id on the Hub")


def parents_on_card(entries: Iterable[Mapping[str, Any]], api: HfApi) -> list[dict[str, Any]]:
    """The anchors for a card, with their licences from the Hub.

    Args:
        entries: the anchors' entries of config.json.
        api: client of the Hub.
    """
    parents = []
    for entry in entries:
        public = is_hub_id(entry["repo_id"]) and bool(entry["revision"])
        parents.append(
            {
                "name": entry["name"],
                "repo_id": entry["repo_id"] if public else None,
                "revision": entry["revision"] if public else None,
                "license": _licence(entry["repo_id"], entry["revision"], api) if public else None,
            }
        )
    return parents


def _licence(repo_id: str, revision: str, api: HfApi) -> str | None:
    """The licence or licences that a card on the Hub states; None if it states none that can be read."""
    try:
        stated = _card_value(api.model_info(repo_id, revision=revision), "license")
    except HfHubHTTPError:  # some are ValueErrors too
        raise
    except CARD_ERRORS:
        return None
    texts = [text for text in (stated if isinstance(stated, list) else [stated]) if isinstance(text, str)]
    return ", ".join(texts) or None


def _card_value(info: ModelInfo, key: str) -> Any:
    """The value of a key of a card, read without methods of the object, which keys may hide."""
    return info.card_data[key] if isinstance(info.card_data, ModelCardData) and key in info.card_data else None


@hub_errors()
def push_folder(
    folder: Path,
    repo_id: str,
    entries: Sequence[Mapping[str, Any]],
    profile: Profile | None,
    *,
    standalone: bool = False,
    tags: Iterable[str] = (),
    training: Iterable[Mapping[str, Any]] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> CommitInfo:
    """Write the card of a saved adapter and push the folder; nothing is committed where nothing changed.

    A card on the Hub that somebody wrote by hand is left alone; one that transformers' ``Trainer`` made is replaced.

    Args:
        folder: folder that ``save_pretrained`` wrote.
        repo_id: repository to push to; it is created if there is none.
        entries: the anchors' entries of config.json.
        profile: routes with costs and scores for the card; None if nothing was measured.
        standalone: whether the folder includes the anchors' weights.
        tags: tags of the card, in addition to those of costs.
        training: entries of config.json on how the stitches were fitted and trained.
        private: whether a new repository is private.
        token: access token of the Hub, or whether to use the stored one.
        **commit: options of ``HfApi.upload_folder``: ``commit_message``, ``revision``, ``create_pr``, ...
    """
    api = HfApi(token=token)
    parents = parents_on_card(entries, api)  # before a repository is created
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    revision = commit.get("revision")
    try:
        replace = _can_be_replaced(Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_bytes())
    except RemoteEntryNotFoundError:
        replace = True
    write_card(folder, repo_id, parents, profile, standalone, tags, training)
    if not replace:
        (folder / CARD).unlink()
    return api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=list(DELETED_IF_MISSING), **commit)


def _can_be_replaced(card: bytes) -> bool:
    """Whether this package or transformers' ``Trainer`` wrote a card; an unreadable one counts as hand-written."""
    if MARK.encode() in card:
        return True
    try:
        tags = ModelCard(card.decode("utf-8"), ignore_metadata_errors=True).data.to_dict().get("tags")
    except CARD_ERRORS:
        return False
    return isinstance(tags, list) and TRAINER_TAG in tags


def write_card(
    folder: Path,
    repo_id: str,
    parents: Sequence[Mapping[str, Any]],
    profile: Profile | None,
    standalone: bool = False,
    tags: Iterable[str] = (),
    training: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write an adapter's README.md and ``.eval_results/`` into its folder.

    Args:
        folder: folder of the saved adapter.
        repo_id: name of the adapter on the Hub.
        parents: the anchors, as `parents_on_card` returns them.
        profile: routes with costs and scores; None if nothing was measured.
        standalone: whether the folder includes the anchors' weights.
        tags: tags of the card, in addition to those of costs.
        training: entries of config.json on how the stitches were fitted and trained.
    """
    plot = PLOT if (folder / PLOT).exists() else None
    make_card(repo_id, parents, profile, standalone, plot, tags, training).save(folder / CARD)
    if entries := eval_results(profile):
        file = folder / RESULTS / f"{entries[0].dataset_id.replace('/', '--')}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on the Hub and its best route within the limits.

    Args:
        repo_id: Hub id of the adapter.
        base_models: Hub ids of its anchors.
        best: the most accurate route within the limits, or cascade where they limit a mean.
        profile: profile of the adapter, with the costs on the device that was asked for.
        table: published latencies that the costs are from; None where they are the profile's own.
    """

    repo_id: str
    base_models: tuple[str, ...]
    best: AnyProfiled
    profile: Profile
    table: DeviceTable | None = None


@hub_errors()
def find_adapters(
    base_model: str | Sequence[str] | None = None,
    budget: BudgetLike | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    memory_mb: float | None = None,
    latency_ms: float | None = None,
    energy_j: float | None = None,
    mean_macs: float | None = None,
    mean_latency_ms: float | None = None,
    min_accuracy: float | None = None,
    device: str | None = None,
    token: str | bool | None = None,
) -> list[FoundAdapter]:
    """Find adapters on the Hub with a route within limits, the most accurate first.

    The server filters by tags, the exact numbers of each card decide here. A warning names repositories that cannot
    be read, such as gated ones.

    Args:
        base_model: Hub ids of anchors that the adapter must have.
        budget: limits as a `Budget` or a dict, in place of ``macs`` to ``mean_latency_ms``.
        macs: largest multiply-accumulates for one image.
        params: largest number of parameters.
        memory_mb: largest memory in MB.
        latency_ms: largest latency for one image in milliseconds.
        energy_j: largest energy for one image in joules.
        mean_macs: largest multiply-accumulates as a mean over images; cascades are considered then.
        mean_latency_ms: largest latency in milliseconds as a mean over images.
        min_accuracy: least accuracy of the best route within the limits, from 0 to 1.
        device: name of the device that latencies are of: that of the profile, or of a table that somebody published.
        token: access token of the Hub, or whether to use the stored one.

    Raises:
        OSError: the Hub cannot be reached, or does not answer.
        ValueError: a limit is not a number above 0.
    """
    limits = {"macs": macs, "params": params, "memory_mb": memory_mb, "latency_ms": latency_ms}
    limits |= {"energy_j": energy_j, "mean_macs": mean_macs, "mean_latency_ms": mean_latency_ms}
    limited = budget is not None or any(limit is not None for limit in limits.values())
    wanted = Budget.of(budget, **limits) if limited else None
    parents = [base_model] if isinstance(base_model, str) else list(base_model or [])
    tags = [TAG, *(f"base_model:{parent}" for parent in parents), *_cost_tags(wanted, device)]
    adapters, failed, api = list[FoundAdapter](), dict[str, Exception](), HfApi(token=token)
    for repo_id, info in _listed(api, tags, files=device is not None):
        try:
            adapter = _adapter(api.model_info(repo_id) if info is None else info, wanted, api, device)
        except (OSError, http_error(), *CARD_ERRORS) as error:
            _check_hub(error, api, tags)
            failed[repo_id] = error
            continue
        if adapter is not None and (min_accuracy is None or _accuracy(adapter.best) >= min_accuracy):
            adapters.append(adapter)
    if failed:
        warnings.warn(_left_out(failed), stacklevel=3)
    return sorted(
        adapters, key=lambda a: (-a.best.scores.get("accuracy", 0.0), a.best.costs.get("macs", 0.0), a.repo_id)
    )


def _cost_tags(budget: Budget | None, device: str | None) -> list[str]:
    """Tags of every adapter within a budget; latencies of a device may be others than those that the tags are of."""
    limits = {} if budget is None else budget.limits
    return filter_tags({cost: limit for cost, limit in limits.items() if device is None or cost not in TIMES})


def _left_out(failed: Mapping[str, Exception]) -> str:
    """A warning of repositories that cannot be read, of which the first few are named."""
    first = [f"{repo_id} ({_reason(error)})" for repo_id, error in list(failed.items())[:MAX_NAMED]]
    first += [f"{len(failed) - MAX_NAMED} more"] if len(failed) > MAX_NAMED else []
    noun = "repository was" if len(failed) == 1 else "repositories were"
    return f"{len(failed)} {noun} left out, as they cannot be read: {', '.join(first)}"


def _listed(api: HfApi, tags: Sequence[str], files: bool = False) -> list[tuple[str, ModelInfo | None]]:
    """The ids of all repositories with these tags, with their cards, and names of files, if all can be read.

    The client reads a whole page of cards, or none if one is malformed; then each is requested by itself.
    """
    try:
        return [(info.id, info) for info in api.list_models(filter=tags, cardData=True, full=files)]
    except HfHubHTTPError:  # some are ValueErrors too
        raise
    except CARD_ERRORS:
        pass
    try:
        return [(info.id, None) for info in api.list_models(filter=tags)]
    except CARD_ERRORS as error:
        raise OSError(f"the Hub's answer cannot be read: {_reason(error)}. Try again") from error


def _check_hub(error: Exception, api: HfApi, tags: Sequence[str]) -> None:
    """Raise the error of one repository if its cause is this machine or the whole Hub."""
    status = getattr(getattr(_cause(error), "response", None), "status_code", None)
    too_many = status == 429  # the next request would fail, too
    if too_many or (
        isinstance(error, OSError) and error.errno is not None
    ):  # a full disk, say; errors of the Hub have no errno
        raise error
    if isinstance(error, (OSError, http_error())) and (status is None or status >= 500):
        next(iter(api.list_models(filter=tags, limit=1)), None)  # raises if the Hub cannot be reached


def _cause(error: Exception) -> BaseException:
    """The cause of an error that the client reports as a file missing from the cache."""
    return error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    response = getattr(cause, "response", None)
    text = f"status {response.status_code}" if response is not None else " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}"[:200]


def _adapter(info: ModelInfo, budget: Budget | None, api: HfApi, device: str | None) -> FoundAdapter | None:
    """The adapter of a repository; None if it has no profile, or no route within the budget on the device.

    Raises:
        OSError: a file cannot be fetched.
        ValueError: the profile is invalid.
    """
    on_card = _card_value(info, "restnet")
    try:
        profile = _profile_file(info, api) if on_card is None else Profile.from_dict(on_card)
    except RemoteEntryNotFoundError:
        return None
    measured: list[tuple[Profile, DeviceTable | None]] = []
    if device is None or is_own_device(profile, device):
        measured.append((profile, None))
    if device is not None:
        measured += [(table.add_to(profile), table) for table in _tables(info, profile, device, api)]
    found = [(row, *each) for each in measured if (row := _best(each[0], budget)) is not None]
    if not found:
        return None
    tags = [tag for tag in info.tags or () if tag.startswith("base_model:") and tag.count(":") == 1]
    parents = dict.fromkeys(tag.removeprefix("base_model:") for tag in tags)
    best = max(found, key=lambda each: (_accuracy(each[0]), -each[0].costs.get("latency_ms", 0.0)))
    return FoundAdapter(info.id, tuple(parents), *best)


def _best(profile: Profile, budget: Budget | None) -> AnyProfiled | None:
    """The best row within a budget, else the most accurate route; None if there is none."""
    try:
        return profile.best(budget) if budget else max(profile.routes, key=_accuracy, default=None)
    except BudgetError:
        return None


def _tables(info: ModelInfo, profile: Profile, device: str, api: HfApi) -> list[DeviceTable]:
    """The published tables of a device that are of an adapter's weights; invalid ones are left out with a warning.

    Raises:
        OSError: a file cannot be fetched.
        ValueError: the adapter's config is invalid.
    """
    paths = (each.rfilename for each in info.siblings or ())
    at = {"revision": info.sha, "token": api.token}
    names = [name for name in table_files(paths) if may_be_of(name, device)]
    tables = [table for table in read_tables(info.id, names, at)[0] if table.is_named(device)] if names else []
    weights = published_weights(info.id, profile, at) if tables else {}
    profiled = {str(row.route) for row in profile.routes}
    current = []
    for table in tables:
        try:
            current.append(table.current(weights))
        except ValueError as error:
            logger.warning("latencies of %s were left out: %s", info.id, error)
    current = [table for table in current if profiled & table.routes.keys()]
    if len(current) > 1:
        names = [table.name for table in current]
        logger.warning("%s was left out: it has several tables of '%s'; name one of %s", info.id, device, names)
        return []
    return current


def _accuracy(row: AnyProfiled) -> float:
    return row.scores.get("accuracy", -1.0)


def _profile_file(info: ModelInfo, api: HfApi) -> Profile:
    """The profile of a repository whose card has none, such as one that ``Trainer`` pushed."""
    file = api.hf_hub_download(info.id, PROFILE, revision=info.sha, dry_run=True)
    if (file.file_size or 0) > MAX_BYTES:
        raise ValueError(
            f"{PROFILE} of {file.file_size:,} bytes is larger than {MAX_BYTES:,}, the most that a profile may have"
        )
    return Profile.load(api.hf_hub_download(info.id, PROFILE, revision=info.sha))
