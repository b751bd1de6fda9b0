"""Equations of docstrings, which are written as Python expressions, as LaTeX for the site."""

import ast
import re

SYMBOLS = ("epsilon", "max", "min", "log", "sum", "prod")
ADD, MULTIPLY, POWER = 1, 2, 3
"""How tightly an operator binds: an operand that binds less tightly gets brackets."""


def equations(paragraph: str) -> list[str] | None:
    """The equations of a paragraph in LaTeX, or None where the paragraph is anything but equations."""
    text = re.sub(r"\|([^|]+)\|", r"abs(\1)", _in_one_line(paragraph))
    text = re.sub(r"(\w)_\(([^()]*)\)", r"\1[\2]", text)
    found, pending = [], ""
    for piece in _split(text, ","):
        pending = f"{pending}, {piece}" if pending else piece
        sides = _split(pending, "=")
        if len(sides) > 1:
            try:
                found.append(" = ".join(_latex(ast.parse(side, mode="eval").body) for side in sides))
            except (SyntaxError, KeyError):
                return None
            pending = ""
    return None if pending else found


def _in_one_line(paragraph: str) -> str:
    """The paragraph with a comma after each line that ends an equation."""
    lines = [line.strip() for line in paragraph.strip().rstrip(".").split("\n")]
    text = lines[0]
    for line in lines[1:]:
        ends = text[-1:] not in "+-*/=," and line[:1] not in "+-*/=)" and text.count("(") == text.count(")")
        text += ", " + line if ends else " " + line
    return text


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that are outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _latex(node: ast.expr, outer: int = 0) -> str:
    """The expression; in brackets if it binds less tightly than its surroundings."""
    match node:
        case ast.Name(name):
            return _name(name)
        case ast.Constant(int() | float()):
            return ast.unparse(node)
        case ast.Attribute():
            return rf"\mathrm{{{ast.unparse(node)}}}".replace("_", r"\_")
        case ast.Subscript(value, index):
            return f"{_latex(value)}_{{{_latex(index)}}}"
        case ast.Tuple(elements):
            return ", ".join(map(_latex, elements))
        case ast.Starred(value):
            return f"*{_latex(value)}"
        case ast.UnaryOp(ast.USub(), operand):
            return _bracketed(f"-{_latex(operand, MULTIPLY)}", ADD, outer)
        case ast.BinOp(left, ast.Pow(), right):
            return _bracketed(f"{_latex(left, POWER + 1)}^{{{_latex(right)}}}", POWER, outer)
        case ast.BinOp(left, ast.Add() | ast.Sub() as operator, right):
            sign = "+" if isinstance(operator, ast.Add) else "-"
            return _bracketed(f"{_latex(left, ADD)} {sign} {_latex(right, ADD + 1)}", ADD, outer)
        case ast.BinOp(_, ast.Mult() | ast.Div(), _):
            return _bracketed(_product(node), MULTIPLY, outer)
        case ast.Call(ast.Name("sum" | "prod" | "log"), _, []) if outer > POWER:
            return _bracketed(_latex(node), POWER, outer)
        case ast.Call(function, arguments, []):
            return _call(ast.unparse(function), arguments)
    raise KeyError(node)


def _bracketed(text: str, binds: int, outer: int) -> str:
    return rf"\left({text}\right)" if binds < outer else text


def _product(node: ast.expr) -> str:
    """a / b * c / d as the product of two fractions."""
    factors: list[tuple[ast.expr, list[ast.expr]]] = []  # each with what it is divided by

    def collect(node: ast.expr) -> None:
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                collect(left)
                factors.append((right, []))
            case ast.BinOp(left, ast.Div(), right):
                collect(left)
                factors[-1][1].append(right)
            case _:
                factors.append((node, []))

    collect(node)
    shown = (rf"\frac{{{_latex(a)}}}{{{_factors(b)}}}" if b else _latex(a, MULTIPLY) for a, b in factors)
    return r" \cdot ".join(shown)


def _factors(nodes: list[ast.expr]) -> str:
    return _latex(nodes[0]) if len(nodes) == 1 else r" \cdot ".join(_latex(node, MULTIPLY) for node in nodes)


def _call(function: str, arguments: list[ast.expr]) -> str:
    inside = ", ".join(map(_latex, arguments))
    if function == "sqrt":
        return rf"\sqrt{{{inside}}}"
    if function == "abs":
        return rf"\left|{inside}\right|"
    return rf"{_name(function)}\left({inside}\right)"


def _name(name: str) -> str:
    base, _, below = re.sub(r"^([a-z])([ab0])$", r"\1_\2", name).partition("_")  # na is n_a
    if name in SYMBOLS:
        return rf"\{name}"
    if below and (len(base) == 1 or len(below) == 1):
        return f"{_name(base)}_{{{_name(below)}}}"
    return name if len(name) == 1 else rf"\mathrm{{{name}}}".replace("_", r"\_")
