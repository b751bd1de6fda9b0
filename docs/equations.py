"""Equations of docstrings, which are written as Python expressions, as LaTeX for the site."""

import ast
import re

GREEK = ("epsilon",)
PLAIN = ("max", "min", "log", "argmin")
PRECEDENCE = {ast.Add: 1, ast.Sub: 1, ast.Mult: 2, ast.Div: 2, ast.USub: 3, ast.Pow: 4}


def equations(paragraph: str) -> list[str] | None:
    """The equations of a paragraph in LaTeX, or None where it has any other text."""
    text = re.sub(r"\|([^|]+)\|", r"abs(\1)", " ".join(paragraph.split()).rstrip("."))
    text = re.sub(r"(\w)_\(([^()]*)\)", r"\1[\2]", text)
    found, pending = [], ""
    for piece in _split(text, ","):
        pending = f"{pending}, {piece}" if pending else piece
        sides = _split(pending, "=")
        if len(sides) > 1 or (pending == text and "(" in text):
            try:
                found.append(" = ".join(_latex(ast.parse(side.strip(), mode="eval").body) for side in sides))
            except (SyntaxError, KeyError):
                return None
            pending = ""
    return None if pending else found


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators that stand outside of brackets and of `<=`, `>=`, `==`."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _latex(node: ast.expr, outer: int = 0) -> str:
    match node:
        case ast.Name(name):
            return _name(name)
        case ast.Constant(value):
            return str(value)
        case ast.Attribute():
            return rf"\mathrm{{{ast.unparse(node)}}}".replace("_", r"\_")
        case ast.Subscript(value, index):
            return f"{_latex(value)}_{{{_latex(index)}}}"
        case ast.Tuple(elements):
            return ", ".join(map(_latex, elements))
        case ast.Starred(value):
            return _latex(value)
        case ast.UnaryOp(ast.USub(), operand):
            return f"-{_latex(operand, 3)}"
        case ast.BinOp(left, ast.Div(), right):
            return rf"\frac{{{_latex(left)}}}{{{_latex(right)}}}"
        case ast.BinOp(left, ast.Pow(), right):
            return f"{_latex(left, 5)}^{{{_latex(right)}}}"
        case ast.BinOp(left, operator, right):
            level = PRECEDENCE[type(operator)]
            sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: r"\cdot"}[type(operator)]
            text = f"{_latex(left, level)} {sign} {_latex(right, level + 1)}"
            return rf"\left({text}\right)" if level < outer else text
        case ast.Call(function, arguments):
            return _call(ast.unparse(function), ", ".join(map(_latex, arguments)))
    raise KeyError(node)


def _call(function: str, arguments: str) -> str:
    if function == "sqrt":
        return rf"\sqrt{{{arguments}}}"
    if function == "abs":
        return rf"\left|{arguments}\right|"
    return rf"{_name(function)}\left({arguments}\right)"


def _name(name: str) -> str:
    base, _, below = name.partition("_")
    if name in GREEK or name in PLAIN:
        return rf"\{name}"
    if below and (len(base) == 1 or len(below) == 1):
        return f"{_name(base)}_{{{_name(below)}}}"
    return name if len(name) == 1 else rf"\mathrm{{{name}}}".replace("_", r"\_")
