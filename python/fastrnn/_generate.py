"""From the traced operations of a cell to its C++ header, with its derivative.

torch differentiates: make_fx over vjp, with torch's decompositions, leaves one graph of pointwise
operations, the cell's own and those of its gradient. What backward needs of the cell's own, it
either finds (states, inputs, learned vectors), reads as forward saved it, or computes again: a
minimum cut finds the fewest values to save, and among equal choices the latest, which leave the
least to compute again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from ._torch import trace_pointwise
from ._trace import Definition

__all__ = ["generate"]

Value = Any  # a Node or a number


class Node:
    """An operation of the graph, or one of its inputs."""

    def __init__(self, op: str, args: tuple[Value, ...] = (), is_bool: bool = False) -> None:
        self.op, self.args, self.is_bool = op, args, is_bool
        self.name = ""

    @property
    def nodes(self) -> list[Node]:
        return [a for a in self.args if isinstance(a, Node)]


_FUNCTIONS = {
    *("abs", "cos", "erf", "exp", "expm1", "log", "log1p", "maximum", "minimum", "relu", "rsqrt"),
    *("sigmoid", "sign", "sin", "sqrt", "tanh"),
}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_LOGIC = {"logical_and": "&", "logical_or": "|", "bitwise_and": "&", "bitwise_or": "|"}
_SAME = {"alias", "clone", "detach", "_to_copy", "expand", "lift_fresh_copy", "view"}
_NUMBERS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


class _Graph:
    """Makes nodes, each once, and no more of them than the values need."""

    def __init__(self) -> None:
        self._made: dict[Any, Node] = {}

    def make(self, op: str, *args: Value, is_bool: bool = False) -> Value:
        simple = self._simplify(op, args)
        if simple is not None:
            return simple
        key = (op, *((id(a) if isinstance(a, Node) else ("number", a)) for a in args))
        if key not in self._made:
            self._made[key] = Node(op, args, is_bool)
        return self._made[key]

    def _simplify(self, op: str, args: tuple[Value, ...]) -> Value | None:
        numbers = [a for a in args if not isinstance(a, Node)]
        if op in _NUMBERS and len(numbers) == 2:
            return float(_NUMBERS[op](*numbers))
        if op == "neg" and numbers:
            return -args[0]
        if op in ("add", "sub") and args[1] == 0:
            return args[0]
        if op == "add" and args[0] == 0:
            return args[1]
        if op == "add" and isinstance(args[1], Node) and args[1].op == "neg":
            return self.make("sub", args[0], args[1].args[0])
        if op == "add" and isinstance(args[0], Node) and args[0].op == "neg":
            return self.make("sub", args[1], args[0].args[0])
        if op == "sub" and args[0] == 0:
            return self.make("neg", args[1])
        if op == "mul" and 0 in numbers:
            return 0.0
        if op in ("mul", "div") and args[1] == 1:
            return args[0]
        if op == "mul" and args[0] == 1:
            return args[1]
        if op == "mul" and -1 in numbers:
            return self.make("neg", args[0] if isinstance(args[0], Node) else args[1])
        if op == "div" and args[0] == 0:
            return 0.0
        if op == "where" and args[1] is args[2]:
            return args[1]
        return None

    def power(self, base: Value, exponent: float) -> Value:
        """By products and roots, where these do."""
        if exponent == 0:
            return 1.0
        if exponent < 0 and exponent in (-0.5, -1, -2, -3):
            if exponent == -0.5:
                return self.make("rsqrt", base)
            return self.make("div", 1.0, self.power(base, -exponent))
        if exponent == 0.5:
            return self.make("sqrt", base)
        if exponent == 1.5:
            return self.make("mul", base, self.make("sqrt", base))
        if exponent in (1, 2, 3, 4):
            half = base
            for _ in range(int(exponent) - 1):
                half = self.make("mul", half, base)
            return half
        return self.make("pow", base, float(exponent))

    def apply(self, target: Any, args: Sequence[Value], kwargs: dict[str, Any]) -> Value:
        """An operator of torch's."""
        name = target.overloadpacket.__name__
        if name in _SAME:
            return args[0]
        if name == "copy":
            return args[1]
        if name in ("add", "sub"):
            alpha = kwargs.get("alpha", 1)
            return self.make(name, args[0], self.make("mul", args[1], alpha))
        if name in ("mul", "div", "neg"):
            return self.make(name, *args)
        if name == "rsub":
            return self.make("sub", args[1], args[0])
        if name in ("scalar_tensor", "full", "full_like"):
            return float(args[0] if name == "scalar_tensor" else args[1])
        if name in ("empty_permuted", "empty_like"):  # which a copy fills
            return float("nan")
        if name in ("zeros_like", "ones_like", "zeros", "ones"):
            return float(name.startswith("ones"))
        if name == "reciprocal":
            return self.make("div", 1.0, args[0])
        if name == "pow":
            return self.power(args[0], args[1])
        if name == "clamp":
            low, high = (*args[1:], None, None)[:2]
            low, high = kwargs.get("min", low), kwargs.get("max", high)
            value = args[0]
            value = value if low is None else self.make("at_least", float(low), value)
            return value if high is None else self.make("at_most", float(high), value)
        if name in ("clamp_min", "clamp_max"):
            op = "at_least" if name == "clamp_min" else "at_most"
            return self.make(op, float(args[1]), args[0])
        if name == "sgn":
            return self.make("sign", args[0])
        if name == "where":
            return self.make("where", *args)
        if name in _COMPARISONS:
            return self.make(name, *args, is_bool=True)
        if name in _LOGIC:
            return self.make(_LOGIC[name], *args, is_bool=True)
        if name in ("logical_not", "bitwise_not"):
            return self.make("!", args[0], is_bool=True)
        if name in _FUNCTIONS:
            return self.make(name, *args)
        raise NotImplementedError(f"the generator knows no {target}")


