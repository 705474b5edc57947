"""Latency tables in an adapter's repository: one JSON file for each device, pushed and read without torch."""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from packaging.version import InvalidVersion, Version

from restnet_hf.errors import http_error, hub_errors, quote, shorten
from restnet_hf.limits import MAX_BYTES, read_json
from restnet_hf.routes.device_table import DeviceTable, slug, stale_routes
from restnet_hf.routes.profile import Profile
from restnet_hf.runtime.exported_files import PROFILE, checked_path
from restnet_hf.runtime.runners import installed_version


FOLDER = "latency"
CONFIG = "config.json"
FILE_NAME = re.compile(r"[a-z0-9-]{1,160}\.json")
MAX_TABLES = 64  # of one repository that are read
MAX_FILES = 4096  # of one repository that are considered
MAX_TABLE_BYTES = 2**22
MAX_REASON = 200  # characters of why a table is left out
FORBIDDEN = 403
OF_FILES = ("cache_dir", "force_download", "local_files_only", "token")  # options of `hf_hub_download`
logger = logging.getLogger(__name__)


def push_latency(
    table: DeviceTable,
    repo_id: str | None = None,
    *,
    create_pr: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Publish a device's latencies in the repository of the adapter, for budgets on that device.

    An earlier table of the same device, runtime, precision, threads and batch size is replaced.

    Args:
        table: table to publish, from ``model.device_table(model.measure_latency())`` or ``DeviceTable.of_export``.
        repo_id: repository of the adapter; by default the one that the table names.
        create_pr: whether to open a pull request in place of a commit; None where the user may not write.
        revision: branch to commit to.
        commit_message: summary line of the commit.
        token: access token of the Hub, or whether to use the stored one.

    Returns:
        The commit; with ``pr_url`` where it is a pull request.

    Raises:
        OSError: the Hub cannot be reached, or does not let the user write.
        ValueError: the repository is not known, or its adapter has other weights.
    """
    repo_id = check_latency(table.routes, table.weights, repo_id or table.repo_id, revision=revision, token=token)
    content = json.dumps(table.to_dict(), indent=2) + "\n"
    options: dict[str, Any] = {
        "path_or_fileobj": content.encode(), "path_in_repo": f"{FOLDER}/{table.file_name}", "repo_id": repo_id,
        "revision": revision, "commit_message": commit_message or f"Latencies of {table.name}",
    }  # fmt: skip
    api = HfApi(token=token)
    with hub_errors():
        try:
            return api.upload_file(**options, create_pr=bool(create_pr))
        except HfHubHTTPError as error:
            if create_pr is not None or error.response.status_code != FORBIDDEN:
                raise
        return api.upload_file(**options, create_pr=True)


@hub_errors()
def check_latency(
    routes: Iterable[str],
    weights: Mapping[str, str],
    repo_id: str | None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """The repository of an adapter, after a check that all of some routes are in it, with these weights.

    Args:
        routes: routes as text, whose latencies are to be published.
        weights: SHA-256 of the adapter's parts and fingerprints of its anchors, as in ``weights`` of a table.
        repo_id: repository of the adapter; None where it is not known.
        revision: branch, tag or commit of the adapter.
        token: access token of the Hub, or whether to use the stored one.

    Raises:
        OSError: the Hub cannot be reached.
        ValueError: the repository is not known, or its adapter has other weights.
    """
    if repo_id is None:
        raise ValueError("the adapter was not loaded from the Hub: name its repository, as in repo_id='me/adapter'")
    at = {"revision": revision, "token": token}
    try:
        profile = Profile.load(_fetch(repo_id, PROFILE, at))
    except EntryNotFoundError as error:
        raise ValueError(
            f"{repo_id} has no {PROFILE}, so there is no adapter to which latencies belong; profile the adapter and "
            "push it first"
        ) from error
    if stale := stale_routes(routes, weights, published_weights(repo_id, profile, at)):
        raise ValueError(
            f"{quote(stale)} ran other weights here than those in {repo_id}, or are not there: load the adapter from "
            "there and measure it, or push this adapter first"
        )
    return repo_id


def published_weights(where: str, profile: Profile, at: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of an adapter's parts and fingerprints of its anchors, as its small files state them.

    Args:
        where: local folder or Hub id of the adapter.
        profile: profile of the adapter.
        at: options of huggingface_hub, with ``revision``.

    Raises:
        OSError: there is no config.
        ValueError: the config or the profile names no weights.
    """
    stated, config = profile.metadata.get("weights"), read_json(_fetch(where, CONFIG, at))
    try:
        anchors = {f"anchors.{entry['name']}": entry["fingerprint"] for entry in config["anchors"]}
        return {**dict(stated or {}), **anchors}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the anchors or the weights of {where} are not named: {quote(error)}") from None


def find_table(where: str, device: str, weights: Mapping[str, str], at: Mapping[str, Any]) -> DeviceTable | None:
    """The published table of a device for an adapter; None where it has none of that name.

    Args:
        where: local folder or Hub id of the adapter.
        device: name of the device, or the beginning of the table's name.
        weights: SHA-256 of the adapter's parts and fingerprints of its anchors.
        at: options of huggingface_hub, with ``revision`` and ``subfolder``.

    Raises:
        OSError: the Hub cannot be reached.
        ValueError: the table is invalid or was measured with other weights, or several are of that device.
    """
    names = list_tables(where, at)
    tables, failed = read_tables(where, [name for name in names if may_be_of(name, device)], at)
    fitting = [table for table in tables if table.is_named(device)]
    if not fitting:
        if failed:
            raise ValueError(f"the latencies of '{device}' in {where} cannot be used: {'; '.join(failed.values())}")
        return None
    if len(fitting) > 1:
        raise ValueError(
            f"{where} has {len(fitting)} tables of device='{device}'; name one of {quote([t.name for t in fitting])}"
        )
    table = fitting[0].current(weights)
    here = installed_version(table.runtime)
    if here is not None and not _same_version(here, table.version):
        logger.warning(
            "the latencies of '%s' are of %s %s, and %s is installed here: other versions are faster or slower",
            table.name, table.runtime, table.version or "(version unknown)", here,
        )  # fmt: skip
    return table


def is_own_device(profile: Profile, device: str) -> bool:
    """Whether a profile's own latencies are of a device.

    Args:
        profile: profile of the adapter.
        device: name of the device, or its beginning up to a comma.
    """
    latency = profile.metadata.get("latency")
    name = (latency if isinstance(latency, Mapping) else profile.metadata).get("device")
    return isinstance(name, str) and f"{name}, ".startswith(f"{device}, ")


def table_names(where: str, at: Mapping[str, Any]) -> list[str]:
    """The names of all tables of an adapter that can be read.

    Args:
        where: local folder or Hub id of the adapter.
        at: options of huggingface_hub, with ``revision`` and ``subfolder``.
    """
    return [table.name for table in read_tables(where, list_tables(where, at), at)[0]]


def may_be_of(name: str, device: str) -> bool:
    """Whether a file can be a table of a device, by the beginning of its name."""
    return name.startswith(slug(device))


def list_tables(where: str, at: Mapping[str, Any]) -> list[str]:
    """The names of the files of tables that an adapter has; offline those that were fetched before.

    Args:
        where: local folder or Hub id of the adapter.
        at: options of huggingface_hub, with ``revision`` and ``subfolder``.

    Raises:
        OSError: the Hub cannot be reached.
    """
    folder = _local_folder(where, at)
    if folder is not None:
        return table_files(f"{FOLDER}/{path.name}" for path in islice((folder / FOLDER).glob("*.json"), MAX_FILES))
    with hub_errors():
        info = HfApi(token=at.get("token")).model_info(where, revision=at.get("revision"))
    prefix = f"{at['subfolder'].strip('/')}/" if at.get("subfolder") else ""
    paths = (each.rfilename for each in islice(info.siblings or (), 16 * MAX_FILES))
    return table_files(path.removeprefix(prefix) for path in paths if path.startswith(prefix))


def table_files(paths: Iterable[str]) -> list[str]:
    """The names of the files of tables among paths in the folder of an adapter."""
    names = (path.removeprefix(f"{FOLDER}/") for path in paths if path.startswith(f"{FOLDER}/"))
    return sorted(islice((name for name in names if FILE_NAME.fullmatch(name)), MAX_FILES))


def read_tables(where: str, names: Iterable[str], at: Mapping[str, Any]) -> tuple[list[DeviceTable], dict[str, str]]:
    """Read tables of an adapter, of which invalid ones are left out.

    Args:
        where: local folder or Hub id of the adapter.
        names: names of the files, of which the first 64 are read.
        at: options of huggingface_hub, with ``revision`` and ``subfolder``.

    Returns:
        The tables, and by the name of its file why another was left out.

    Raises:
        OSError: the Hub cannot be reached.
    """
    tables, failed = list[DeviceTable](), dict[str, str]()
    for name in islice(names, MAX_TABLES):
        try:
            tables.append(_read_table(where, name, at))
        except ValueError as error:
            if isinstance(error, (OSError, http_error())):  # of the Hub; some are ValueErrors too
                raise
            failed[name] = f"{name}: {shorten(str(error), MAX_REASON)}"
            logger.warning("a latency table of %s was left out: %s", where, failed[name])
    return tables, failed


def _read_table(where: str, name: str, at: Mapping[str, Any]) -> DeviceTable:
    path = _fetch(where, f"{FOLDER}/{name}", at, MAX_TABLE_BYTES)
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, and at most {MAX_TABLE_BYTES:,} are read")
    table = DeviceTable.from_dict(read_json(path), None if os.path.isdir(where) else where)
    if table.file_name != name:
        raise ValueError(f"its device, runtime, precision, threads and batch size belong in {table.file_name}")
    return table


def _fetch(where: str, name: str, at: Mapping[str, Any], most: int = MAX_BYTES) -> Path:
    """The path of a file of an adapter on this machine; ValueError where it has more than ``most`` bytes."""
    folder = _local_folder(where, at)
    if folder is not None:
        return checked_path(folder, name)
    options: dict[str, Any] = {key: at[key] for key in OF_FILES if at.get(key) is not None}
    options |= {"subfolder": at.get("subfolder") or None, "revision": at.get("revision")}
    with hub_errors():
        asked: Any = hf_hub_download(where, name, **options, dry_run=True)
        if (asked.file_size or 0) > most:
            raise ValueError(f"{name} has {asked.file_size:,} bytes, and at most {most:,} are read")
        return Path(hf_hub_download(where, name, **options))


def _local_folder(where: str, at: Mapping[str, Any]) -> Path | None:
    """The folder of a local adapter, or of what the cache has of one on the Hub if that must not be asked."""
    subfolder = at.get("subfolder") or ""
    if os.path.isdir(where):
        return Path(where, subfolder)
    if not (constants.HF_HUB_OFFLINE or at.get("local_files_only")):
        return None
    name = f"{subfolder}/{CONFIG}" if subfolder else CONFIG
    file = try_to_load_from_cache(where, name, cache_dir=at.get("cache_dir"), revision=at.get("revision"))
    return Path(file).parent if isinstance(file, str) else None


def _same_version(here: str, there: str) -> bool:
    """Whether two versions are the same but for a build, such as ``+cpu``."""
    try:
        return Version(here).public == Version(there).public
    except InvalidVersion:
        return here == there
