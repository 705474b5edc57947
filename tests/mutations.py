"""Values to put in the place of those that files hold."""

import copy
from typing import Any

from hypothesis import strategies as st


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in places(item, (*path, key))]


def put(data: Any, path: tuple, value: Any) -> Any:
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


HUGE = 10**400  # JSON has it, no float can hold it


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(HUGE) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


ODD = [
    None,
    True,
    -1,
    0,
    2**40,
    -(2**63),
    1e400,
    "",
    "../../x",
    "/etc/passwd",
    "a" * 10_000,
    "\x00",
    "float32",
    [],
    [3],
    {},
]


class Trap:
    """Writes a file when somebody unpickles it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")