@dataclass
class _Cell:
    """A cell and its gradient as one graph."""

    arguments: list[Node]  # in the order of Definition.arguments
    gradients: list[Node]  # incoming, of each state
    results: list[Value]  # the new states
    outgoing: list[Value]  # the gradient of each argument
    named: dict[str, Node] = field(default_factory=dict)


def _differentiate(definition: Definition) -> _Cell:
    names = [name for name in definition.names if name]
    places = [i for i, name in enumerate(definition.names) if name]

    def joint(arguments: list[Tensor], gradients: list[Tensor]) -> Any:
        def function(*arguments: Tensor) -> Any:
            values = definition.values(*arguments)
            return tuple(values[i] for i in definition.results), [values[i] for i in places]

        made: Any = torch.func.vjp(function, *arguments, has_aux=True)
        results, vjp, named = made
        return list(results), named, list(vjp(tuple(gradients)))

    def sample(size: int) -> list[Tensor]:
        return [torch.full((2, 3), 0.5, dtype=torch.float64) for _ in range(size)]

    given = sample(len(definition.arguments)), sample(len(definition.states))
    aten = torch.ops.aten
    composite = (aten.elu, aten.gelu, aten.hardtanh, aten.leaky_relu, aten.softplus, aten.silu)
    traced = trace_pointwise(joint, given, composite)
    graph, values, placeholders = _Graph(), {}, []
    for node in traced.nodes:
        if node.op == "placeholder":
            values[node] = Node("argument")
            placeholders.append(values[node])
        elif node.op == "call_function":
            args = [values.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args]
            values[node] = graph.apply(node.target, args, node.kwargs)
        elif node.op == "output":
            parts = _parts(node.args[0], definition)
            results, named, outgoing = [[values.get(a, 0.0) for a in part] for part in parts]
    size = len(definition.arguments)
    own = {name: v for name, v in zip(names, named) if isinstance(v, Node)}
    return _Cell(placeholders[:size], placeholders[size:], results, outgoing, own)


def _parts(flat: Any, definition: Definition) -> list[Sequence[Any]]:
    """Results, named values and gradients, which the trace has in one row."""
    results, arguments = len(definition.states), len(flat) - len(definition.arguments)
    return [flat[:results], flat[results:arguments], flat[arguments:]]


