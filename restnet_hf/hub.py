"""The Hub: pushing an adapter whose anchors others can fetch, and finding adapters by what they cost and give."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import httpx

from restnet_hf.cards import MARK, TAG, eval_results, filter_tags, is_hub_id, make_card
from restnet_hf.profiles import Budget, BudgetError, Profile, ProfiledRoute


COMMIT = re.compile(r"[0-9a-f]{40}")
CARD, PLOT, PROFILE, RESULTS = "README.md", "tradeoff.png", "profile.json", ".eval_results"
STALE = (PLOT, PROFILE, f"{RESULTS}/*")  # of ours: on the Hub, but no longer in what is pushed
OF_TRAINER = "generated_from_trainer"  # the tag on a card that transformers' Trainer wrote


@contextmanager
def hub_errors() -> Iterator[None]:
    """Make a Hub that cannot be reached, or whose answer breaks off, an OSError that says what to do."""
    try:
        yield
    except httpx.HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"the Hub could not be reached, or broke off: {error}. Try again, or set HF_HUB_OFFLINE=1 to use the cache"
        ) from error


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
        card = api.model_info(entry["repo_id"], revision=entry["revision"]).card_data if known else None
        licence = card.get("license") if card is not None else None
        found.append(
            {
                "name": entry["name"],
                "repo_id": entry["repo_id"] if known else None,
                "revision": entry["revision"] if known else None,
                "license": ", ".join(licence) if isinstance(licence, list) else licence,
            }
        )
    return found


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
        there = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        there = MARK
    ours = MARK in there or OF_TRAINER in (ModelCard(there, ignore_metadata_errors=True).data.get("tags") or ())
    write_card(folder, repo_id, parents, profile, standalone, tags, training)
    if not ours:
        (folder / CARD).unlink()
    return api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=list(STALE), **commit)


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

    Tags narrow the list on the server, the exact numbers of each card decide here.

    Args:
        base_model: anchors that it must have, by their ids on the Hub.
        macs, params, memory_mb, latency_ms: limits, as of `Budget`.
        min_accuracy: of the best route within them, from 0 to 1.
        device: that the costs were measured on.
        token: as in huggingface_hub.
    """
    limits = {"macs": macs, "params": params, "memory_mb": memory_mb, "latency_ms": latency_ms}
    limits = {cost: limit for cost, limit in limits.items() if limit is not None}
    budget = Budget(**limits) if limits else None
    parents = [base_model] if isinstance(base_model, str) else list(base_model or [])
    tags = [TAG, *(f"base_model:{parent}" for parent in parents), *(filter_tags(budget.limits) if budget else [])]
    found = []
    api = HfApi(token=token)
    for info in api.list_models(filter=tags, cardData=True):
        adapter = _adapter(info, budget, api)
        if adapter is None or (device is not None and adapter.profile.metadata.get("device") != device):
            continue
        if min_accuracy is None or adapter.best.scores.get("accuracy", -1.0) >= min_accuracy:
            found.append(adapter)
    return sorted(found, key=lambda a: (-a.best.scores.get("accuracy", 0.0), a.best.costs.get("macs", 0.0), a.repo_id))


def _adapter(info: Any, budget: Budget | None, api: HfApi) -> FoundAdapter | None:
    """None where neither the card nor the repository holds a profile, or no route of it fits."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    try:
        profile = Profile.from_dict(card["restnet"]) if "restnet" in card else _profile_file(info, api)
        best = (
            profile.best(budget) if budget else max(profile.routes, key=lambda row: row.scores.get("accuracy", -1.0))
        )
    except (BudgetError, ValueError, EntryNotFoundError):
        return None
    tags = [tag for tag in info.tags or () if tag.startswith("base_model:") and tag.count(":") == 1]
    parents = dict.fromkeys(tag.removeprefix("base_model:") for tag in tags)
    return FoundAdapter(info.id, tuple(parents), best, profile)


def _profile_file(info: Any, api: HfApi) -> Profile:
    """The profile of a repository whose card holds none, as those that ``Trainer`` pushed."""
    return Profile.load(api.hf_hub_download(info.id, PROFILE, revision=info.sha))
