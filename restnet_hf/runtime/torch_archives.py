"""Make archives of torch.export (.pt2) that cannot run code when they are loaded. No torch.

`torch.export.load` trusts its file: it unpickles several members, evaluates symbolic sizes and guards as Python, looks
up operators by any dotted name below ``torch`` and imports the modules of enumerations. So an archive is never passed
to it unchanged: the parts that a program needs are checked one by one against a list of harmless ones, and copied.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any


PROGRAM, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
CONFIGS = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
MEMBER = re.compile(
    rf"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|{PROGRAM}|{SAMPLES}"
    r"|data/weights/(weight_\d{1,7}|model_weights_config\.json)"
    r"|data/constants/(tensor_\d{1,7}|model_constants_config\.json)"
)
NAME = re.compile(r"[A-Za-z0-9_.+-]{0,500}")  # without parentheses and quotes, it calls nothing if it is evaluated
TEXT = re.compile(r"[A-Za-z0-9_.,> -]{0,200}")  # the mode of an operator or the equation of an einsum, but not a path
OPERATOR = re.compile(
    # aten.save writes a file and aten.from_file maps one
    r"torch\.ops\.aten\.(?!save\.|from_file\.)(_?[A-Za-z0-9]\w*|__(and|or|xor|lshift|rshift)__)\.[A-Za-z0-9]\w*"
    r"|torch\.ops\.higher_order\.wrap_with_(autocast|set_grad_enabled)"
    r"|torch\.sym_(float|int|ite|max|min|not|sum)|math\.(ceil|floor|trunc)"
    r"|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|not_|or_|sub|truediv)",
    re.ASCII,
)
ARGUMENT = re.compile(
    r"as_((bool|complex|float|int|string|sym_bool|sym_float|sym_int|tensor)s?|device|expr|float_lists|graph|int_lists"
    r"|layout|memory_format|name|nested_tensors|none|optional_tensors?|scalar_type)"
)
NAME_KEYED = ("config", "tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values")  # with names as keys
SYMBOLIC = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Max|Min|Mod|And|Or|Not|Equality|Unequality|GreaterThan|LessThan"
    r"|Strict(Greater|Less)Than|Where|(Floor|Clean|Ceil|IntTrue|FloatTrue)Div|ModularIndexing|PythonMod"
    r"|(Ceil|Floor|Trunc|Round)ToInt|(Trunc)?ToFloat|Identity"
)
MAX_SIZE_LENGTH = 2000  # characters of a symbolic size, which takes longer to evaluate than to read


class UntrustedProgramError(ValueError):
    """An archive holds parts that may run code when it is loaded."""


def safe_archive(path: Path) -> io.BytesIO:
    """A copy of an archive without parts that may run code, such as sample inputs, guards and metadata of nodes.

    Args:
        path: file that `torch.export.save` wrote.

    Raises:
        BadZipFile: the file is damaged.
        UntrustedProgramError: a part of the archive is not known to be harmless.
        OSError: the file cannot be read.
    """
    safe = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(safe, "w") as copy:
        members = _members(archive, path.stat().st_size)
        for name, member in members.items():
            data = b"" if name == SAMPLES else archive.read(member)
            if name == PROGRAM:
                data = json.dumps(_safe_program(json.loads(data))).encode()
            elif name in CONFIGS.values():
                _check_config(json.loads(data), name, members)
            copy.writestr(f"program/{name}", data)
    safe.seek(0)
    return safe


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name, without the folder that holds all of them."""
    members = {}
    for member in archive.infolist():
        name = member.filename.partition("/")[2]
        if not MEMBER.fullmatch(name) or name in members:
            raise UntrustedProgramError(f"its member {member.filename[:100]!r} is not one that a plain program has")
        if member.compress_type != zipfile.ZIP_STORED:
            raise UntrustedProgramError(f"its member '{name}' is compressed, which programs are not")
        members[name] = member
    if sum(member.file_size for member in members.values()) > size:
        raise UntrustedProgramError("its members together are larger than the file")
    for name in (PROGRAM, *CONFIGS.values()):
        if name not in members:
            raise UntrustedProgramError(f"it has no member '{name}', without which other members are unpickled")
    return members


def _check_config(config: Any, name: str, members: Mapping[str, zipfile.ZipInfo]) -> None:
    """Raise UntrustedProgramError unless tensors are plain bytes of members, as many as their sizes need."""
    _check(config)
    for meta in config["config"].values():
        member = members.get(name.rpartition("/")[0] + f"/{meta['path_name']}")
        if meta["use_pickle"] is not False or member is None or meta["path_name"].endswith(".json"):
            raise UntrustedProgramError(f"a tensor in '{name}' is pickled, or not in the archive")
        if member.file_size == 0 and prod(size["as_int"] for size in meta["tensor_meta"]["sizes"]) != 0:
            raise UntrustedProgramError(f"a tensor in '{name}' has elements, but no bytes")


def _safe_program(program: dict[str, Any]) -> dict[str, Any]:
    """The program without guards and metadata, every other part checked."""
    if program["graph_module"].get("treespec_namedtuple_fields"):
        raise UntrustedProgramError("its inputs or outputs have types of their own")
    program = {**program, "guards_code": []}
    program["graph_module"] = {**program["graph_module"], "metadata": {}}
    _check(program)
    return program


def _check(value: Any, key: str = "") -> None:
    """Raise UntrustedProgramError at anything that is not known to be harmless; remove the metadata of nodes."""
    if isinstance(value, dict):
        if "target" in value and "inputs" in value:  # a node
            value["metadata"] = {}
        for inner, item in value.items():
            kind = inner.startswith("as_") and key not in NAME_KEYED
            if not NAME.fullmatch(inner) or (kind and not ARGUMENT.fullmatch(inner)):
                raise UntrustedProgramError(f"it has {inner[:100]!r} in its program")
            _check(item, inner)
    elif isinstance(value, list):
        for item in value:
            _check(item, key)
    elif isinstance(value, str) and not _is_harmless(value, key):
        raise UntrustedProgramError(f"it has {value[:100]!r} as {key or 'text'} in its program")


def _is_harmless(text: str, key: str) -> bool:
    if key == "target":
        return OPERATOR.fullmatch(text) is not None
    if key == "expr_str":
        return len(text) <= MAX_SIZE_LENGTH and all(map(_is_symbolic, ast.walk(ast.parse(text, mode="eval"))))
    if key in ("in_spec", "out_spec"):
        return text == "" or _is_plain_tree(json.loads(text))
    return (TEXT if key in ("as_string", "as_strings") else NAME).fullmatch(text) is not None


def _is_symbolic(node: ast.AST) -> bool:
    """Whether a part of a symbolic size only builds a formula; powers may become huge, and are not allowed."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Name):
        return SYMBOLIC.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.fullmatch(r"\w{1,50}", node.value, re.ASCII) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    return isinstance(node, ast.Expression | ast.keyword | ast.Load | ast.UnaryOp | ast.USub)


def _is_plain_tree(value: Any) -> bool:
    """Whether a description of nested inputs holds only tuples, lists and dictionaries."""
    if isinstance(value, list):
        return all(map(_is_plain_tree, value))
    if not isinstance(value, dict):
        return isinstance(value, int)
    if value.keys() != {"type", "context", "children_spec"}:
        return False
    keys = [] if value["context"] is None else json.loads(value["context"]) or []
    plain = value["type"] in (None, "builtins.tuple", "builtins.list", "builtins.dict")
    named = isinstance(keys, list) and all(isinstance(key, str) and NAME.fullmatch(key) for key in keys)
    return plain and named and _is_plain_tree(value["children_spec"])
