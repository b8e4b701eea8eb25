"""Read the constants of a Python config file from its syntax tree; nothing is executed."""

import ast
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any


class Name(str):
    """A dotted name that the file does not define, such as torch.float16."""

    @property
    def last(self) -> str:
        """Return the part after the last dot."""
        return self.rpartition(".")[2]


class Unread(str):
    """Source of an expression that is not plain: a call, a comprehension, a formatted string."""


@dataclasses.dataclass
class Constant:
    """A variable of the file."""

    value: Any  # number, text, list, tuple, None, `Name` or `Unread`
    # places of the nested dicts that take it, such as "model.llm.torch_dtype"
    used_at: list[str] = dataclasses.field(default_factory=list)
    # places whose value is computed from it
    used_in: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Leaf:
    """A value in the nested dicts that is not a variable itself."""

    place: str  # dotted keys, without the positions in lists
    value: Any  # as of `Constant`
    owner: str  # last part of the name in `type` of the dict that has it, or ""


@dataclasses.dataclass
class PlainPython:
    """Constants and nested dicts of a file, and the statements that were not read."""

    constants: dict[str, Constant] = dataclasses.field(default_factory=dict)
    parts: dict[str, list[Leaf]] = dataclasses.field(default_factory=dict)
    unread: list[str] = dataclasses.field(default_factory=list)


def read_plain_python(source: str) -> PlainPython:
    """Read assignments of plain values, dicts and lists; raise ValueError if it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"not Python{line}: {error}") from error
    file = PlainPython()
    _read(tree.body, file)
    return file


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def _read(body: list[ast.stmt], file: PlainPython) -> None:
    for statement in body:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                pass
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                _assign(name, value, file)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                if name in file.parts and isinstance(op, ast.Add):
                    file.parts[name] += _leaves(name, value, "", file)
                else:
                    left = ast.copy_location(ast.Name(name, ast.Load()), statement)
                    _assign(name, ast.BinOp(left, op, value), file)
            case ast.If(test=test) if isinstance(chosen := _value(test, file), bool | int):
                _read(statement.body if chosen else statement.orelse, file)
            case _:
                file.unread.append(ast.unparse(statement).splitlines()[0])


def _assign(name: str, node: ast.expr, file: PlainPython) -> None:
    if _is_part(node):
        file.parts[name] = [*_leaves(name, node, "", file)]
    else:
        file.constants[name] = Constant(_value(node, file))


def _is_part(node: ast.expr) -> bool:
    """Return whether an expression is a dict, or a list with a dict."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return all(keyword.arg for keyword in node.keywords)
        case ast.Dict(keys=keys):
            return all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in keys)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return any(map(_is_part, items))
    return False


def _leaves(place: str, node: ast.expr, owner: str, file: PlainPython) -> Iterator[Leaf]:
    """Yield the leaves below a node; note where variables are used."""
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items) if _is_part(node):
            for item in items:
                yield from _leaves(place, item, owner, file)
            return
        case ast.Call() if _is_part(node):
            pairs = [(k.arg or "", k.value) for k in node.keywords]
        case ast.Dict() if _is_part(node):
            items = zip(node.keys, node.values, strict=True)
            pairs = [(str(k.value), v) for k, v in items if isinstance(k, ast.Constant)]
        case ast.Name(id=name) if name in file.constants:
            file.constants[name].used_at.append(place)
            return
        case ast.Name(id=name) if name in file.parts:
            return
        case _:
            for name in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
                if name in file.constants:
                    file.constants[name].used_in.append(place)
            yield Leaf(place, _value(node, file), owner)
            return
    types = [_value(value, file) for key, value in pairs if key == "type"]
    of_type = Name(types[0]).last if types and isinstance(types[0], str) else ""
    for key, value in pairs:
        yield from _leaves(f"{place}.{key}", value, of_type, file)


def _value(node: ast.expr, file: PlainPython) -> Any:
    """Return the value of an expression; `Unread` if it is not plain."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return file.constants[name].value if name in file.constants else Name(name)
        case ast.Attribute():
            return Name(ast.unparse(node))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            values = [_value(item, file) for item in items]
            return values if isinstance(node, ast.List) else tuple(values)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _value(operand, file)
            return -value if _is_number(value) else Unread(ast.unparse(node))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            pair = _value(left, file), _value(right, file)
            if all(map(_is_number, pair)) or isinstance(op, ast.Add) and _same_text(*pair):
                try:
                    return _OPERATORS[type(op)](*pair)
                except ArithmeticError:
                    pass
    return Unread(ast.unparse(node))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same_text(left: Any, right: Any) -> bool:
    """Return whether two values are lists, or text, which + joins."""
    return type(left) is type(right) and type(left) in (str, list, tuple)
