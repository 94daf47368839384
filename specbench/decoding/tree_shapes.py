"""Settings of token trees: which builder (trees.py), of which size, under which rule (tree_verification.py).

A class of this file is named by a YAML file of configs/tree. Proposals without branches are no tree: the loop of chains
decodes them (tree=chain).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from specbench.decoding.tree_verification import RULES
from specbench.decoding.trees import (
    Choose,
    Shape,
    TokenTree,
    best_first_tree,
    dynamic_tree,
    shared_tree,
    static_tree,
)
from specbench.drafts.expansion import Expansion
from specbench.ranges import Among, Count, Natural

Rule = Annotated[str, Among(RULES)]


class TreeShape(ABC):
    """A kind of token tree and the rule of its verification above temperature 0.

    `nodes`: the most nodes of a tree, the anchor not counted. `drawable`: whether its children can be drawn.
    """

    rule: str
    drawable: ClassVar[bool] = True

    @property
    @abstractmethod
    def label(self) -> str:
        """Value of the `tree` column of a record."""

    @property
    @abstractmethod
    def nodes(self) -> int: ...

    @abstractmethod
    def grow(self, expansion: Expansion, choose: Choose) -> TokenTree:
        """The tree of each request, in the draft's vocabulary."""

    @property
    def draws(self) -> bool:
        """Whether children are drawn (above temperature 0) and not the most likely ones."""
        return self.rule == "drawn_children"

    def _named(self, *parts: object) -> str:
        return "-".join(map(str, (*parts, *(["drawn"] if self.draws else []))))

    def _check(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r}: choose one of {', '.join(RULES)}")
        if self.draws and not self.drawable:
            raise ValueError(
                f"rule=drawn_children: {type(self).__name__} keeps the nodes whose tokens are the most probable, and "
                "drawn children must all be kept, or the text loses the target's distribution; use "
                "rule=deterministic_tree, or tree=static or tree=dynamic"
            )


@dataclass(frozen=True)
class StaticTree(TreeShape):
    """One shape for every round: the children of the ranks in `paths` (Medusa).

    Args:
        paths: the path of every node from the first level down, as ranks among siblings: [[0], [1], [0, 0]].
        rule: "deterministic_tree" or "drawn_children".
    """

    paths: Sequence[Sequence[Natural]]
    rule: Rule = "deterministic_tree"

    def __post_init__(self) -> None:
        self._check()
        Shape.of(self.paths)

    @property
    def label(self) -> str:
        paths = repr([list(path) for path in self.paths])
        return self._named("static", self.nodes, hashlib.sha256(paths.encode()).hexdigest()[:6])

    @property
    def nodes(self) -> int:
        return len(self.paths)

    def grow(self, expansion: Expansion, choose: Choose) -> TokenTree:
        return static_tree(expansion, choose, Shape.of(self.paths))


@dataclass(frozen=True)
class DynamicTree(TreeShape):
    """EAGLE-2's tree: in each level the `width` most probable nodes get `width` children each.

    Args:
        budget: nodes; with chosen children the most probable ones of all are kept, with drawn children a level expands
            as many nodes as the budget leaves room for.
        width: nodes expanded in a level, and children of each.
        depth: levels, at most the draft's slots. None: the draft's slots.
        rule: "deterministic_tree" or "drawn_children".
    """

    budget: Count = 32
    width: Count = 4
    depth: Count | None = None
    rule: Rule = "deterministic_tree"

    def __post_init__(self) -> None:
        self._check()

    @property
    def label(self) -> str:
        depth = [] if self.depth is None else [f"d{self.depth}"]
        return self._named("dynamic", self.budget, f"w{self.width}", *depth)

    @property
    def nodes(self) -> int:
        return self.budget

    def grow(self, expansion: Expansion, choose: Choose) -> TokenTree:
        depth = expansion.depth if self.depth is None else self.depth
        return dynamic_tree(expansion, choose, self.width, depth, self.budget, prune=not self.draws)


@dataclass(frozen=True)
class BestFirst(TreeShape):
    """The `budget` most probable nodes of all (DDTree), exactly.

    Args:
        budget: nodes.
        width: most children of a node; 1 gives the draft's most likely chain. None: the budget.
        depth: levels, at most the draft's slots. None: the draft's slots.
        rule: "deterministic_tree".
    """

    budget: Count = 32
    width: Count | None = None
    depth: Count | None = None
    rule: Rule = "deterministic_tree"
    drawable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check()

    @property
    def label(self) -> str:
        limits = [f"{name}{value}" for name, value in (("w", self.width), ("d", self.depth)) if value is not None]
        return self._named("best-first", self.budget, *limits)

    @property
    def nodes(self) -> int:
        return self.budget

    def grow(self, expansion: Expansion, choose: Choose) -> TokenTree:
        depth = expansion.depth if self.depth is None else self.depth
        return best_first_tree(expansion, self.budget, depth, self.width)


@dataclass(frozen=True)
class TopW(TreeShape):
    """The same over one list of `width` candidates a depth, which all parents share (JetSpec).

    Args:
        budget: nodes.
        width: candidates of a depth.
        depth: levels, at most the draft's slots. None: the draft's slots.
        rule: "deterministic_tree".
    """

    budget: Count = 32
    width: Count = 7
    depth: Count | None = None
    rule: Rule = "deterministic_tree"
    drawable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check()

    @property
    def label(self) -> str:
        depth = [] if self.depth is None else [f"d{self.depth}"]
        return self._named("top-w", self.budget, f"w{self.width}", *depth)

    @property
    def nodes(self) -> int:
        return self.budget

    def grow(self, expansion: Expansion, choose: Choose) -> TokenTree:
        depth = expansion.depth if self.depth is None else self.depth
        return shared_tree(expansion, self.width, depth, self.budget)


KINDS: dict[str, type[TreeShape]] = {
    "static": StaticTree,
    "dynamic": DynamicTree,
    "best_first": BestFirst,
    "top_w": TopW,
}


def tree_settings(shape: TreeShape) -> dict[str, Any] | None:
    """The `kind` and all settings of a tree as plain data, for `tree_of`; None for a class from elsewhere."""
    kind = next((kind for kind, known in KINDS.items() if type(shape) is known), None)
    if kind is None:
        return None
    settings = asdict(shape)
    return {"kind": kind} | settings | ({"paths": [list(path) for path in shape.paths]} if kind == "static" else {})


def tree_of(settings: Mapping[str, Any]) -> TreeShape:
    """The tree with these settings. Errors: ValueError for an unknown kind, or settings that it does not have."""
    kind = settings.get("kind")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](**{key: value for key, value in settings.items() if key != "kind"})
    except TypeError as error:
        raise ValueError(f"a tree of the kind {kind} has other settings ({error})") from error
