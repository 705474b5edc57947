"""The Hub: pushing an adapter whose anchors others can fetch, and finding adapters by what they cost and give."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, ModelInfo, eval_result_entries_to_yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import httpx

from restnet_hf.errors import BudgetError, hub_errors
from restnet_hf.hub.cards import MARK, TAG, eval_results, filter_tags, is_hub_id, make_card
from restnet_hf.limits import MAX_BYTES
from restnet_hf.routes.profile import Budget, Profile, ProfiledRoute


COMMIT = re.compile(r"[0-9a-f]{40}")
CARD, PLOT, PROFILE, RESULTS = "README.md", "tradeoff.png", "profile.json", ".eval_results"
STALE = (PLOT, PROFILE, f"{RESULTS}/*")  # of ours: on the Hub, but no longer in what is pushed
OF_TRAINER = "generated_from_trainer"  # the tag on a card that transformers' Trainer wrote
NAMED = 3  # repositories in a warning about those that cannot be read
# What the client makes of odd cards: it passes their keys on as arguments, and trusts what JSON and YAML hold.
ODD_CARD = (AttributeError, KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError)


def check_parents(entries: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError where others could not fetch an anchor that config.json describes, at its very commit."""
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
    """What a card says of the anchors that config.json describes; their licences are asked of the Hub."""
    found = []
    for entry in entries:
        known = is_hub_id(entry["repo_id"]) and bool(entry["revision"])
        found.append(
            {
                "name": entry["name"],
                "repo_id": entry["repo_id"] if known else None,
                "revision": entry["revision"] if known else None,
                "license": _licence(entry["repo_id"], entry["revision"], api) if known else None,
            }
        )
    return found


def _licence(repo_id: str, revision: str, api: HfApi) -> str | None:
    """The licence, or the licences, that a card on the Hub states; None where it states none that can be read."""
    try:
        stated = _of_card(api.model_info(repo_id, revision=revision), "license")
    except HfHubHTTPError:  # some are ValueErrors too
        raise
    except ODD_CARD:
        return None
    texts = [text for text in (stated if isinstance(stated, list) else [stated]) if isinstance(text, str)]
    return ", ".join(texts) or None


def _of_card(info: ModelInfo, key: str) -> Any:
    """What a card says under a key; its own keys may hide the methods of the object that holds them."""
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
        folder: what ``save_pretrained`` wrote.
        repo_id: where to; the repository is made if there is none.
        entries: of the anchors in config.json.
        profile: for the card.
        standalone: the folder holds the anchors' weights.
        tags: for the card, beside those of the budget.
        training: of config.json, for the card.
        private: of a new repository.
        token: as in huggingface_hub.
        **commit: of ``HfApi.upload_folder``: ``commit_message``, ``revision``, ``create_pr``, ...
    """
    api = HfApi(token=token)
    parents = parents_on_card(entries, api)  # before anything is made
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    revision = commit.get("revision")
    try:
        ours = _can_be_replaced(Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_bytes())
    except RemoteEntryNotFoundError:
        ours = True
    write_card(folder, repo_id, parents, profile, standalone, tags, training)
    if not ours:
        (folder / CARD).unlink()
    return api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=list(STALE), **commit)


def _can_be_replaced(card: bytes) -> bool:
    """Whether this package or transformers' ``Trainer`` wrote a card; one that cannot be read is somebody's own."""
    if MARK.encode() in card:
        return True
    try:
        tags = ModelCard(card.decode("utf-8"), ignore_metadata_errors=True).data.to_dict().get("tags")
    except ODD_CARD:
        return False
    return isinstance(tags, list) and OF_TRAINER in tags


def write_card(
    folder: Path,
    repo_id: str,
    parents: Sequence[Mapping[str, Any]],
    profile: Profile | None,
    standalone: bool = False,
    tags: Iterable[str] = (),
    training: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write an adapter's README.md and ``.eval_results/`` into its folder; see `make_card`."""
    plot = PLOT if (folder / PLOT).exists() else None
    make_card(repo_id, parents, profile, standalone, plot, tags, training).save(folder / CARD)
    if entries := eval_results(profile):
        file = folder / RESULTS / f"{entries[0].dataset_id.replace('/', '--')}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on the Hub and its best route within the limits asked for."""

    repo_id: str
    base_models: tuple[str, ...]
    best: ProfiledRoute
    profile: Profile


