"""The state of a race in a folder, from which an interrupted one goes on."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from restnet_hf.files import atomic_file


STATE, WEIGHTS = "race.json", "race.safetensors"
logger = logging.getLogger(__name__)


class RaceState:
    """The state of a race in a folder, after each round.

    Args:
        folder: folder of the state; None for no state.
        model: model whose anchors race.
        race: race to save and load.
        winners: number of routes of a part that are left at the end.
    """

    def __init__(self, folder: str | None, model: Any, race: Any, winners: int) -> None:
        self.folder, self.race = None if folder is None else Path(folder), race
        if self.folder is not None:
            about = {**asdict(race.config), "max_minutes": None, "folder": None, "winners": winners}
            routes = [[str(racer.route), racer.part, str(racer.stitch)] for racer in race.racers]
            images = race.train.images.double().sum((1, 2, 3)).tolist(), race.train.right.tolist()
            text = json.dumps([about, routes, images, model.identity()], sort_keys=True, default=str)
            self.key = hashlib.sha256(text.encode()).hexdigest()

    def write(self, number: int) -> None:
        """Write the state; ``number`` rounds are finished."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        every = [*self.race.racers, *self.race.finished]
        weights = {
            f"{racer.route}|{name}": tensor.contiguous()
            for racer in every
            for name, tensor in racer.stitch.state_dict().items()
        }
        with atomic_file(self.folder / WEIGHTS) as temporary:
            save_file(weights, temporary)
        entries = [[str(r.route), r.accuracy, r.score, r.epochs] for r in every]
        state = {"key": self.key, "round": number, "left": len(self.race.racers), "racers": entries}
        with atomic_file(self.folder / STATE) as temporary:
            temporary.write_text(json.dumps(state))

    def load(self) -> int | None:
        """Load the state of the same race; returns the number of finished rounds, or None where there is none."""
        if self.folder is None or not (self.folder / STATE).exists():
            return None
        try:
            state = json.loads((self.folder / STATE).read_text())
            if state["key"] != self.key:
                logger.warning(f"{self.folder} holds another race, which is begun anew and replaced")
                return None
            weights, racers = load_file(self.folder / WEIGHTS), {str(r.route): r for r in self.race.racers}
            for route, accuracy, score, epochs in state["racers"]:
                racer = racers[route]
                racer.accuracy, racer.score, racer.epochs = accuracy, score, epochs
                own = {key.partition("|")[2]: value for key, value in weights.items() if key.startswith(f"{route}|")}
                racer.stitch.load_state_dict(own)
            order = [racers[route] for route, *_ in state["racers"]]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the race in {self.folder} cannot be read: {error}; delete it to begin anew") from error
        self.race.racers, self.race.finished = order[: state["left"]], order[state["left"] :]
        return int(state["round"])