def _closure(roots: Iterable[Value], stop: set[Node] | None = None) -> list[Node]:
    """The nodes that the roots need, each after its arguments; nothing behind `stop`."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node in order:
            return
        if stop is None or node not in stop:
            for argument in node.nodes:
                visit(argument)
        order[node] = None

    for root in roots:
        if isinstance(root, Node):
            visit(root)
    return list(order)


def choose_saved(needed: Iterable[Node], free: set[Node], unknown: set[Node]) -> list[Node]:
    """The fewest values from which, with the free ones, all that is needed can be computed.

    unknown: the arguments that backward does not have. Each value counts one; masks cannot be
    saved. By the maximum flow from the unknown to the needed; of all minimum cuts the one next to
    the needed.
    """
    needed = [node for node in dict.fromkeys(needed) if node not in free]
    nodes = [node for node in _closure(needed, free) if node not in free]
    source, sink = "source", "sink"
    capacity: dict[Any, dict[Any, float]] = {source: {}, sink: {}}

    def connect(a: Any, b: Any, size: float) -> None:
        capacity.setdefault(a, {})[b] = size
        capacity.setdefault(b, {}).setdefault(a, 0.0)

    endless = float("inf")
    for node in nodes:
        connect((node, "in"), (node, "out"), endless if node.is_bool else 1.0)
        if node in unknown:
            connect(source, (node, "in"), endless)
        for argument in node.nodes:
            if argument not in free:
                connect((argument, "out"), (node, "in"), endless)
    for node in needed:
        connect((node, "out"), sink, endless)

    def path() -> list[Any] | None:
        before: dict[Any, Any] = {source: None}
        queue = [source]
        for place in queue:
            for following, left in capacity[place].items():
                if left > 0 and following not in before:
                    before[following] = place
                    queue.append(following)
        if sink not in before:
            return None
        found = [sink]
        while found[-1] != source:
            found.append(before[found[-1]])
        return found[::-1]

    while (way := path()) is not None:
        for a, b in pairwise(way):  # each passes at least one value, of size 1
            capacity[a][b] -= 1
            capacity[b][a] += 1
    reached: set[Any] = {sink}
    queue = [sink]
    for place in queue:
        for before in capacity[place]:
            if capacity[before].get(place, 0) > 0 and before not in reached:
                reached.add(before)
                queue.append(before)
    return [n for n in nodes if (n, "in") not in reached and (n, "out") in reached]


# What a name in the header must not be: C++'s words, and what the header itself uses.
_WORDS = (
    "alignas alignof and asm auto bool break case catch char class concept const constexpr "
    "continue decltype default delete do double else enum explicit export extern false float "
    "for friend goto if inline int long mutable namespace new not nullptr operator or private "
    "protected public register requires return short signed sizeof static struct switch "
    "template this throw true try typedef typename union unsigned using virtual void volatile "
    "while xor V x_ r_ z_ p_ state_ state_prev_ saved_ d_state_ dx_ dr_ dz_ dp_ at_least "
    "at_most pow where max min "
)
_RESERVED = {*_WORDS.split(), *_FUNCTIONS}


class _Writer:
    """Writes the values of one function, line by line."""

    def __init__(self, known: dict[Node, str], wanted: Sequence[Value], names: dict[Node, str]):
        self.known, self.lines = dict(known), list[str]()
        self.taken = {*_RESERVED, *known.values()}
        order = [n for n in _closure(wanted, set(known)) if n not in known]
        uses: dict[Node, int] = {}
        for node in order:
            for argument in node.nodes:
                uses[argument] = uses.get(argument, 0) + 1
        for value in wanted:
            if isinstance(value, Node):
                uses[value] = uses.get(value, 0) + 1
        for node in order:
            if uses[node] > 1 or node in names:
                text = self.text(node)
                name = self.unique(names[node]) if node in names else self.temporary()
                self.lines.append(f"const {'auto' if node.is_bool else 'V'} {name} = {text};")
                self.known[node] = name

    def temporary(self) -> str:
        return self.unique(next(n for i in count() if (n := f"t{i}") not in self.taken))

    def unique(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def value(self, value: Value) -> str:
        """As a V."""
        if not isinstance(value, Node):
            return _number(value)
        text = self.known.get(value) or self.text(value)
        return f"where({text}, V(1), V(0))" if value.is_bool else text

    def inner(self, value: Value) -> str:
        """The same as part of an expression."""
        text = self.value(value)
        is_sum = isinstance(value, Node) and value not in self.known and " " in text
        if is_sum and not value.is_bool and (value.op in _SIGNS or value.op == "neg"):
            return f"({text})"
        return text

    def text(self, node: Node) -> str:
        op, args = node.op, node.args
        if op in _SIGNS:
            # A sum needs no brackets on the left of a sum, nor a product of products.
            first = args[0]
            loose = isinstance(first, Node) and first not in self.known and first.op in (
                ("add", "sub", "mul", "div") if op in ("add", "sub") else ("mul", "div")
            )  # fmt: skip
            second = args[1]
            tight = isinstance(second, Node) and second not in self.known and second.op in (
                ("mul", "div") if op in ("add", "sub") else ()
            )  # fmt: skip
            left = self.value(first) if loose else self.inner(first)
            right = self.value(second) if tight else self.inner(second)
            return f"{left} {_SIGNS[op]} {right}"
        if op == "neg":
            return f"-{self.inner(args[0])}"
        if op in _COMPARISONS:
            return f"{self.inner(args[0])} {_COMPARISONS[op]} {self.inner(args[1])}"
        if op in ("&", "|"):
            return f"({self.mask(args[0])}) {op} ({self.mask(args[1])})"
        if op == "!":
            return f"!({self.mask(args[0])})"
        if op == "where":
            return f"where({self.mask(args[0])}, {self.value(args[1])}, {self.value(args[2])})"
        if op in ("at_least", "at_most"):  # x stays where it is NaN
            return f"{'max' if op == 'at_least' else 'min'}({', '.join(map(self.value, args))})"
        return f"{op}({', '.join(map(self.value, args))})"

    def mask(self, value: Node) -> str:
        return self.known.get(value) or self.text(value)


def _number(value: float) -> str:
    if value != value:
        return 'V(__builtin_nan(""))'
    if abs(value) == float("inf"):
        return "V(-__builtin_inf())" if value < 0 else "V(__builtin_inf())"
    return f"V({int(value)})" if value == int(value) and abs(value) < 2**24 else f"V({value!r})"


def generate(definition: Definition) -> str:
    """The header of the cell."""
    d, cell = definition, _differentiate(definition)
    sizes = (len(d.gates), len(d.recurrent), len(d.inputs), len(d.states), len(d.parameters))
    arguments, outgoing = iter(cell.arguments), iter(cell.outgoing)
    x, r, z, before, p = ([next(arguments) for _ in range(n)] for n in sizes)
    dx, dr, dz, d_before, dp = ([next(outgoing) for _ in range(n)] for n in sizes)

    # What backward has: see csrc/cells/general.h.
    free = {*before, *p, *z, *(s for s in cell.results if isinstance(s, Node))}
    backward = [*dx, *dr, *dz, *d_before, *dp]
    incoming = set(cell.gradients)
    later: set[Node] = set()  # what depends on incoming gradients
    for node in _closure(backward):
        if node in incoming or any(a in later for a in node.nodes):
            later.add(node)
    order = [n for n in _closure(backward) if n in later]
    needed = [a for node in order for a in node.nodes if a not in later]
    needed += [v for v in backward if isinstance(v, Node) and v not in later]
    saved = choose_saved(needed, free, {*x, *r})

    gates = {f"{gate}": i for i, gate in enumerate(d.gates)}
    splits = bool(r) and (
        len(r) < len(x) or any(dr[i] is not dx[gates[g]] for i, g in enumerate(d.recurrent))
    )
    used = _closure([*cell.results, *saved, *backward])
    direct = before[0] in used
    names = {node: name for name, node in cell.named.items()}
    locals_: dict[Node, str] = {}
    for i, node in enumerate(cell.results):
        if isinstance(node, Node) and node not in cell.arguments:
            locals_[node] = names.get(node, f"{d.states[i]}_new")
    locals_ |= {n: name for n, name in names.items() if n not in cell.arguments}
    for i, node in enumerate(saved):
        if node not in cell.arguments:
            locals_.setdefault(node, f"s{i}")

    # Forward.
    known: dict[Node, str] = {}
    opening: list[str] = []
    taken = set(_RESERVED)

    def bring_in(nodes: Sequence[Node], own: Sequence[str], array: str, wanted: set[Node]) -> None:
        """Names for the elements of an array."""
        for i, (node, name) in enumerate(zip(nodes, own)):
            if node in known or node not in wanted:
                continue
            while name in taken:
                name += "_"
            taken.add(name)
            known[node] = name
            opening.append(f"const V {name} = {array}[{i}];")

    def before_names() -> list[str]:
        return [f"{s}_prev" for s in d.states]

    wanted = set(_closure([*cell.results, *saved]))
    bring_in(x, [f"x_{g}" for g in d.gates], "x_", wanted)
    bring_in(r, [f"r_{g}" for g in d.recurrent], "r_", wanted)
    bring_in(z, [f"x_{n}" for n in d.inputs], "z_", wanted)
    bring_in(before[1:], before_names()[1:], "state_", wanted)
    bring_in(p, list(d.parameters), "p_", wanted)
    known[before[0]] = "h_prev_"
    writer = _Writer(known, [*cell.results, *saved], locals_)
    forward = [*opening, *writer.lines]
    forward += [f"saved_[{k}] = {writer.value(n)};" for k, n in enumerate(saved)]
    forward += [f"state_[{k}] = {writer.value(v)};" for k, v in enumerate(cell.results[1:])]
    forward.append(f"return {writer.value(cell.results[0])};")

    # Backward. A result that is an argument has the argument's name.
    known, opening, taken = {}, [], set(_RESERVED)
    wanted = set(_closure(backward, {*saved, *free}))
    reads_output = cell.results[0] in wanted and cell.results[0] not in cell.arguments
    bring_in(saved, [_argument_name(n, d, cell) or locals_[n] for n in saved], "saved_", wanted)
    bring_in(z, [f"x_{n}" for n in d.inputs], "z_", wanted)
    bring_in(p, list(d.parameters), "p_", wanted)
    bring_in(before[1:], before_names()[1:], "state_prev_", wanted)
    known[before[0]] = "h_prev_"
    if reads_output:
        known.setdefault(cell.results[0], "h_")
    after = [n if isinstance(n, Node) else Node("number") for n in cell.results[1:]]
    bring_in(after, [locals_.get(n, "") for n in after], "state_", wanted)
    bring_in(cell.gradients[1:], [f"d_{s}" for s in d.states[1:]], "d_state_", wanted)
    known[cell.gradients[0]] = "dh_"
    if not splits:
        dr = []
    targets = {"dx_": dx, "dr_": dr, "dz_": dz, "d_state_": d_before[1:], "dp_": dp}
    kept = [v for values in targets.values() for v in values] + [d_before[0]]
    writer = _Writer(known, kept, locals_)
    body = [*opening, *writer.lines]
    for array, values in targets.items():
        body += [f"{array}[{i}] = {writer.value(v)};" for i, v in enumerate(values)]
    body.append(f"return {writer.value(d_before[0])};")

    def listed(names: Iterable[str]) -> str:
        return ", ".join(names) or "none"

    constants = [
        ("const char*", "mode", f'"{d.name}"', ""),
        ("int", "gates", len(d.gates), listed(d.gates)),
        ("int", "recurrent", len(d.recurrent), listed(d.recurrent)),
        (
            "int",
            "states",
            len(d.states) - 1,
            f"{listed(d.states[1:])}; {d.states[0]} is the output",
        ),
        ("int", "inputs", len(d.inputs), listed(d.inputs)),
        ("int", "parameters", len(d.parameters), listed(d.parameters)),
        (
            "int",
            "saves",
            len(saved),
            listed(_argument_name(n, d, cell) or locals_[n] for n in saved),
        ),
        ("bool", "splits_gradient", str(splits).lower(), ""),
        ("bool", "has_direct_path", str(direct).lower(), ""),
        ("bool", "reads_output", str(reads_output).lower(), ""),
    ]
    lines = [
        f"// {d.name}: generated by fastrnn from the Python function of that name.",
        "#pragma once",
        "",
        "namespace fastrnn {",
        "",
        f"struct {d.name} {{",
        *(
            f"  static constexpr {kind} {name} = {value};" + (f"  // {note}" if note else "")
            for kind, name, value, note in constants
        ),
        "",
        "  template <class V>",
        "  [[gnu::always_inline]] static constexpr V forward(",
        "      const V* x_, const V* r_, const V* z_, const V* p_, V h_prev_, V* state_,",
        "      V* saved_) {",
        *(f"    {line}" for line in forward),
        "  }",
        "",
        "  template <class V>",
        "  [[gnu::always_inline]] static constexpr V backward(",
        "      const V* saved_, const V* z_, const V* p_, V h_prev_, V h_, const V* state_prev_,",
        "      const V* state_, V dh_, V* d_state_, V* dx_, V* dr_, V* dz_, V* dp_) {",
        *(f"    {line}" for line in body),
        "  }",
        "};",
        "",
        "}  // namespace fastrnn",
        "",
    ]
    return "\n".join(lines)


def _argument_name(node: Node, d: Definition, cell: _Cell) -> str | None:
    """The name of an argument, None for what is none."""
    return next((n for n, a in zip(d.arguments, cell.arguments) if a is node), None)