@hub_errors()
def find_adapters(
    base_model: str | Sequence[str] | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    memory_mb: float | None = None,
    latency_ms: float | None = None,
    min_accuracy: float | None = None,
    device: str | None = None,
    token: str | bool | None = None,
) -> list[FoundAdapter]:
    """Adapters with a route within limits, the most accurate first.

    Tags narrow the list on the server, the exact numbers of each card decide here. Repositories whose card or profile
    cannot be read, such as gated ones, are left out; one warning says how many they are and names the first few.

    Args:
        base_model: anchors that it must have, by their ids on the Hub.
        macs, params, memory_mb, latency_ms: limits, as of `Budget`.
        min_accuracy: least accuracy of the best route within them, from 0 to 1.
        device: name of the device that the costs were measured on.
        token: as in huggingface_hub.

    Raises:
        OSError: the Hub cannot be reached, or does not answer.
        ValueError: a limit is not a number above 0.
    """
    limits = {"macs": macs, "params": params, "memory_mb": memory_mb, "latency_ms": latency_ms}
    limits = {cost: limit for cost, limit in limits.items() if limit is not None}
    budget = Budget(**limits) if limits else None
    parents = [base_model] if isinstance(base_model, str) else list(base_model or [])
    tags = [TAG, *(f"base_model:{parent}" for parent in parents), *(filter_tags(budget.limits) if budget else [])]
    found: list[FoundAdapter] = []
    failed: dict[str, Exception] = {}
    api = HfApi(token=token)
    for repo_id, info in _listed(api, tags):
        try:
            adapter = _adapter(api.model_info(repo_id) if info is None else info, budget, api)
        except (OSError, httpx.HTTPError, *ODD_CARD) as error:
            _check_hub(error, api, tags)
            failed[repo_id] = error
            continue
        if adapter is None or (device is not None and adapter.profile.metadata.get("device") != device):
            continue
        if min_accuracy is None or adapter.best.scores.get("accuracy", -1.0) >= min_accuracy:
            found.append(adapter)
    if failed:
        first = [f"{repo_id} ({_reason(error)})" for repo_id, error in list(failed.items())[:NAMED]]
        first += [f"{len(failed) - NAMED} more"] if len(failed) > NAMED else []
        what = "repository was" if len(failed) == 1 else "repositories were"
        warnings.warn(f"{len(failed)} {what} left out, as they cannot be read: {', '.join(first)}", stacklevel=3)
    return sorted(found, key=lambda a: (-a.best.scores.get("accuracy", 0.0), a.best.costs.get("macs", 0.0), a.repo_id))


def _listed(api: HfApi, tags: Sequence[str]) -> list[tuple[str, ModelInfo | None]]:
    """All repositories with these tags: ids, with their cards where all cards can be read.

    The client reads a page of cards at once, or not at all if one is odd. Then each has to be asked for by itself.
    """
    try:
        return [(info.id, info) for info in api.list_models(filter=tags, cardData=True)]
    except HfHubHTTPError:  # some are ValueErrors too
        raise
    except ODD_CARD:
        pass
    try:
        return [(info.id, None) for info in api.list_models(filter=tags)]
    except ODD_CARD as error:
        raise OSError(f"the Hub's answer cannot be read: {_reason(error)}. Try again") from error


def _check_hub(error: Exception, api: HfApi, tags: Sequence[str]) -> None:
    """Raise the error of one repository where it is that of this machine or of the whole Hub."""
    status = getattr(getattr(_cause(error), "response", None), "status_code", None)
    too_many = status == 429  # requests: the next repository would fail likewise
    if too_many or (isinstance(error, OSError) and error.errno is not None):  # a full disk; those of the Hub have none
        raise error
    if isinstance(error, OSError | httpx.HTTPError) and (status is None or status >= 500):
        next(iter(api.list_models(filter=tags, limit=1)), None)  # raises if it has gone


def _cause(error: Exception) -> BaseException:
    """What kept the client from a file, which it tells as the file not being in the cache."""
    return error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error


def _reason(error: Exception) -> str:
    cause = _cause(error)
    response = getattr(cause, "response", None)
    text = f"status {response.status_code}" if response is not None else " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text}"[:200]


def _adapter(info: ModelInfo, budget: Budget | None, api: HfApi) -> FoundAdapter | None:
    """None where neither the card nor the repository holds a profile, or no route of it fits.

    Raises:
        OSError: a file cannot be fetched.
        ValueError: what there is is not a profile.
    """
    given = _of_card(info, "restnet")
    try:
        profile = _profile_file(info, api) if given is None else Profile.from_dict(given)
        best = profile.best(budget) if budget else max(profile.routes, key=_accuracy, default=None)
    except (BudgetError, RemoteEntryNotFoundError):
        return None
    tags = [tag for tag in info.tags or () if tag.startswith("base_model:") and tag.count(":") == 1]
    parents = dict.fromkeys(tag.removeprefix("base_model:") for tag in tags)
    return None if best is None else FoundAdapter(info.id, tuple(parents), best, profile)


def _accuracy(row: ProfiledRoute) -> float:
    return row.scores.get("accuracy", -1.0)


def _profile_file(info: ModelInfo, api: HfApi) -> Profile:
    """The profile of a repository whose card holds none, as those that ``Trainer`` pushed."""
    about = api.hf_hub_download(info.id, PROFILE, revision=info.sha, dry_run=True)
    if (about.file_size or 0) > MAX_BYTES:
        raise ValueError(f"{PROFILE} of {about.file_size:,} bytes, and {MAX_BYTES:,} is the most that one may have")
    return Profile.load(api.hf_hub_download(info.id, PROFILE, revision=info.sha))
